"""gaudi_spawn.py on one host, with the real engines. Run: pytest tests/test_gaudi_spawn.py"""

import contextlib
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from launches import ENGINES, SAVES, Launch

import gaudi_spawn
from align.errors import InputError
from align.launch import engines, nodes, supervision
from align.launch.nodes import describe

each_engine = pytest.mark.parametrize("engine", ENGINES)


def make_strings(count: int) -> list[str]:
    """Arguments that shells and parsers are known to change, and random ones made of their special characters."""
    known = [
        "",
        " ",
        "--",
        "-",
        ":",
        "--world_size",
        "--world_size=3",
        "-h",
        "x;id",
        "`id`",
        "$(id)",
        "$HOME",
        "~",
        "*",
    ]
    known += [
        'say "hi"',
        "it's",
        "a\tb",
        "a\nb",
        "\\",
        "#",
        "a # b",
        ".*(q|v)_proj",
        "{a,b}",
        "!!",
        "%n",
        "ä 漢 🙂",
        "@x",
    ]
    random.seed(0)
    alphabet = "ab \t\n'\"\\$`*?[]{}()<>|&;#~!%^=:,@-+äß漢🙂"
    return known + ["".join(random.choices(alphabet, k=random.randint(0, 20))) for _ in range(count - len(known))]


# What a rank of torchrun or mpirun, a Slurm job of one task and a Kubeflow pod have around them
OUTER = {"RANK": "7", "WORLD_SIZE": "16", "LOCAL_SIZE": "9", "GROUP_RANK": "3", "ROLE_RANK": "7", "PET_NNODES": "5"}
OUTER |= {"TORCHELASTIC_RUN_ID": "outer", "PET_NPROC_PER_NODE": "3", "PET_RDZV_ENDPOINT": "nowhere:1"}
OUTER |= {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "6", "OMPI_MCA_ess": "pmi", "PMI_RANK": "5"}
OUTER |= {"PMIX_NAMESPACE": "outer", "PMIX_RANK": "5", "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile"}
OUTER |= {"MV2_COMM_WORLD_RANK": "5", "MPI_LOCALRANKID": "5", "MPI_LOCALNRANKS": "6", "NODE_RANK": "3"}
OUTER |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "fp16", "FSDP_VERSION": "2"}
OUTER |= {"SLURM_JOBID": "9", "SLURM_JOB_ID": "9", "SLURM_NODELIST": "node-a", "SLURM_JOB_NODELIST": "node-a"}
OUTER |= {"SLURM_TASKS_PER_NODE": "1", "SLURM_NPROCS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1"}


@pytest.fixture(scope="module", params=ENGINES)
def reports(request, tmp_path_factory):
    """What the script saw in each of four ranks, more than small hosts have cores, of one launch for each engine."""
    body = "note('seen', json.dumps(dict(arguments=sys.argv[1:], environment={**os.environ}, stdin=sys.stdin.read())))"
    flags, variables = ["--world_size", 4, *ENGINES[request.param]], OUTER | {"OMP_NUM_THREADS": None}
    with Launch(tmp_path_factory.mktemp("reports"), flags, body, make_strings(500), **variables) as launch:
        launch.process.stdin.write("for rank 0")
        assert launch.wait() == (0, "", "")
        return {rank: json.loads(text) for rank, text in launch.noted("seen").items()}


def test_500_arguments_arrive_unchanged_in_every_rank(reports):
    assert len(reports) == 4
    for report in reports.values():
        assert report["arguments"] == make_strings(500)


def test_every_rank_knows_its_place(reports):
    for rank, report in reports.items():
        environment = report["environment"]
        assert (environment["RANK"], environment["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"]) == ("4", "4")
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert "GAUDI_SPAWN" not in environment
        left = OUTER.items() & environment.items()
        assert {name for name, _ in left if not name.startswith("SLURM_")} == set()
    assert len({report["environment"]["MASTER_PORT"] for report in reports.values()}) == 1


def test_ranks_share_the_cores(reports):
    threads = {report["environment"]["OMP_NUM_THREADS"] for report in reports.values()}
    assert threads == {str(nodes.count_threads(4))}
    assert 4 * nodes.count_threads(4) <= max(4, len(os.sched_getaffinity(0)))


def test_standard_input_is_rank_0s(reports):
    assert [reports[rank]["stdin"] for rank in range(4)] == ["for rank 0", "", "", ""]


@each_engine
def test_only_lines_of_other_ranks_are_tagged(engine, tmp_path):
    body = "os.write(1, b'out %d\\n' % rank); os.write(2, b'err %d\\n' % rank)"
    with Launch(tmp_path, ["--world_size", 2, "--tag_output", *ENGINES[engine]], body) as launch:
        code, output, errors = launch.wait()
    assert code == 0
    assert sorted(output.splitlines()) == ["[rank 1] out 1", "out 0"]
    assert {"[rank 1] err 1", "err 0"} <= set(errors.splitlines())


def test_lines_of_megabytes_are_tagged_without_being_read_again_and_again(tmp_path):
    body = "if rank: print('x' * 20_000_000)"
    with Launch(tmp_path, ["--world_size", 2, "--tag_output", "--use_mpi"], body) as launch:
        code, output, _ = launch.wait(timeout=60)
    assert (code, len(output)) == (0, len("[rank 1] ") + 20_000_000 + 1)


FREEZES = {
    "ends": "if rank == 0: sys.exit(0)",
    "is stopped": "if rank == 0: os.kill(os.getpid(), signal.SIGSTOP)",
    "waits as well": "",
}


@pytest.mark.parametrize("freeze", FREEZES.values(), ids=FREEZES)
def test_a_run_in_which_nothing_happens_any_more_is_ended(freeze, tmp_path):
    body = f"{freeze}\nsignal.sigtimedwait([signal.SIGUSR2], 600)"
    with Launch(tmp_path, ["--world_size", 2, "--use_mpi", "--stall_timeout", 6], body) as launch:
        code, _, errors = launch.wait(timeout=60)
        launch.assert_all_gone()
    assert code == 1
    assert "no rank has computed, read or written anything for 6 s" in errors
    assert ("had ended" in errors) == ("exit" in freeze)


def test_ranks_that_compute_may_do_so_for_longer_than_others(tmp_path):
    body = "end = time.monotonic() + 14\nwhile rank and time.monotonic() < end: pass"
    with Launch(tmp_path, ["--world_size", 2, "--use_mpi", "--stall_timeout", 6], body) as launch:
        assert launch.wait()[0] == 0


def test_a_launcher_that_was_frozen_does_not_hold_it_against_its_ranks(tmp_path, monkeypatch):
    """Ctrl-Z and a paused container freeze the ranks as well."""
    run = gaudi_spawn.plan_run(gaudi_spawn.parse_arguments(["--world_size", "2", __file__]))
    watched = supervision.Supervisor(run, 1)
    watched.ranks[0] = supervision.Rank(socket.socket(), 0, "here")
    now = [1000.0]
    monkeypatch.setattr(supervision.time, "monotonic", lambda: now[0])
    watched.on_alive()

    def look_after(seconds):
        now[0] += seconds
        watched.look_at_the_pulse()
        return watched.code

    assert [look_after(0.1), look_after(3600), look_after(0.1)] == [None, None, None]
    assert [look_after(0.5) for _ in range(121)][-1] == 1, "a minute of looks without a sign of life"


def test_streams_that_a_shell_has_closed_are_no_failure(tmp_path):
    (tmp_path / "script.py").write_text("import os; print('done', flush=True) if os.environ['RANK'] == '0' else None")
    command = f"{sys.executable} {ROOT}/gaudi_spawn.py --world_size 2 --use_mpi {tmp_path}/script.py"

    ended = [
        subprocess.run(f"{command} {closed}", shell=True, capture_output=True, text=True, check=False)
        for closed in ("<&- 2>&-", ">&-")
    ]

    assert [(each.returncode, each.stdout, each.stderr) for each in ended] == [(0, "done\n", ""), (0, "", "")]


@pytest.mark.parametrize("engine", ["mpi", "torch"])
def test_a_run_ends_when_nobody_reads_its_output_any_more(engine, tmp_path):
    body = "for number in range(100_000): print('line', number, '-' * 50)"
    with Launch(tmp_path, ["--world_size", 2, *ENGINES[engine]], body) as launch:
        assert launch.process.stdout.readline().startswith("line")
        launch.process.stdout.close()
        launch.process.stdout = None  # nothing is left to wait for
        code, _, errors = launch.wait(timeout=40)
        launch.assert_all_gone()
    assert (code, "nobody reads standard output any more" in errors, "BrokenPipeError" in errors) in {
        (141, True, False),
        (1, False, True),
    }


def test_rank_0_may_ask_its_user_under_open_mpi(tmp_path):
    body = "if rank == 0: note('answer', input('name? ')); print('thanks')"
    answer = "import os, pty, sys\n"
    answer += "sent = []\ndef read(fd):\n    data = os.read(fd, 1024)\n"
    answer += "    if b'name?' in data and not sent: sent.append(os.write(fd, b'Ada\\n'))\n    return data\n"
    answer += "sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:], read)))"
    prefix = [sys.executable, "-c", answer]
    with Launch(tmp_path, ["--world_size", 2, "--use_mpi"], body, prefix=prefix) as launch:
        assert launch.wait()[0] == 0
        assert launch.noted("answer") == {0: "Ada"}


def test_rank_0_is_heard_at_once_even_within_a_line(tmp_path):
    body = "print('half a line', end='', file=sys.stderr)\nif rank == 0: time.sleep(60)\ntime.sleep(60)"
    with Launch(tmp_path, ["--world_size", 2, "--use_mpi"], body) as launch:
        assert launch.process.stderr.read(len("half a line")) == "half a line"
        assert launch.process.poll() is None


# Failures


@each_engine
def test_the_first_failure_alone_is_told_and_its_exit_code_returned(engine, tmp_path):
    body = """
note("up")
while len(list(Path(os.environ["PT_NOTES"]).glob("up.[0-9]"))) < 2: time.sleep(0.01)
for own_session in (False, True):
    subprocess.Popen(["sleep", "300"], start_new_session=own_session)  # a child that would outlive its rank
def consequence(*_): raise RuntimeError("a consequence")
signal.signal(signal.SIGTERM, consequence)
if rank == 1:
    import traceback
    try: raise RuntimeError("the " + "reason")
    except RuntimeError: traceback.print_exc()
    os._exit(7)
time.sleep(300)"""
    with Launch(tmp_path, ["--world_size", 2, *ENGINES[engine]], body) as launch:
        launch.wait_for("up", 2)
        failed = time.monotonic()
        code, _, errors = launch.wait()
        assert code == 7
        assert time.monotonic() - failed < 10
        assert errors.count("RuntimeError: the reason") == 1
        assert errors.count(f"rank 1 on {socket.gethostname()} failed (exit code 7):\n") == 1
        assert "a consequence" not in errors
        launch.assert_all_gone()


@pytest.mark.parametrize("engine", ["mpi", "torch"])
def test_a_chained_exception_is_told_from_its_cause_on(engine, tmp_path):
    body = """
def even(depth): return odd(depth - 1)
def odd(depth): return even(depth - 1) if depth > 0 else fail()
def fail():
    try: raise KeyError("the " + "cause")
    except KeyError as error: raise RuntimeError("the " + "consequence") from error
even(40)"""
    with Launch(tmp_path, ["--world_size", 2, *ENGINES[engine]], body) as launch:
        code, _, errors = launch.wait()
    assert code == 1
    assert errors.count("KeyError: 'the cause'") == 1
    assert errors.count("RuntimeError: the consequence") == 1


def test_of_very_long_last_words_the_head_and_the_tail_are_told(tmp_path):
    body = "sys.exit('Traceback (most recent call last):\\n' + '\\n'.join(f'line {i}' for i in range(1, 1000)))"
    with Launch(tmp_path, ["--world_size", 2, "--use_mpi"], body) as launch:
        _, _, errors = launch.wait()
    told = errors[errors.index("Traceback") :].splitlines()
    assert told[198:202] == ["line 198", "line 199", "[... lines left out: 600 ...]", "line 800"]
    assert told[400] == "line 999"


def test_what_goes_on_for_too_long_to_be_last_words_is_shown(tmp_path):
    body = "print('Traceback (most recent call last):' + '\\n' * 20_000, file=sys.stderr); time.sleep(300)"
    with Launch(tmp_path, ["--world_size", 2, "--use_mpi"], body) as launch:
        began = time.monotonic()
        assert launch.process.stderr.readline() == "Traceback (most recent call last):\n"
        assert time.monotonic() - began < 20


def test_wrong_input_that_every_rank_finds_is_told_once(tmp_path):
    body = "print('script.py: error: --flag x: give y', file=sys.stderr); sys.exit(2)"
    with Launch(tmp_path, ["--world_size", 4, "--use_mpi"], body) as launch:
        code, _, errors = launch.wait()
    assert code == 2
    assert errors.count("script.py: error: --flag x: give y") == 1


def test_who_does_not_know_the_runs_key_cannot_end_it(tmp_path):
    with Launch(
        tmp_path, ["--world_size", 2, "--use_mpi"], 'note("up")\nwhile not Path("go").exists(): time.sleep(0.05)'
    ) as launch:
        launch.wait_for("up", 2)
        environment = b"\0".join(Path(f"/proc/{pid}/environ").read_bytes() for pid in launch.processes())
        host, port, _ = re.search(rb"GAUDI_SPAWN=([^\0]+)", environment)[1].decode().split(":")
        for hello in ({"key": "guessed", "rank": 0, "host": "x"}, {"rank": 0, "host": "x"}):
            with socket.create_connection((host, int(port))) as connection:
                lines = [hello, {"code": 1, "lines": ["made up"]}, {"signal": 15}]
                connection.sendall("".join(json.dumps(line) + "\n" for line in lines).encode())
                with contextlib.suppress(ConnectionError):
                    assert connection.recv(1) == b""  # it hangs up
        Path("go").touch()

        code, _, errors = launch.wait()

    assert (code, errors) == (0, "")


def test_a_caught_traceback_is_shown_too(tmp_path):
    body = "import logging\ntry: 1 / 0\nexcept ZeroDivisionError: logging.exception('caught')"
    with Launch(tmp_path, ["--world_size", 2, "--use_mpi"], body) as launch:
        code, _, errors = launch.wait()
    assert code == 0
    assert errors.count("ZeroDivisionError: division by zero") == 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_rank_killed_by_a_signal_gives_128_plus_its_number(number, tmp_path):
    with Launch(tmp_path, ["--world_size", 2, "--use_mpi"], "note('up'); time.sleep(300)") as launch:
        launch.wait_for("up", 2)
        os.kill(launch.scripts()[0], number)
        code, _, errors = launch.wait()
    assert code == 128 + number
    assert f"was killed by {number.name}" in errors


def test_a_killed_supervisor_of_a_rank_takes_its_script_and_children_along(tmp_path):
    body = "subprocess.Popen(['sleep', '300']); note('up', str(os.getppid())); time.sleep(300)"
    with Launch(tmp_path, ["--world_size", 2, "--use_mpi"], body) as launch:
        launch.wait_for("up", 2)
        os.kill(int(launch.noted("up")[1]), signal.SIGKILL)
        code, _, errors = launch.wait()
        assert code == 137
        assert "rank 1" in errors
        launch.assert_all_gone()


def test_a_process_of_another_user_is_named_and_not_waited_for():
    code = """
import os, subprocess, time
from align.launch import rank
guard, child, kill = rank.Guard(), subprocess.Popen(["sleep", "300"]), os.kill
def refuse(*_): raise PermissionError  # as the kernel does where `sudo` has started it
os.kill, began = refuse, time.monotonic()
guard.strike()
print(child.pid, time.monotonic() - began)
kill(child.pid, 9)"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    pid, took = ended.stdout.split()
    assert ended.stderr == f"gaudi_spawn: processes of another user, which the script started, go on: {pid}\n"
    assert float(took) < 1


# Signals


@pytest.mark.parametrize(
    ("engine", "number"), [("mpi", signal.SIGHUP), ("torch", signal.SIGINT), ("deepspeed", signal.SIGTERM)]
)
def test_a_signal_to_the_launcher_alone_lets_every_rank_save(engine, number, tmp_path):
    with Launch(tmp_path, ["--world_size", 2, *ENGINES[engine]], SAVES) as launch:
        launch.wait_for("up", 2)
        launch.process.send_signal(number)
        code, _, _ = launch.wait()
        assert code == 128 + number
        assert launch.noted("saved") == {0: number.name, 1: number.name}
        launch.assert_all_gone()


@each_engine
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_at_once_lets_every_rank_save(engine, number, tmp_path):
    """As Slurm sends it. The launcher took its own for a second one, and engines killed their ranks."""
    body = SAVES.replace("signal.SIGHUP)", "signal.SIGUSR1)")
    with Launch(tmp_path, ["--world_size", 2, *ENGINES[engine]], body) as launch:
        launch.wait_for("up", 2)
        for pid in sorted(launch.processes(), reverse=True):  # the launcher comes last
            os.kill(pid, number)
        code, _, errors = launch.wait()
        assert (code, "not waiting" in errors, "Traceback" in errors) == (128 + number, False, False), errors
        assert launch.noted("saved") == {0: number.name, 1: number.name}
        launch.assert_all_gone()


def test_control_c_on_a_terminal_reaches_every_rank_once(tmp_path):
    body = """
heard = []
signal.signal(signal.SIGINT, lambda *_: heard.append(1))
note("up")
while not heard: time.sleep(0.1)
time.sleep(1)
note("heard", str(len(heard)))"""
    terminal = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    with Launch(tmp_path, ["--world_size", 2, "--use_mpi"], body, prefix=[sys.executable, "-c", terminal]) as launch:
        launch.wait_for("up", 2)
        launch.process.stdin.write("\x03")
        launch.process.stdin.flush()
        launch.wait_for("heard", 2)
        assert launch.wait()[0] == 130
        assert launch.noted("heard") == {0: "1", 1: "1"}


def test_ranks_that_do_not_end_in_the_grace_period_are_killed(tmp_path):
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN); note('up'); time.sleep(300)"
    with Launch(tmp_path, ["--world_size", 2, "--use_mpi", "--grace_period", 1], body) as launch:
        launch.wait_for("up", 2)
        launch.process.terminate()
        begin = time.monotonic()
        code, _, errors = launch.wait()
        assert code == 143
        assert 1 < time.monotonic() - begin < 10
        assert re.search("killing rank . on .*, rank . on ", errors)
        launch.assert_all_gone()


def test_a_second_interrupt_kills_at_once(tmp_path):
    body = "signal.signal(signal.SIGINT, lambda *_: note('heard')); note('up')\nwhile True: time.sleep(1)"
    with Launch(tmp_path, ["--world_size", 2, "--use_mpi"], body) as launch:
        launch.wait_for("up", 2)
        launch.process.send_signal(signal.SIGINT)
        launch.wait_for("heard", 2)
        launch.process.send_signal(signal.SIGINT)
        code, _, _ = launch.wait(timeout=20)
        assert code == 130
        launch.assert_all_gone()


@each_engine
@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(3, 23))])
def test_a_kill_leaves_no_process_and_the_right_exit_code(engine, seed, tmp_path):
    """Kills a rank, or the launcher gently or not, at any time from the start to a second after ranks are up."""
    how = ["rank", "launcher, gently", "launcher"][seed % 3]
    with Launch(tmp_path, ["--world_size", 2, *ENGINES[engine]], "note('up'); time.sleep(300)") as launch:
        chance = random.Random(seed)
        if how == "rank":
            launch.wait_for("up", 2)
            time.sleep(chance.uniform(0, 1))
            os.kill(chance.choice(launch.scripts()), signal.SIGKILL)
            expected = 137
        else:
            time.sleep(chance.uniform(0.5, {"mpi": 1.5, "torch": 6, "deepspeed": 15}[engine]))
            number = signal.SIGTERM if how == "launcher, gently" else signal.SIGKILL
            launch.process.send_signal(number)
            expected = 128 + number
        code = launch.wait()[0]
        assert (code if code >= 0 else 128 - code) == expected  # as a shell shows it
        launch.assert_all_gone(within=20)


# One card


def test_one_card_runs_the_script_directly(tmp_path):
    body = "note('seen', json.dumps([os.getpid(), sys.argv[1:]])); sys.exit(5)"
    with Launch(tmp_path, ["--world_size", 1], body, ["--", "a b"]) as launch:
        code, _, _ = launch.wait()
        assert code == 5
        assert json.loads(launch.noted("seen")[0]) == [launch.process.pid, ["--", "a b"]]


def test_one_card_under_deepspeed_is_a_world_of_one_rank(tmp_path):
    body = "note('seen', os.environ['WORLD_SIZE'] + os.environ['LOCAL_RANK'] + os.environ['MASTER_ADDR'])"
    with Launch(tmp_path, ["--use_deepspeed"], body) as launch:
        assert launch.wait()[0] == 0
        assert launch.noted("seen") == {0: "10127.0.0.1"}


# What would run


def test_print_command_shows_what_would_run_and_no_secret(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PT_REGISTRY_PASSWORD", "hf_secret")
    monkeypatch.setenv("PT_HPU_LAZY_MODE", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "script.py").write_text("raise SystemExit('ran')")
    shown = run("gaudi_spawn.py", "--world_size", 2, "--use_mpi", "--print_command", "script.py", "a b").out
    assert f"OMP_NUM_THREADS={nodes.count_threads(2)}\n" in shown
    assert "PT_HPU_LAZY_MODE=1" in shown
    assert "HF_TOKEN=..." in shown
    assert "PT_REGISTRY_PASSWORD=..." in shown
    assert "hf_secret" not in shown
    assert re.search(r"mpirun -n 2 .* -u \S+/align/launch/rank.py\n", shown)
    assert f"{sys.executable} -u script.py 'a b'" in shown


@pytest.mark.parametrize("topology", ["pack:2 core:48 pu:2", "pack:1 core:2 pu:1", "pack:1 core:1 pu:8", "core:7 pu:1"])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_open_mpi_accepts_the_binding_on_any_host(topology, ranks):
    cores = math.prod(map(int, re.findall(r"(?:pack|core):(\d+)", topology)))
    run = engines.Run(engines.ENGINES["mpi"], ["x"], {"localhost": ranks}, False, {}, None, False, 60, 60)
    mpirun, *rest = run.engine.commands(run, 1, cores // ranks)["this host"]
    assert "PE=0" not in " ".join(rest)
    placed = subprocess.run(
        [mpirun, "--display-map", "--do-not-launch", *rest],
        env=os.environ | {"HWLOC_SYNTHETIC": topology, "HWLOC_THISSYSTEM": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert placed.returncode == 0, placed.stdout + placed.stderr
    assert placed.stdout.count("Process rank:") == ranks


def test_a_hostfile_may_have_comments_and_blank_lines(tmp_path):
    (tmp_path / "hosts").write_text("\ufeff# all of them\nnode-a slots=8\n\n  node-b   slots=4  # half\n")
    assert nodes.read_hostfile("hosts", "--hostfile") == {"node-a": 8, "node-b": 4}


# Wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "script"),
        ("nope.py", "no script nope.py"),
        ("--bogus script.py", "--bogus"),
        ("--world_size two script.py", "--world_size.*two"),
        ("--world_size 0 script.py", "--world_size: got 0; give 1 to 65536"),
        ("--world_size=-1 script.py", "--world_size: got -1; give 1"),
        ("--world_size 5 script.py", "5 ranks are more than the 4 Gaudi cards of this host; lower --world_size"),
        ("--use_mpi --use_deepspeed script.py", "--use_deepspeed and --use_mpi"),
        ("--master_port 70000 --world_size 2 script.py", "--master_port: got 70000; give 1 to 65535"),
        ("--grace_period=-1 script.py", "--grace_period: got -1; give 0 to"),
        ("--export NOT_SET script.py", "--export NOT_SET"),
        ("--hostfile missing script.py", "--hostfile missing cannot be read"),
        ("--hostfile twice script.py", "--hostfile twice, line 2: node-a"),
        ("--hostfile bad_slots script.py", "--hostfile bad_slots, line 1.*slots=many"),
        ("--hostfile option script.py", "--hostfile option, line 1"),
        ("--hostfile empty script.py", "--hostfile empty names no host"),
        ("--hostfile good --world_size 3 script.py", "--world_size 3.*8 slots"),
        ("--rehearse --rehearsal_dir good script.py", "--rehearsal_dir good is a file; name a folder"),
    ],
)
def test_wrong_input_is_one_line_and_starts_nothing(arguments, message, run, monkeypatch, tmp_path):
    monkeypatch.setenv("HABANA_EMULATOR_DEVICES", "4")
    (tmp_path / "script.py").write_text("raise SystemExit('ran')")
    (tmp_path / "twice").write_text("node-a slots=8\nnode-a slots=4\n")
    (tmp_path / "bad_slots").write_text("node-a slots=many\n")
    (tmp_path / "option").write_text("-oProxyCommand=id slots=1\n")
    (tmp_path / "empty").write_text("# nobody\n")
    (tmp_path / "good").write_text("node-a slots=8\n")
    monkeypatch.setattr(gaudi_spawn, "Supervisor", lambda *_: pytest.fail("ranks were started"))
    with pytest.raises(InputError, match=message) as error:
        run("gaudi_spawn.py", *arguments.split())
    assert "\n" not in str(error.value)


def test_a_number_of_emulated_cards_that_is_none_is_named(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HABANA_EMULATOR_DEVICES", "abc")
    (tmp_path / "script.py").touch()
    with pytest.raises(InputError, match="HABANA_EMULATOR_DEVICES: got 'abc'; give the number of cards"):
        run("gaudi_spawn.py", "--world_size", 2, "script.py")


def test_a_port_in_use_is_named(run, tmp_path):
    (tmp_path / "script.py").touch()
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} is in use; leave --master_port out"):
            run("gaudi_spawn.py", "--world_size", 2, "--master_port", port, "script.py")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_is_missing_is_named_with_its_package(engine, run, monkeypatch, tmp_path):
    (tmp_path / "script.py").touch()
    monkeypatch.setattr(engines.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="is not installed: .*pip install"):
        run("gaudi_spawn.py", "--world_size", 2, *ENGINES[engine], "script.py")


def test_a_script_that_cannot_be_read_is_named(run, monkeypatch, tmp_path):
    (tmp_path / "script.py").touch()
    monkeypatch.setattr(nodes.os, "access", lambda *_: False)  # root may read everything
    with pytest.raises(InputError, match=r"script script\.py cannot be read"):
        run("gaudi_spawn.py", "script.py")


def test_the_command_line_ends_with_exit_code_2_and_one_line(tmp_path):
    command = [sys.executable, gaudi_spawn.__file__, "--world_size", "0", "script.py"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "gaudi_spawn.py: error: --world_size: got 0; give 1 to 65536\n"


@pytest.mark.soak
@pytest.mark.timeout(12 * 3600)
@each_engine
def test_hundreds_of_launches_end_with_0(engine, tmp_path):
    """Of run_generation.py, whose end takes long: one of about 25 once ended otherwise, without a word.

    SOAK_LAUNCHES chooses another number.
    """
    from tiny import save_model  # whose imports the other tests do without
    from warm_ranks import ASK, warm_ranks

    model = save_model(tmp_path / "model")
    arguments = f"--model_name_or_path {model} --prompt Hello --max_new_tokens 4 --bf16 False".split()
    answers, failures = set(), []
    with warm_ranks(tmp_path) as variables:
        for number in range(int(os.environ.get("SOAK_LAUNCHES", "500"))):
            with Launch(tmp_path, ["--world_size", 2, *ENGINES[engine]], ASK, arguments, **variables) as launch:
                code, output, errors = launch.wait(300)
            answers.add(output)
            print(f"launch {number + 1}: exit code {code} after {time.monotonic() - launch.began:.0f} s", flush=True)
            if code or len(answers) > 1 or not output:
                failures.append((number, code, output, errors[-2000:]))
    assert failures == []


@pytest.mark.parametrize("flag", ["--token hf_secret", "--hub_token=hf_secret", "--hub-token hf_secret"])
def test_a_token_reaches_the_ranks_by_environment_and_is_in_no_command(flag, monkeypatch):
    open("script.py", "w").close()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_PRIVATE_THING", "hf_secret")
    args = ["--world_size", "2", "--use_mpi", "--print_command", "script.py", "--seed", "1", *flag.split()]
    run = gaudi_spawn.plan_run(gaudi_spawn.parse_arguments(args))
    assert run.script == ["script.py", "--seed", "1"]
    assert os.environ["HF_TOKEN"] == run.exports["HF_TOKEN"] == "hf_secret"
    assert "hf_secret" not in describe(run)


@pytest.mark.parametrize("words", [["--token"], ["--token="], ["--token", "--do_train"], ["--hub_token", "--token="]])
def test_a_flag_that_lacks_its_token_stays_for_the_script_to_refuse(words):
    assert nodes.take_token(["sft.py", *words]) == (["sft.py", *words], None)
