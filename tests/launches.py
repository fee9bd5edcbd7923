"""Real launches of small scripts. All processes of one are found by a variable that they inherit."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from conftest import ROOT

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under `nohup make test` launches would inherit that it is ignored

ENGINES = {"mpi": ["--use_mpi"], "torch": [], "deepspeed": ["--use_deepspeed"]}

# What the scripts of these tests begin with: `note(name)` leaves a file behind for the test to see.
SCRIPT_START = """
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path
rank = int(os.environ.get("RANK", 0))
def note(name, content=""):
    path = Path(os.environ["PT_NOTES"], f"{name}.{rank}")
    new = path.with_name(f"new {path.name}")
    new.write_text(content)
    new.rename(path)
"""

# A script that finishes its work when it is told to end.
SAVES = """
def save(number, _):
    subprocess.run(["sleep", "2"])
    note("saved", signal.Signals(number).name)
    sys.exit(0)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, save)
note("up")
while True: time.sleep(1)"""


class Launch:
    """One run of gaudi_spawn.py. `body` is the script, `prefix` a command that runs the launcher elsewhere.

    A variable that is None is not set.
    """

    def __init__(self, folder: Path, flags: list, body: str, arguments: list = (), prefix: list = (), **variables):
        self.notes = folder / uuid.uuid4().hex
        self.notes.mkdir()
        script = self.notes / "script.py"
        script.write_text(SCRIPT_START + body)
        self.mark = f"PT_NOTES={self.notes}".encode()
        self.began = time.monotonic()
        environment = os.environ | {"PT_NOTES": str(self.notes), "OMP_NUM_THREADS": "1"} | variables
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(ROOT / "gaudi_spawn.py"), *map(str, flags), str(script), *arguments],
            env={name: value for name, value in environment.items() if value is not None},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self, timeout: float = 120) -> tuple[int, str, str]:
        """Returns exit code, standard output and standard error."""
        output = self.process.communicate(timeout=timeout)
        return self.process.returncode, *output

    def noted(self, name: str) -> dict[int, str]:
        """The notes of that name by rank."""
        return {int(path.suffix[1:]): path.read_text() for path in self.notes.glob(f"{name}.[0-9]*")}

    def wait_for(self, name: str, ranks: int, timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while len(self.noted(name)) < ranks:
            assert time.monotonic() < deadline, f"{self.noted(name)} of {ranks} ranks noted {name} in {timeout} s"
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)

    def processes(self) -> dict[int, list[str]]:
        """Command lines of all live processes that this launch has started, the launcher among them."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and self.mark in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_text().split("\0")
        return found

    def scripts(self) -> list[int]:
        """Process ids of the script's ranks."""
        script = str(self.notes / "script.py")
        return [pid for pid, command in self.processes().items() if command[1:3] == ["-u", script]]

    def assert_all_gone(self, within: float = 10) -> None:
        deadline = time.monotonic() + within
        while left := self.processes():
            assert time.monotonic() < deadline, f"left behind after {within} s: {left}"
            time.sleep(0.05)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()
