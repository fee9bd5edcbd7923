"""gaudi_spawn.py on two nodes: two network namespaces with hosts' names of their own, where the machine allows it,
else two loopback addresses. Only the transport of ssh is a stand-in. Run: pytest tests/test_gaudi_spawn_nodes.py"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT
from launches import ENGINES, SAVES, SCRIPT_START, Launch

engines = pytest.mark.parametrize("engine", ENGINES)
ARGUMENTS = ["two words; $HOME", ":", "", "`id`", 'say "hi"', "it's", "a\nb", "*", "#", "--", "漢"]

# Like sshd it gives a login's bare environment, joins the words and hands them to a shell that outlives this client.
SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do [ "$1" = -o ] && shift; shift; done
host=$1; shift
printf '%s\\n' "$*" >> LOG
case $host in
CASES*) echo "ssh: connect to host $host port 22: No route to host" >&2; exit 255;;
esac
cat | setsid --wait $enter env -i HOME="$HOME" PATH=/usr/bin:/bin sh -c "$*"
"""

# Runs a command on a node: in its network, under its name.
ENTER = """#!/bin/sh
exec ip netns exec {namespace} unshare --uts sh -c 'hostname $0 && exec "$@"' {host} "$@"
"""


@dataclass
class Nodes:
    hosts: dict[str, list[str]]  # address -> the command that runs another one on that node
    folder: Path

    def __post_init__(self):
        self.log = self.folder / "ssh.log"
        cases = "".join(f"{address}) enter='{' '.join(enter)}';;\n" for address, enter in self.hosts.items())
        ssh = self.folder / "bin" / "ssh"
        ssh.parent.mkdir()
        ssh.write_text(SSH.replace("LOG", str(self.log)).replace("CASES", cases))
        ssh.chmod(0o755)
        first, second = self.hosts
        self.hostfile = self.folder / "hosts"
        self.hostfile.write_text(f"# two nodes\n{first} slots=2\n\n{second} slots=1  # the small one\n")

    def launch(self, engine: str, flags: list, body: str, arguments: list = (), **variables) -> Launch:
        """Launches three ranks, two of them on the first node, from there."""
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        flags = ["--hostfile", self.hostfile, *ENGINES[engine], *flags]
        return Launch(self.folder, flags, body, arguments, next(iter(self.hosts.values())), PATH=path, **variables)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    names = [f"spawn{os.getpid()}{letter}" for letter in "ab"]
    script = "set -e\nip netns add {0}; ip netns add {1}; ip link add {0} netns {0} type veth peer name {1} netns {1}\n"
    hosts = {}
    for number, name in enumerate(names, 1):
        script += f"ip -n {name} addr add 10.231.77.{number}/24 dev {name}\n"
        script += f"ip -n {name} link set {name} up; ip -n {name} link set lo up\n"
        enter = folder / name
        enter.write_text(ENTER.format(namespace=name, host=f"node-{number}"))
        enter.chmod(0o755)
        hosts[f"10.231.77.{number}"] = [str(enter)]
    built = subprocess.run(["sh", "-c", script.format(*names)], capture_output=True, check=False)
    yield Nodes(hosts if built.returncode == 0 else {"127.0.0.1": [], "127.0.0.2": []}, folder)
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@engines
def test_ranks_on_both_nodes_get_everything_and_end_when_one_crashes(engine, nodes):
    body = """
note("seen", json.dumps([sys.argv[1:], dict(os.environ), socket.gethostname()]))
while len(list(Path(os.environ["PT_NOTES"]).glob("seen.[0-9]"))) < 3: time.sleep(0.01)
if rank == 2: raise RuntimeError("the " + "reason")
time.sleep(300)"""
    variables = {"PT_ODD": 'a;b\n"c" $HOME', "HF_TOKEN": "hf_secret", "MINE": "1"}
    with nodes.launch(engine, ["--export", "MINE"], body, ARGUMENTS, **variables) as launch:
        launch.wait_for("seen", 3)
        crashed = time.monotonic()
        code, _, errors = launch.wait()
        launch.assert_all_gone()
        assert time.monotonic() - crashed < 10
        seen = {rank: json.loads(text) for rank, text in launch.noted("seen").items()}

    assert code == 1
    assert errors.count("RuntimeError: the reason") == 1
    assert errors.count(f"rank 2 on {seen[2][2]} failed") == 1
    for rank, (arguments, environment, _) in seen.items():
        assert arguments == ARGUMENTS
        assert variables.items() <= environment.items()
        assert environment["LOCAL_RANK"] == str(rank % 2)
        assert environment["LOCAL_WORLD_SIZE"] == ("1" if rank == 2 else "2")
        assert (environment["WORLD_SIZE"], environment["MASTER_ADDR"]) == ("3", next(iter(nodes.hosts)))
    assert "hf_secret" not in nodes.log.read_text()


@engines
def test_an_interrupt_lets_the_ranks_of_both_nodes_save(engine, nodes):
    with nodes.launch(engine, [], SAVES) as launch:
        launch.wait_for("up", 3)
        launch.process.send_signal(signal.SIGINT)
        code, _, _ = launch.wait()
        assert code == 130
        assert launch.noted("saved") == dict.fromkeys(range(3), "SIGINT")
        launch.assert_all_gone()


@pytest.mark.parametrize("engine", ["mpi", "torch"])
def test_a_killed_launcher_leaves_no_rank_on_either_node(engine, nodes):
    with nodes.launch(engine, [], "note('up'); time.sleep(300)") as launch:
        launch.wait_for("up", 3)
        launch.process.kill()
        launch.assert_all_gone()
        launch.wait(timeout=10)  # until nobody holds its output any more


def test_open_mpi_starts_on_this_host_wherever_it_stands_in_the_hostfile(nodes):
    first, second = nodes.hosts
    (nodes.folder / "turned").write_text(f"{second} slots=1\n{first} slots=2\n")
    body = "note('seen', os.environ['MASTER_ADDR'])"
    with nodes.launch("mpi", ["--hostfile", nodes.folder / "turned"], body) as launch:
        assert launch.wait()[0] == 0
        assert launch.noted("seen") == dict.fromkeys(range(3), first)


@engines
def test_an_unreachable_host_is_named_before_any_rank_starts(engine, nodes):
    (nodes.folder / "far").write_text(f"{next(iter(nodes.hosts))} slots=1\n10.231.77.9 slots=1\n")
    with nodes.launch(engine, ["--hostfile", nodes.folder / "far"], "note('up')") as launch:
        code, output, errors = launch.wait()
        assert (code, output, launch.noted("up")) == (2, "", {})
        assert errors.startswith("gaudi_spawn.py: error: host 10.231.77.9 cannot be reached")
        assert errors.count("\n") == 1


def test_a_node_with_too_few_cards_is_named(nodes):
    with nodes.launch("mpi", [], "note('up')", HABANA_EMULATOR_DEVICES="1") as launch:
        code, _, errors = launch.wait()
        assert (code, launch.noted("up")) == (2, {})
        host = next(iter(nodes.hosts))
        problem = "2 ranks are more than the 1 Gaudi cards of this host; lower its slots in the hostfile"
        assert errors == f"gaudi_spawn.py: error: host {host}: {problem}\n"


# Slurm's own commands: what they print and set, as far as the recipe sees it
SCONTROL = """#!/bin/sh
case $1 in
show) printf '%s\\n' {hosts};;
requeue) echo "$2" > requeued;;
esac
"""
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
export SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_TASKS_PER_NODE=1 SLURM_STEP_NODELIST=node-a
export PMI_RANK=0 PMI_SIZE=1 PMIX_RANK=0 PMIX_NAMESPACE=slurm.pmix.9.0
exec "$@"
"""
JOB = {"SLURM_JOB_ID": "9", "SLURM_JOBID": "9", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NODELIST": "node-[a-b]"}
JOB |= {"SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "2"}


def test_the_recipe_for_slurm_saves_and_is_queued_again(nodes, tmp_path):
    page = (ROOT / "docs" / "many-cards.md").read_text(encoding="utf-8")
    job = re.search(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", page, re.DOTALL)[1]
    (tmp_path / "sft.py").write_text(
        SCRIPT_START + SAVES.replace("sys.exit(0)", "sys.exit(128 + number)").replace("SIGHUP", "SIGUSR1")
    )
    (tmp_path / "gaudi_spawn.py").symlink_to(ROOT / "gaudi_spawn.py")
    (tmp_path / "job.sh").write_text(job.replace("slots=8", "slots=1"))
    tools = tmp_path / "tools"
    shutil.copytree(nodes.folder / "bin", tools)
    for name, text in (("scontrol", SCONTROL.replace("{hosts}", " ".join(nodes.hosts))), ("srun", SRUN)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    notes = tmp_path / "notes"
    notes.mkdir()
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    enter = next(iter(nodes.hosts.values()))
    variables = os.environ | JOB | {"PATH": path, "PT_NOTES": str(notes)}
    with subprocess.Popen(
        [*enter, "bash", "job.sh"], cwd=tmp_path, env=variables, stderr=subprocess.PIPE, text=True
    ) as run:
        deadline = time.monotonic() + 120
        while len(list(notes.glob("up.[01]"))) < 2:
            assert run.poll() is None, run.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        launcher = next(
            int(folder.name)
            for folder in Path("/proc").glob("[0-9]*")
            if b"gaudi_spawn.py" in (words := (folder / "cmdline").read_bytes())
            and b"hosts-9.txt" in words
            and b"python" in words[:60]
        )
        os.kill(launcher, signal.SIGUSR1)
        code = run.wait(timeout=60)

    assert code == 138
    assert {path.read_text() for path in notes.glob("saved.[01]")} == {"SIGUSR1"}
    assert (tmp_path / "requeued").read_text() == "9\n"


def test_the_environment_of_a_kubernetes_mpi_job_starts_the_ranks_of_its_hostfile(nodes):
    body = "note('seen', os.environ['LOCAL_RANK'])"
    operator = {"OMPI_MCA_orte_keep_fqdn_hostnames": "true", "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile"}
    operator |= {"OMPI_MCA_plm_rsh_agent": "ssh -o ConnectionAttempts=10", "K_MPI_JOB_ROLE": "launcher"}
    with nodes.launch("mpi", [], body, **operator) as launch:
        code, _, errors = launch.wait()
        assert code == 0, errors
        assert launch.noted("seen") == {0: "0", 1: "1", 2: "0"}
