"""Forks of run_generation.py in place of ranks that import for seconds each, where hundreds of launches are wanted.

`ASK` is the script that a launch starts: it hands its arguments, variables, folder and streams to the process of this
file, which forks. The fork runs run_generation.py and then ends as any interpreter does; the script ends with its code.
Torch must never compute in the process that forks: threads do not survive that.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "run_generation.py")

ASK = """
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(os.environ["PT_WARM"])
    asked = {"arguments": sys.argv[1:], "variables": dict(os.environ), "folder": os.getcwd()}
    socket.send_fds(connection, [b"."], [0, 1, 2])
    connection.sendall(json.dumps(asked).encode() + b"\\n")
    answers = connection.makefile()
    pid = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, lambda n, _: os.kill(pid, n))
    sys.exit(int(answers.readline()))"""


@contextlib.contextmanager
def warm_ranks(folder: Path):
    """Yields the variables that scripts with the body `ASK` need."""
    address = folder / "warm"
    with subprocess.Popen(
        [sys.executable, __file__, str(address)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        if "ready\n" not in process.stdout:  # after what imports print
            raise RuntimeError("the process that forks did not start")
        try:
            yield {"PT_WARM": str(address)}
        finally:
            process.kill()


def serve(address: str) -> dict:
    """Returns only in a fork: what it is to be, {"arguments", "variables", "folder"}, on the streams of who asked."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for watchers
    with socket.create_server(address, family=socket.AF_UNIX, backlog=100) as server:
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            with connection, connection.makefile() as lines:
                streams = socket.recv_fds(connection, 1, 3)[1]
                asked = json.loads(lines.readline())
                if os.fork() == 0 and not watch_fork(connection):
                    for number, stream in enumerate(streams):
                        os.dup2(stream, number)
                    return asked
            for stream in streams:
                os.close(stream)


def watch_fork(connection: socket.socket) -> bool:
    """False in a fork of this process, which itself tells the fork's number and exit code and ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (pid := os.fork()) == 0:
        return False
    with contextlib.suppress(OSError):  # who asked is gone
        connection.sendall(f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.sendall(f"{code if code >= 0 else 128 - code}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    import deepspeed  # noqa: F401
    import optimum.habana.checkpoint_utils
    import optimum.habana.transformers.modeling_utils  # noqa: F401

    import align.generation.probing  # noqa: F401
    import habana_frameworks.torch.hpu  # noqa: F401
    import run_generation  # noqa: F401

    rank = serve(sys.argv[1])
    os.environ.clear()
    os.environ.update(rank["variables"])
    os.chdir(rank["folder"])
    sys.argv = [SCRIPT, *rank["arguments"]]
    runpy.run_path(SCRIPT, run_name="__main__")
