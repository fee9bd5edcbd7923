"""The life and death of one run's ranks, from the engine's start to the exit code."""

import hmac
import json
import math
import os
import queue
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from align.cli import lost_reader
from align.launch.engines import Run, clean_environment
from align.launch.nodes import address_for, node_command
from align.launch.rank import LIBC, PASSED_ON, notice_lost_host

FAILURE_GRACE = 5.0  # seconds that the other ranks have to end after one has failed
ENGINE_GRACE = 5.0  # seconds that an engine has to end after its ranks
FROZEN = 1.0  # seconds between two looks at the ranks, which else are a tenth apart

PR_SET_PDEATHSIG = 1


def become_engine(parent: int, is_patient: bool) -> None:
    """Ends with its launcher, and leaves signals to it.

    Slurm signals all processes of a job: an engine that is not patient hears none of the signals that ranks hear from
    gaudi_spawn.py, as it would kill them after 30 s, whatever their grace period is.
    """
    if not is_patient:
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    die_with(parent)


def die_with(parent: int) -> None:
    """Makes the kernel kill this process when its parent ends, however that ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it already has
        os.kill(os.getpid(), signal.SIGKILL)


def say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone; the ranks still have their grace period
        print(f"gaudi_spawn: {text}", file=sys.stderr, flush=True)


def shell_code(returncode: int) -> int:
    """The exit code as a shell gives it: 128 + n for a process that signal n has killed."""
    return returncode if returncode >= 0 else 128 - returncode


def relay_terminal(target: int) -> None:
    """Passes on what is typed while this process is in the foreground; in the background reading would stop it."""
    with suppress(OSError):
        while True:
            if os.tcgetpgrp(0) == os.getpgrp() and select.select([0], [], [], 0.2)[0]:
                if not (typed := os.read(0, 1 << 16)):
                    break
                os.write(target, typed)
            else:
                time.sleep(0.2)
    os.close(target)


class Rank:
    """The launcher's end of one rank's connection; `align/launch/rank.py` describes the messages."""

    def __init__(self, connection: socket.socket, number: int, host: str):
        self.connection, self.number, self.host = connection, number, host
        self.ended = False

    def __str__(self) -> str:
        return f"rank {self.number} on {self.host}"

    def tell(self, **message) -> None:
        with suppress(OSError):  # that it has gone comes as an event
            self.connection.sendall(json.dumps(message).encode() + b"\n")


class Supervisor:
    """Handles what happens to a run, one event after the other.

    The first event that spells its end (a rank failed or was lost, an engine died, somebody sent a signal) sets the
    exit code and is reported; what follows from it is not. Events come from signal handlers and a thread for each rank.
    """

    def __init__(self, run: Run, master_port: int):
        self.run = run
        self.work = {
            "script": run.script,
            "directory": os.getcwd(),
            "master_addr": run.master_addr,
            "master_port": master_port,
            "tag_output": run.tag_output,
        }
        self.key = secrets.token_hex(16)
        self.events: queue.SimpleQueue = queue.SimpleQueue()  # whose `put` is safe in a signal handler
        self.engines: dict[str, subprocess.Popen] = {}
        self.ranks: dict[int, Rank] = {}
        self.alive_at = math.inf  # when a rank last did something
        self.looked_at = math.inf  # when that was last looked at
        self.finished: list[Rank] = []  # whose scripts have ended well
        self.started = False  # the scripts start when all ranks are there
        self.code: int | None = None
        self.coming = 0  # a signal that a rank got first
        self.steps: list[tuple[float, Callable[[], None]]] = []  # when to do what, once the end has begun

    def supervise(self, commands: dict[str, list[str]]) -> int:
        """Runs the engine commands (host -> command) and returns the exit code of the whole."""
        for number in PASSED_ON:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # which is nohup's doing
                signal.signal(number, lambda number, _: self.events.put((self.on_signal, number)))
        address = address_for(list(self.run.nodes)) if self.run.over_ssh else "127.0.0.1"
        with socket.create_server((address, 0), backlog=self.run.world_size) as server:
            variables = {"GAUDI_SPAWN": f"{address}:{server.getsockname()[1]}:{self.key}"}
            try:
                for host, command in commands.items():
                    self.engines[host] = self.start_engine(host, command, variables)
                threading.Thread(target=self.accept, args=[server], daemon=True).start()
                while self.ranks or any(engine.poll() is None for engine in self.engines.values()):
                    self.step()
            finally:
                self.kill_engines()
        return self.code or 0

    def start_engine(self, host: str, command: list[str], variables: dict[str, str]) -> subprocess.Popen:
        """Starts one in a session of its own: Ctrl-C reaches the ranks from here, once, and the engine not at all."""
        # Open MPI asks a terminal only where it is in the foreground, which in a session of its own it never is.
        relays_terminal = self.run.engine.reaches_nodes and sys.stdin is not None and sys.stdin.isatty()
        process: Any = subprocess.Popen(
            node_command(host) if self.run.starts_over_ssh else command,
            env=clean_environment(os.environ | self.run.exports) | variables,
            stdin=subprocess.PIPE if self.run.starts_over_ssh or relays_terminal else None,
            start_new_session=True,
            preexec_fn=partial(become_engine, os.getpid(), self.run.engine.is_patient),  # noqa: PLW1509 - no thread runs yet
        )
        if self.run.starts_over_ssh:
            request = {"environment": self.run.exports | variables, "directory": os.getcwd(), "command": command}
            with suppress(BrokenPipeError), process.stdin as stdin:  # its exit code will tell
                stdin.write(json.dumps(request).encode())
        elif relays_terminal:
            threading.Thread(target=relay_terminal, args=[process.stdin.fileno()], daemon=True).start()
        return process

    def accept(self, server: socket.socket) -> None:
        with suppress(OSError):  # closed when the run is over
            while True:
                threading.Thread(target=self.listen, args=[server.accept()[0]], daemon=True).start()

    def listen(self, connection: socket.socket) -> None:
        """Turns what a rank says into events. Ignores who does not begin with the key."""
        notice_lost_host(connection)
        with connection, connection.makefile("r") as lines, suppress(OSError, ValueError, KeyError, TypeError):
            hello = json.loads(lines.readline())
            if not hmac.compare_digest(hello["key"], self.key):
                return
            rank = Rank(connection, hello["rank"], hello["host"])
            self.events.put((self.on_join, rank))
            try:
                for line in lines:
                    message = json.loads(line)
                    if "code" in message:
                        self.events.put((self.on_end, rank, message["code"], message["lines"]))
                    elif "alive" in message:
                        self.events.put((self.on_alive,))
                    else:
                        self.events.put((self.on_signal, message["signal"], rank))
            finally:
                self.events.put((self.on_leave, rank))

    def step(self) -> None:
        """Handles the next event; in between looks at the engines, which end after their ranks' last messages."""
        try:
            handle, *details = self.events.get(timeout=0.1)
        except queue.Empty:
            self.look_at_engines()
            self.look_at_the_pulse()
            self.look_at_the_output()
        else:
            handle(*details)
        while self.steps and self.steps[0][0] <= time.monotonic():
            self.steps.pop(0)[1]()

    def on_join(self, rank: Rank) -> None:
        self.ranks[rank.number] = rank
        if self.code is not None:
            rank.tell(signal=signal.SIGKILL)
        elif len(self.ranks) == self.run.world_size:
            self.started = True
            self.on_alive()
            self.tell_ranks(work=self.work)

    def on_end(self, rank: Rank, returncode: int, lines: list[str]) -> None:
        rank.ended = True
        self.on_alive()
        if not returncode:
            self.finished.append(rank)
        if returncode and self.code is None:
            code = shell_code(returncode)
            how = f"was killed by {signal.Signals(-returncode).name}" if returncode < 0 else "failed"
            say("\n".join([f"{rank} {how} (exit code {code}){':' if lines else ''}", *lines]))
            self.end(code, signal.SIGTERM, FAILURE_GRACE)

    def on_leave(self, rank: Rank) -> None:
        self.ranks.pop(rank.number, None)
        if not rank.ended and self.code is None:
            say(f"{rank} is gone without a word: killed, or its host was lost")
            self.end(128 + signal.SIGKILL, signal.SIGTERM, FAILURE_GRACE)
        if not self.ranks:
            self.steps = [(time.monotonic() + ENGINE_GRACE, self.kill_engines)]

    def on_signal(self, number: int, rank: Rank | None = None) -> None:
        """`rank`, where given, got the signal instead of this process, from its engine for example."""
        if self.code is None:
            patience = f"the ranks have {self.run.grace_period:g} s to finish" if self.started else "no rank had begun"
            say(f"{signal.Signals(number).name}{f' at {rank}' if rank else ''}: {patience}")
            self.coming = number if rank else 0
            self.end(128 + number, number, self.run.grace_period)
        elif rank is None and number == self.coming:  # sent to all processes at once, as by Slurm
            self.coming = 0
        elif rank is None:
            say(f"{signal.Signals(number).name} while the run ends: not waiting any longer")
            self.end(self.code, signal.SIGKILL, 0)

    def look_at_engines(self) -> None:
        """An engine that ends before its ranks has failed."""
        codes = [engine.poll() for engine in self.engines.values()]
        if self.code is None and (self.ranks or not self.started) and (None not in codes or any(codes)):
            code = next((shell_code(code) for code in codes if code), 1)
            when = "before its ranks did" if self.started else "before all ranks had started"
            say(f"{self.run.engine.name} ended {when} (exit code {code})")
            self.end(code, signal.SIGTERM, FAILURE_GRACE)

    def on_alive(self) -> None:
        self.alive_at = time.monotonic()

    def look_at_the_pulse(self) -> None:
        """Ends a run whose ranks all do nothing: they wait for each other, or for one that has ended or is frozen.

        Not where this process was frozen, and with it perhaps all: by Ctrl-Z, or with its container.
        """
        limit, now = self.run.stall_timeout, time.monotonic()
        if now - self.looked_at > FROZEN:
            self.on_alive()
        self.looked_at = now
        if self.code is None and self.ranks and limit and now - self.alive_at > limit:
            ended = f"; {', '.join(map(str, self.finished))} had ended" if self.finished else ""
            say(
                f"no rank has computed, read or written anything for {limit:g} s: they wait for each other{ended}. "
                "--stall_timeout 0 waits for ever"
            )
            self.end(1, signal.SIGTERM, FAILURE_GRACE)

    def look_at_the_output(self) -> None:
        """Open MPI stops reading from its ranks when nobody reads from it, and does not say so: they would wait on.

        Ranks of other engines write to the same pipe themselves, and fail.
        """
        if self.code is None and self.ranks and self.run.engine.relays_output and lost_reader():
            say("nobody reads standard output any more")
            self.end(128 + signal.SIGPIPE, signal.SIGTERM, FAILURE_GRACE)

    def end(self, code: int, number: int, grace: float) -> None:
        """Begins the end: signal `number` for the ranks, SIGKILL when their grace is over, and then for the engines."""
        self.code = code
        self.tell_ranks(signal=number)
        kill_time = time.monotonic() + (grace if self.started else 0)
        self.steps = [(kill_time, self.kill_ranks), (kill_time + ENGINE_GRACE, self.kill_engines)]

    def tell_ranks(self, **message) -> None:
        for rank in self.ranks.values():
            rank.tell(**message)

    def kill_ranks(self) -> None:
        if self.started and self.ranks:
            say(f"killing {', '.join(map(str, self.ranks.values()))}")
        self.tell_ranks(signal=signal.SIGKILL)
        if self.started:
            return  # the engines end by themselves
        if not self.run.engine.is_patient:  # which hears no other signal
            self.kill_engines()
            return
        for engine in self.engines.values():
            engine.terminate()

    def kill_engines(self) -> None:
        for engine in self.engines.values():
            if engine.poll() is None:
                os.killpg(engine.pid, signal.SIGKILL)
                engine.wait()
        self.ranks.clear()
