"""Stands between an engine and one rank of the user's script.

Every engine starts this file in place of the script, so that arguments, environment, output, signals and exit codes
are the same under all of them. It reports to gaudi_spawn.py over one TCP connection, whose address and key it finds in
the variable GAUDI_SPAWN, in JSON lines:

    rank -> launcher   {"key", "rank", "host"}       at the start
    launcher -> rank   {"work": {...}}               what to run, sent when every rank of the run is there
    launcher -> rank   {"signal": n}                 for the script; SIGKILL takes its children as well
    rank -> launcher   {"signal": n}                 somebody signalled this process; the launcher decides for all ranks
    rank -> launcher   {"alive": true}               the script computes, reads or writes; a few times a minute
    rank -> launcher   {"code": n, "lines": [...]}   the script has ended; what it said last, unless that was shown

A broken connection means that the launcher is gone: the script is killed. The engine always hears that all went well,
because failures are the launcher's to report, once. Only light imports: the user waits for them.
"""

import ctypes
import glob
import json
import math
import os
import re
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress

# Such a line probably begins the error that ends the script, which is shown once, for the first rank alone.
LAST_WORDS = re.compile(rb"Traceback \(most recent call last\)|^usage: |: error: |^terminate called |^Fatal Python")
LAST_WORDS_DELAY = 30.0  # seconds an interpreter may take to end after its traceback
LINE_DELAY = 1.0  # seconds that other lines of ranks above 0 are held back, as they may be the last ones
HELD_LINES = 10_000  # more cannot be last words: the oldest are shown
PULSE_INTERVAL = 5.0  # seconds between two looks at what the script does
IDLE_SHARE, IDLE_BYTES = 0.005, 1024  # of one core and of input and output in that time: the murmur of idle threads
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
LIBC = ctypes.CDLL(None)
PR_SET_CHILD_SUBREAPER = 36
CHILDREN = "/proc/thread-self/children"  # not there in every kernel
STRIKE_TIME = 2.0  # seconds
TOLD_LINES = 400  # shown of a longer text: its head, where a chained exception has its cause, and its tail


def notice_lost_host(connection: socket.socket) -> None:
    """Makes a connection fail within half a minute when the other host is lost."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


class Launcher:
    """The connection to gaudi_spawn.py, which also hears of the signals to this process.

    Signals come as bytes to read: a handler that sent messages would do so in the middle of others.
    """

    def __init__(self, host: str, port: str):
        self.signals, self.wakeup = socket.socketpair()
        self.signals.setblocking(False)
        self.wakeup.setblocking(False)
        signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
        for number in PASSED_ON:
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)  # which the engine blocks
        self.socket = socket.create_connection((host, int(port)), timeout=60)
        self.socket.settimeout(None)
        notice_lost_host(self.socket)
        self.unfinished = b""

    def tell(self, **message) -> None:
        with suppress(ConnectionError):  # `hear` notices it too
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def hear(self) -> list[dict]:
        """Waits for messages or a signal. Raises: EOFError when the launcher is gone."""
        ready, _, _ = select.select([self.socket, self.signals], [], [], self.socket.gettimeout())
        if self.signals in ready:
            for number in self.signals.recv(64):
                self.tell(signal=number)
        if self.socket not in ready:
            if not ready:
                raise TimeoutError
            return []
        try:
            received = self.socket.recv(1 << 16)
        except ConnectionError:
            received = b""
        if not received:
            raise EOFError
        *lines, self.unfinished = (self.unfinished + received).split(b"\n")
        return [json.loads(line) for line in lines]

    def leave(self) -> None:
        """Waits until the launcher hangs up: closing earlier would discard messages that it has not read."""
        self.socket.shutdown(socket.SHUT_WR)
        self.socket.settimeout(5)
        with suppress(EOFError, TimeoutError):
            while True:
                self.hear()


class Relay:
    """Passes on one stream of the script as it comes, but holds back what may be its last words."""

    def __init__(self, source: int, target: int, tag: bytes = b"", delay: float = 0.0, last_words=None):
        self.source, self.tag, self.delay, self.last_words = source, tag, delay, last_words
        self.target = os.fdopen(target, "wb", closefd=False)
        self.held: deque[tuple[float, bytes]] = deque()  # (when to show it, line)
        self.held_until = 0.0
        self.unfinished: list[bytes] = []  # of the last line

    def read(self) -> bool:
        """Takes what is there; False at the end of the stream."""
        chunk = os.read(self.source, 1 << 16)
        *lines, rest = re.split(rb"(?<=[\r\n])", chunk)
        for line in lines:
            self.hold(b"".join(self.unfinished) + line)
            self.unfinished = []
        if rest:
            self.unfinished.append(rest)
        return bool(chunk)

    def hold(self, line: bytes) -> None:
        if self.last_words and self.last_words.search(line):
            self.held_until = time.monotonic() + LAST_WORDS_DELAY
        self.held.append((max(time.monotonic() + self.delay, self.held_until), line))

    def show(self, until: float) -> None:
        """Writes the lines due by then. An unfinished line, like a progress bar, waits for its end only under a tag."""
        if self.unfinished and (not self.tag or until == math.inf):
            self.hold(b"".join(self.unfinished))
            self.unfinished = []
        due = b""
        while self.held and (self.held[0][0] <= until or len(self.held) > HELD_LINES):
            due += self.tag + self.held.popleft()[1]
        if due:
            with suppress(OSError):  # nobody reads on: no reason for the script to end
                self.target.write(due)
                self.target.flush()

    def last_lines(self) -> list[str]:
        """What was never shown, without the middle of a long text."""
        text = b"".join([*(line for _, line in self.held), *self.unfinished])
        lines = text.decode(errors="replace").splitlines()
        if (left_out := len(lines) - TOLD_LINES) > 0:
            lines[TOLD_LINES // 2 : -TOLD_LINES // 2] = [f"[... lines left out: {left_out} ...]"]
        return lines


class Guard:
    """A process that kills the script and its children once this process has ended, even by SIGKILL.

    Of what has a session of its own this process becomes the parent when the script ends.
    """

    def __init__(self):
        self.has_struck = False
        reading, self.pipe = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()  # out of the way of signals to the engine's process group
            for number in PASSED_ON:  # and of those that Slurm sends to all processes
                signal.signal(number, signal.SIG_IGN)
            os.close(self.pipe)
            with open(reading) as pipe:
                group = pipe.read()  # ends when no process holds the other end any more
            if group:
                kill_group(int(group))
            os._exit(0)
        os.close(reading)
        if os.path.exists(CHILDREN):
            LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)

    def watch(self, group: int) -> None:
        os.write(self.pipe, str(group).encode())

    def strike(self, succeeded: bool = False) -> None:
        """At what the script left behind, such as data loader workers; what it detached may outlive its success."""
        if self.has_struck:
            return
        self.has_struck = True
        os.close(self.pipe)
        os.waitpid(self.pid, 0)
        deadline, spared = time.monotonic() + STRIKE_TIME, set()
        while not succeeded and (children := set(find_children()) - spared) and time.monotonic() < deadline:
            for pid in children:
                try:
                    os.kill(pid, signal.SIGKILL)
                except PermissionError:  # another user's
                    spared.add(pid)
                with suppress(OSError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.01)
        if left := sorted(spared & set(find_children())):
            names = ", ".join(map(str, left))
            print(f"gaudi_spawn: processes of another user, which the script started, go on: {names}", file=sys.stderr)

    def bury(self, script: int) -> None:
        """Takes note of orphans that have ended, which else stay in the table of processes."""
        for pid in find_children():
            if pid not in (self.pid, script):
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)


def kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def find_children() -> list[int]:
    with suppress(OSError), open(CHILDREN) as file:
        return [int(pid) for pid in file.read().split()]
    return []


def distributed_variables(work: dict) -> dict[str, str]:
    """The variables that torch, accelerate and DeepSpeed read. Open MPI sets none of them, DeepSpeed all but one."""
    mpi = {name: os.environ.get(f"OMPI_COMM_WORLD_{name}") for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")}
    if mpi["RANK"] is None:
        return {"LOCAL_WORLD_SIZE": os.environ["LOCAL_SIZE"]} if "LOCAL_SIZE" in os.environ else {}
    return {
        "RANK": mpi["RANK"],
        "WORLD_SIZE": mpi["SIZE"],
        "LOCAL_RANK": mpi["LOCAL_RANK"],
        "LOCAL_WORLD_SIZE": mpi["LOCAL_SIZE"],
        "MASTER_ADDR": work["master_addr"],
        "MASTER_PORT": str(work["master_port"]),
    }


class Pulse:
    """Finds out whether the processes of a group do anything: compute, read or write."""

    def __init__(self, group: int):
        self.group = group
        self.seen_at, self.seen = time.monotonic(), self.measure()

    def measure(self) -> tuple[float, int]:
        """Seconds of CPU and bytes of input and output so far, of all its processes."""
        seconds, transferred = 0.0, 0
        for folder in glob.glob("/proc/[0-9]*"):
            with suppress(OSError):
                with open(f"{folder}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()  # from the state on
                if int(fields[2]) == self.group:
                    seconds += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
                    with open(f"{folder}/io") as file:
                        transferred += sum(int(line.split()[1]) for line in file.readlines()[:2])
        return seconds, transferred

    def asks_its_user(self) -> bool:
        """Whether the script waits for standard input."""
        with suppress(OSError), open(f"/proc/{self.group}/syscall") as file:
            return file.read().startswith(("0 0x0 ", "63 0x0 "))  # read(0, ...) on x86 and on Arm
        return False

    def beats(self) -> bool | None:
        """None until it is time for the next look."""
        now = time.monotonic()
        if now < self.seen_at + PULSE_INTERVAL:
            return None
        before, self.seen = self.seen, self.measure()
        share = abs(self.seen[0] - before[0]) / (now - self.seen_at)
        self.seen_at = now
        return share > IDLE_SHARE or abs(self.seen[1] - before[1]) > IDLE_BYTES or self.asks_its_user()


class Script:
    """One rank of the user's script, leader of a process group of its own. Standard input is for rank 0 alone."""

    def __init__(self, rank: int, work: dict, guard: Guard):
        self.guard = guard
        tag = f"[rank {rank}] ".encode() if rank and work["tag_output"] else b""
        self.process = subprocess.Popen(
            [sys.executable, "-u", *work["script"]],
            cwd=work["directory"],
            env=os.environ | distributed_variables(work),
            stdin=None if rank == 0 else subprocess.DEVNULL,
            stdout=subprocess.PIPE if tag else None,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        guard.watch(self.process.pid)
        out, err = (stream.fileno() if stream else -1 for stream in (self.process.stdout, self.process.stderr))
        self.errors = Relay(err, 2, tag, LINE_DELAY if rank else 0.0, LAST_WORDS)
        self.relays = [self.errors]
        if tag:
            self.relays.append(Relay(out, 1, tag))

    def obey(self, messages: list[dict]) -> None:
        for message in messages:
            if message["signal"] == signal.SIGKILL:
                kill_group(self.process.pid)
            else:
                self.process.send_signal(message["signal"])

    def supervise(self, launcher: Launcher) -> int:
        """Relays signals and output until the script has ended. Returns its exit code, -n where signal n killed it."""
        selector = selectors.DefaultSelector()
        for source in (launcher.socket, launcher.signals):
            selector.register(source, selectors.EVENT_READ)
        pulse = Pulse(self.process.pid)
        for relay in self.relays:
            selector.register(relay.source, selectors.EVENT_READ, relay)

        def relay_what_comes(within: float) -> bool:
            ready = selector.select(within)
            if any(key.data is None for key, _ in ready):
                self.obey(launcher.hear())
            for key, _ in ready:
                if key.data is not None and not key.data.read():
                    selector.unregister(key.fd)
            for relay in self.relays:
                relay.show(until=time.monotonic())
            beats = pulse.beats()
            if beats:
                launcher.tell(alive=True)
            if beats is not None:
                self.guard.bury(self.process.pid)
            return bool(ready)

        while self.process.poll() is None:
            relay_what_comes(within=0.1)
        self.guard.strike(succeeded=self.process.returncode == 0)
        while len(selector.get_map()) > 2 and relay_what_comes(within=0.0):
            pass
        return self.process.returncode


def main() -> None:
    guard = Guard()
    host, port, key = os.environ.pop("GAUDI_SPAWN").split(":")
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["RANK"])
    try:
        launcher = Launcher(host, port)
    except ConnectionRefusedError:  # the run was stopped before it began
        sys.exit("the launcher is gone")
    launcher.tell(key=key, rank=rank, host=socket.gethostname())

    try:
        messages = []
        while not messages:
            messages = launcher.hear()
        work = messages.pop(0).get("work")
        if work is None:  # the run was stopped before it began
            return
        script = Script(rank, work, guard)
        script.obey(messages)
        code = script.supervise(launcher)
    except EOFError:
        guard.strike()
        sys.exit("the launcher is gone")
    lines = script.errors.last_lines() if code else []
    for relay in script.relays:
        if not (code and relay is script.errors):
            relay.show(until=math.inf)
    launcher.tell(code=code, lines=lines)
    launcher.leave()


if __name__ == "__main__":
    main()
