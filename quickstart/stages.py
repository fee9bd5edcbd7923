"""Runs the scripts one after the other in a folder of their own, and remembers what is done: for `make quickstart` and
`make demo`."""

import hashlib
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align import __version__, output
from align.errors import InputError
from align.whole import write_file

ROOT = Path(__file__).parent.parent
MARK = ".stages"  # in a folder that stages write to; it holds whose they are


def claim_folder(folder: Path, what: str) -> None:
    """Makes `folder` one of `what`, as "demo". Raises `InputError` where it is not, or another run is in it."""
    output.check_writable(folder, "--folder")
    is_used, mark = any(path.name != output.LOCK for path in folder.iterdir()), folder / MARK
    if is_used and not (mark.exists() and mark.read_text(encoding="utf-8") in (what, "")):
        raise InputError(f"--folder: {folder} holds something else; name a new folder")
    output.lock(folder, "--folder")
    mark.write_text(what, encoding="utf-8")


def together(command: Sequence[Any]) -> list[str]:
    """The command, for a process that ends with this one, even where that is killed.

    The new process asks for that itself: this one has threads, and a fork of it would run between them.
    """
    start = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from align.launch.supervision import die_with; "
        "die_with(int(sys.argv[1])); os.execv(sys.argv[2], sys.argv[2:])"
    )
    return [sys.executable, "-c", start, str(os.getpid()), *map(str, command)]


def run_command(what: str, command: Sequence[str]) -> None:
    """Runs a script; the terminal sees it, its progress and its errors. It ends with this process, however that ends.

    `what` begins the line of an error, as in "demo: fine-tune".
    """
    # The emulator then does not tell the card's tensors from the host's, which takes as long as a small model's step
    environment = {"HABANA_EMULATOR_STRICT": "0", **os.environ}
    words = together([sys.executable, ROOT / command[0], *command[1:]])
    ended = subprocess.run(words, env=environment, check=False)
    if ended.returncode < 0:
        name = signal.Signals(-ended.returncode).name
        sys.exit(f"{what} was ended by {name}" + ("; is the memory full?" if name == "SIGKILL" else ""))
    if ended.returncode:
        sys.exit(f"{what} failed with exit code {ended.returncode}; its last lines above say why")


def peak_gb() -> float:
    """The most memory that one process had, of this one and those that it started, in GB (10^9 bytes)."""
    whom = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in whom) * 1024 / 1e9


@dataclass(frozen=True)
class Stage:
    """A script's command, which reads the file `reads` beside what earlier stages made, and makes the folder `writes`.

    With `resumes` a stage that was killed goes on by --resume; else it begins again.
    """

    name: str
    command: list[str]
    writes: Path
    reads: Path | None = None
    resumes: bool = False


def read_rows(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:  # `splitlines` knows ten more ends of a line
        return [json.loads(line) for line in lines]


class Progress:
    """What is done in a folder: a stage that an earlier run has finished, with the same command and input, is kept."""

    def __init__(self, folder: Path, what: str):
        """`what` begins the line of an error, as in "demo"."""
        self.path, self.what = folder / "stages.json", what
        self.done: dict[str, dict[str, Any]] = {}  # by the folder that a stage makes; one that was begun has no seconds
        self.kept: list[dict[str, Any]] = []
        if self.path.exists():
            try:
                self.done = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError:
                raise InputError(f"--folder: {self.path} is damaged; remove it, and all stages run again") from None

    def run(self, stages: Sequence[Stage]) -> None:
        """Runs stages of which each starts from what the one before has made: from the first that is not done."""
        for number, stage in enumerate(stages):
            read = stage.reads.read_bytes() if stage.reads else b""
            begun = {"version": __version__, "command": stage.command, "input": hashlib.sha256(read).hexdigest()}
            entry = self.done.get(str(stage.writes), {})
            is_same = stage.writes.exists() and begun.items() <= entry.items()
            if is_same and "seconds" in entry:
                print(f"\n\033[1m[{stage.name}] kept from an earlier run:\033[0m {stage.writes}", flush=True)
                self.kept.append(entry)
                continue
            for later in stages[number:]:
                self.done.pop(str(later.writes), None)
            self._note(stage, begun)
            command = stage.command
            if is_same and stage.resumes:
                command = [*command, "--resume"]
            else:
                shutil.rmtree(stage.writes, ignore_errors=True)
            print(f"\n\033[1m[{stage.name}] python {shlex.join(command)}\033[0m", flush=True)
            start = time.perf_counter()
            run_command(f"{self.what}: {stage.name}", command)
            seconds = round(time.perf_counter() - start, 1)
            self._note(stage, begun | {"seconds": seconds, "peak_gb": round(peak_gb(), 2)})

    def _note(self, stage: Stage, entry: dict[str, Any]) -> None:
        self.done[str(stage.writes)] = entry
        write_file(self.path, json.dumps(self.done, indent=2) + "\n")
