"""Nodes: what each must have before any rank starts, and how they are reached."""

import glob
import importlib.metadata
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from align.errors import InputError
from align.launch.engines import ENGINES, ROOT, SSH, Run
from align.launch.rank import PASSED_ON

EXPORTED_PREFIXES = ("PT_", "HABANA_", "DEEPSPEED_", "HCCL_", "HF_", "OMP_", "HL_")
EXPORTED_NAMES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")  # where the other nodes find python's tools and libraries
# Variables whose values may be shown; any other may hold a secret
HARMLESS = re.compile(
    r"(PT|HABANA|HCCL|HL|OMP)_\w+|DEEPSPEED_HPU_\w+|HF_(HOME|HUB_CACHE|HUB_OFFLINE|DATASETS_CACHE|DATASETS_OFFLINE)"
    r"|PATH|PYTHONPATH|LD_LIBRARY_PATH"
)
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|KEY", re.IGNORECASE)
TOKEN_FLAGS = ("--token", "--hub_token", "--hub-token", "--push_to_hub_token", "--push-to-hub-token")


def read_hostfile(path: str, flag: str) -> dict[str, int]:
    """Reads lines `host slots=8` of the file that `flag` names. Returns host -> slots, in the file's order.

    Blank lines and comments are fine.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)\s+slots=([1-9]\d*)", line)
        if match is None:
            raise InputError(f"{flag} {path}, line {number}: expected `host slots=8`, got `{line}`")
        if match[1] in hosts:
            raise InputError(f"{flag} {path}, line {number}: {match[1]} is there twice; give all its slots at once")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise InputError(f"{flag} {path} names no host; it needs lines like `host slots=8`")
    return hosts


def is_this_host(host: str) -> bool:
    with socket.socket() as probe, suppress(OSError):
        probe.bind((host, 0))
        return True
    return False


def count_cards() -> int:
    """Gaudi cards that this process may use; the emulator has as many as HABANA_EMULATOR_DEVICES says (default 8)."""
    with suppress(importlib.metadata.PackageNotFoundError):
        if importlib.metadata.version("habana-torch-plugin").endswith("+cpu"):
            cards = os.environ.get("HABANA_EMULATOR_DEVICES", "8")
            if not cards.isdecimal():
                raise InputError(f"HABANA_EMULATOR_DEVICES: got {cards!r}; give the number of cards of this host, as 8")
            return int(cards)
    if modules := os.environ.get("HABANA_VISIBLE_MODULES"):
        return len(modules.split(","))
    return len(glob.glob("/dev/accel/accel[0-9]*") or glob.glob("/dev/hl[0-9]*"))


def count_cores() -> int:
    """Physical cores to bind ranks to; 0 where this process is confined to some: its ranks then share these."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        if not siblings.exists():
            return 0
        cores.add(siblings.read_text())
    return len(cores) if len(os.sched_getaffinity(0)) == os.cpu_count() else 0


def count_threads(slots: int) -> int:
    """Threads of each of `slots` ranks that share the cores of this host."""
    return max(1, (count_cores() or len(os.sched_getaffinity(0))) // slots)


def choose_port(wanted: int | None) -> int:
    """A free TCP port, below the range that the kernel gives out, so that it is likely to stay free."""
    for port in [wanted] if wanted else random.sample(range(10000, 32768), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return port
    raise InputError(f"port {wanted} is in use; leave --master_port out and a free one is chosen")


def check_script(script: str) -> None:
    if not os.path.isfile(script):
        raise InputError(f"there is no script {script}; its path comes after the launcher's own flags")
    if not os.access(script, os.R_OK):
        raise InputError(f"script {script} cannot be read; check its permissions")


def inspect_node(engine: str, script: str, slots: int, asked_by: str, master_port: int | None) -> dict[str, int]:
    """Checks that this node has everything that ranks need. Returns a free port, the cores for binding, and threads."""
    check_script(script)
    if not ENGINES[engine].is_installed():
        raise InputError(f"{ENGINES[engine].name} is not installed: {ENGINES[engine].package}")
    if (cards := count_cards()) < slots:
        raise InputError(f"{slots} ranks are more than the {cards} Gaudi cards of this host; lower {asked_by}")
    return {"port": choose_port(master_port), "cores": count_cores(), "threads": count_threads(slots)}


def node_command(host: str) -> list[str]:
    """The command that runs `serve_request` on a node; all that it needs to know comes over its standard input."""
    return [*SSH, host, f"cd {shlex.quote(str(ROOT))} && exec {shlex.quote(sys.executable)} -m align.launch.nodes"]


def serve_request() -> None:
    """The other end of `node_command`: inspects this node or becomes its engine."""
    request = json.load(sys.stdin)
    os.environ.update(request["environment"])
    try:
        os.chdir(request["directory"])
        if "command" in request:
            signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # as `become_engine` does here
            os.execvp(request["command"][0], request["command"])
        print(json.dumps(inspect_node(**request["inspect"])))
    except (InputError, OSError) as error:
        print(json.dumps({"error": str(error)}))


def inspect_over_ssh(host: str, request: dict) -> dict[str, int]:
    asked = json.dumps(request)
    node = subprocess.run(node_command(host), input=asked, capture_output=True, text=True, check=False)
    said = [line for line in node.stderr.splitlines() if line.strip()] or ["no reason given"]
    if node.returncode == 255:
        raise InputError(f"host {host} cannot be reached: {said[-1]}; `ssh {host} true` must work without a password")
    if node.returncode != 0:
        raise InputError(f"host {host} needs this project and its python at the same place as here: {said[-1]}")
    answer = json.loads(node.stdout.splitlines()[-1])
    if "error" in answer:
        raise InputError(f"host {host}: {answer['error']}")
    return answer


def exported_variables(environment: Mapping[str, str], names: list[str]) -> dict[str, str]:
    """The variables of `environment` that ranks on other nodes get as well: the usual ones, and those of `names`."""
    names = [*names, *EXPORTED_NAMES]
    return {key: environment[key] for key in sorted(environment) if key.startswith(EXPORTED_PREFIXES) or key in names}


def inspect_nodes(run: Run) -> tuple[int, int, int]:
    """Checks every node before any rank starts. Returns the master port, and the cores and threads for each rank."""
    requests: dict[str, dict[str, Any]] = {
        host: {
            "engine": run.engine.key,
            "script": run.script[0],
            "slots": slots,
            "asked_by": "its slots in the hostfile" if run.over_ssh else "--world_size",
            "master_port": None,
        }
        for host, slots in run.nodes.items()
    }
    first, *_ = requests
    requests[first]["master_port"] = run.master_port
    if not run.over_ssh:
        answers = [inspect_node(**requests[first])]
    else:
        from concurrent.futures import ThreadPoolExecutor

        common = {"environment": run.exports, "directory": os.getcwd()}
        with ThreadPoolExecutor(len(requests)) as pool:
            asked = [(host, common | {"inspect": request}) for host, request in requests.items()]
            answers = list(pool.map(lambda pair: inspect_over_ssh(*pair), asked))
    cores = min(answer["cores"] // slots for answer, slots in zip(answers, run.nodes.values(), strict=True))
    return answers[0]["port"], cores, min(answer["threads"] for answer in answers)


def split_tokens(script: list[str]) -> tuple[list[str], list[str]]:
    """A command line without tokens for the hub, and the tokens. A flag without one stays, for its script to refuse."""
    kept, tokens = [], []
    words = list(script)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag in TOKEN_FLAGS and not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        if flag in TOKEN_FLAGS and value:
            tokens.append(value)
        else:
            kept.append(word)
    return kept, tokens


def take_token(script: list[str]) -> tuple[list[str], str | None]:
    """The script's command line without tokens, and the one that ranks get: a command line can be read by all users."""
    kept, tokens = split_tokens(script)
    if len(set(tokens)) > 1:
        raise InputError("--token and --hub_token differ: ranks get one token, by the variable HF_TOKEN; give one")
    return kept, tokens[0] if tokens else None


def _show_variable(name: str, value: str) -> str:
    is_harmless = HARMLESS.fullmatch(name) and not SECRET.search(name)
    return f"  {name}={shlex.quote(value) if is_harmless else '...'}"


def describe(run: Run) -> str:
    """What would run and where."""
    script = shlex.join([sys.executable, *([] if run.is_direct else ["-u"]), *run.script])
    if run.is_direct:
        return script
    how = " over ssh" if run.starts_over_ssh else ""
    cores, threads = count_cores() // max(run.nodes.values()), count_threads(max(run.nodes.values()))
    variables = {"OMP_NUM_THREADS": str(threads)} | run.exports
    lines = ["variables that reach every rank:"]
    lines += [_show_variable(name, value) for name, value in variables.items()]
    for host, command in run.engine.commands(run, choose_port(run.master_port), cores).items():
        lines += [f"on {host}{how}:", f"  {shlex.join(command)}"]
    lines += [f"ranks ({', '.join(f'{slots} on {host}' for host, slots in run.nodes.items())}), each:", f"  {script}"]
    return "\n".join(lines)


def address_for(hosts: list[str]) -> str:
    """The address of this machine at which all hosts can reach it."""
    addresses = []
    for host in hosts:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((host, 9))  # sends nothing, but makes the kernel choose a route
            except OSError as error:
                raise InputError(f"host {host} cannot be reached: {error.strerror}") from None
            addresses.append(probe.getsockname()[0])
    return next((address for address in addresses if not address.startswith("127.")), addresses[0])


if __name__ == "__main__":
    serve_request()
