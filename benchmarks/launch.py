"""From the command to the first training step: gaudi_spawn.py against optimum-habana's launcher, on each engine.

python benchmarks/launch.py                      some minutes on two quiet cores
python benchmarks/launch.py --ranks 4 --rounds 5

Both start the same script: one step of data-parallel training (DDP over hccl) of a single layer, so that the launcher
makes the difference. Rounds are interleaved, and the fastest counts: noise only slows. "script" is when the last rank's
script begins, "step" when its first step is done. Times are this host's; on a Gaudi each card adds its start to both.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _figures import add_json_flag, keep
from tqdm import trange

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import os, sys, time
began = time.time()
import torch
import habana_frameworks.torch.core
import habana_frameworks.torch.distributed.hccl
mpi = {name: os.environ.get(f"OMPI_COMM_WORLD_{name}") for name in ("RANK", "SIZE")}  # upstream leaves them to scripts
rank, size = int(mpi["RANK"] or os.environ["RANK"]), int(mpi["SIZE"] or os.environ["WORLD_SIZE"])
torch.distributed.init_process_group("hccl", rank=rank, world_size=size)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64).to("hpu"))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.ones(8, 64, device="hpu")).sum().backward()
optimizer.step()
with open(f"{sys.argv[1]}.{rank}", "w") as file:
    file.write(f"{began} {time.time()}")
"""
UPSTREAM = """
import sys
from optimum.habana.distributed import DistributedRunner
flags = {flag: True for flag in sys.argv[2].split()}
sys.exit(DistributedRunner([" ".join(sys.argv[3:])], world_size=int(sys.argv[1]), **flags).run())
"""
ENGINES = {"torch.distributed.run": "", "Open MPI": "use_mpi", "DeepSpeed": "use_deepspeed"}


def measure(command: list[str], ranks: int, folder: Path) -> tuple[float, float] | str:
    """Seconds to the last rank's start and to its first step, or how the launch failed."""
    began = time.time()
    for old in folder.glob("times.*"):
        old.unlink()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # upstream calls its engines by name
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, check=False)
    if ended.returncode != 0:
        return f"exit code {ended.returncode}"
    times = [map(float, file.read_text().split()) for file in folder.glob("times.*")]
    if len(times) != ranks:
        return f"{len(times)} of {ranks} ranks"
    return tuple(max(each) - began for each in zip(*times, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="ranks of each launch")
    parser.add_argument("--rounds", type=int, default=3, help="launches of each kind")
    add_json_flag(parser)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "step.py").write_text(SCRIPT)
        script = [str(folder / "step.py"), str(folder / "times")]
        launchers = {
            "ours": lambda flag: [
                str(ROOT / "gaudi_spawn.py"),
                f"--world_size={args.ranks}",
                *([f"--{flag}"] * bool(flag)),
            ],
            "upstream": lambda flag: ["-c", UPSTREAM, str(args.ranks), flag],
        }
        results = {(engine, launcher): [] for engine in ENGINES for launcher in launchers}
        for _ in trange(args.rounds, desc="launches", unit=" rounds", leave=False):
            for engine, launcher in results:
                command = [sys.executable, *launchers[launcher](ENGINES[engine]), *script]
                results[engine, launcher].append(measure(command, args.ranks, folder))

    print(f"{args.ranks} ranks, seconds from the command, best of {args.rounds}\n")
    print("| engine | launcher | script | step |\n|---|---|---|---|")
    for (engine, launcher), measured in results.items():
        worked = [each for each in measured if not isinstance(each, str)]
        best = (
            " | ".join(f"{min(column):.1f}" for column in zip(*worked, strict=True)) if worked else f"{measured[0]} | -"
        )
        print(f"| {engine} | {launcher} | {best} |")
    keep(args.json, [{"engine": engine, "launcher": way, "rounds": each} for (engine, way), each in results.items()])


if __name__ == "__main__":
    main()
