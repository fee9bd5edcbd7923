"""Runs of the training scripts in forks of a process that has their imports behind it: seconds instead of a minute.

`Nursery` starts this file as that process and asks it for forks. Torch must never compute in it: threads do not survive
a fork.
"""

import contextlib
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHARING = {"zero1": "ds_zero1_config", "zero2": "ds_zero2_config", "zero3": "llama2_ds_zero3_config"}


def write_configs(folder: Path) -> dict[str, Path]:
    """DeepSpeed's files in fp32; without the threshold the weights of small models would stay whole under ZeRO-3."""
    paths = {}
    for name, config in SHARING.items():
        content = json.loads((ROOT / "configs" / f"{config}.json").read_text())
        content["bf16"]["enabled"] = False
        if content["zero_optimization"]["stage"] == 3:
            content["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        paths[name] = folder / f"{name}.json"
        paths[name].write_text(json.dumps(content))
    return paths


class Nursery:
    """The process that forks runs."""

    def __init__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], env=environment, **pipes)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Run:
    """The ranks of one run; `log` has what they said. `before` is a function of tests/faults.py to call first."""

    def __init__(self, nursery: Nursery, folder: Path, script: str, flags: list, ranks: int = 1, before: str = ""):
        self.nursery, self.log = nursery, folder / f"log-{time.monotonic_ns()}.txt"
        port = 0
        if ranks > 1:
            with socket.create_server(("127.0.0.1", 0)) as server:
                port = server.getsockname()[1]
        flags = [str(flag) for flag in flags]
        asked = {"folder": str(folder), "script": script, "flags": flags, "before": before, "log": str(self.log)}
        self.pids = nursery.ask(**asked, ranks=ranks, port=port)

    def codes(self) -> list[int | None]:
        """Exit codes by rank, -n where signal n has killed one; None where one still runs."""
        return self.nursery.ask(poll=self.pids)

    def runs(self) -> bool:
        return None in self.codes()

    def wait(self, timeout: float = 300) -> list[int]:
        deadline = time.monotonic() + timeout
        while self.runs():
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise TimeoutError(self.said())
            time.sleep(0.02)
        return self.codes()

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def signal(self, number: int, rank: int | None = None) -> None:
        for pid in self.pids if rank is None else [self.pids[rank]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill_in_save(self, output: Path, number: int, rng: random.Random, timeout: float = 300) -> bool:
        """SIGKILL while the `number`-th checkpoint is being written; False where it was too quick."""
        deadline, seen, last = time.monotonic() + timeout, 0, None
        while time.monotonic() < deadline:
            found = next(iter(output.glob("unfinished-checkpoint-*")), None)
            if found is not None and found.name != last:
                seen, last = seen + 1, found.name
                if seen == number:
                    time.sleep(rng.uniform(0, 0.05))
                    hit = found.exists()
                    self.signal(signal.SIGKILL)
                    self.wait()
                    return hit
            elif found is None and not self.runs():
                break
            time.sleep(0.0005)
        return False


# ---------------------------------------------------------------- the process that forks


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what imports print is no answer
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    import deepspeed  # noqa: F401

    import dpo  # noqa: F401
    import sft  # noqa: F401

    codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            for pid in [pid for pid in request["poll"] if pid not in codes]:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer = [codes.get(pid) for pid in request["poll"]]
        else:
            answer = [fork(request, rank) for rank in range(request["ranks"])]
            for pid in answer:
                codes.pop(pid, None)  # of an earlier run: numbers come again
        answers.write(json.dumps(answer) + "\n")


def fork(request: dict, rank: int) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        variables = {"OMP_NUM_THREADS": 1}
        if request["ranks"] > 1:
            variables |= {"WORLD_SIZE": request["ranks"], "LOCAL_WORLD_SIZE": request["ranks"], "RANK": rank}
            variables |= {"LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": request["port"]}
        os.environ.update({name: str(value) for name, value in variables.items()})
        output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        os.chdir(request["folder"])
        sys.argv = [request["script"], *request["flags"]]
        from align.cli import run_script

        if request["before"]:
            getattr(importlib.import_module("faults"), request["before"])()
        run_script(importlib.import_module(request["script"].removesuffix(".py")).main)
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
