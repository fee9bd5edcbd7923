"""One command line for all scripts. Run: pytest tests/test_cli.py"""

import errno
import importlib
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from describe_flags import describe, read_help

from align import __version__
from align.cli import blame, run_script
from align.errors import InputError, one_line
from align.training.flags import RARE

ROOT = Path(__file__).parent.parent
SCRIPTS = ["sft.py", "dpo.py", "merge_peft_adapter.py", "run_generation.py", "gaudi_spawn.py"]
TRAINERS = SCRIPTS[:2]


def shown(run_main, capsys):
    with pytest.raises(SystemExit) as ended:
        run_main()
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.fixture
def start(monkeypatch):
    """`start(script, *words)` calls its main with that command line."""

    def start(script, *words):
        monkeypatch.setattr("sys.argv", [script, *words])
        importlib.import_module(script.removesuffix(".py")).main()

    return start


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_says_its_version(script, start, capsys):
    assert shown(lambda: start(script, "--version"), capsys).endswith(f"{script} {__version__}\n")
    assert f'\nversion = "{__version__}"\n' in (ROOT / "pyproject.toml").read_text()


def test_run_generation_reads_its_command_line_before_models_are_imported():
    code = "import run_generation, sys; print({'transformers', 'torch', 'habana_frameworks'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


NEAR = {
    "sft.py": ("--learning_rat", "--learning_rate"),
    "dpo.py": ("--betta", "--beta"),
    "merge_peft_adapter.py": ("--output-nam", "--output_name"),
    "run_generation.py": ("--max_new_token", "--max_new_tokens"),
    "gaudi_spawn.py": ("--use_deepspeeed", "--use_deepspeed"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_near_flag_is_suggested_by_all(script, start):
    wrong, right = NEAR[script]
    rest = {"merge_peft_adapter.py": ["--adapter_model_name", "a", "--output_name", "b"]}.get(script, [])
    rest = ["sft.py"] if script == "gaudi_spawn.py" else rest
    with pytest.raises(InputError, match=f"unknown argument '{wrong}'; did you mean {right}?"):
        start(script, *rest[:0], wrong, *rest)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_value_is_one_line_that_names_the_flag(script, start):
    flag = {"merge_peft_adapter.py": "--output_name", "gaudi_spawn.py": "--hostfile"}.get(script, "--seed")
    with pytest.raises(InputError, match=rf"^{flag}: expected one argument \(--help lists the flags\)$"):
        start(script, flag)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_name_or_token_without_a_letter_is_one_line_that_names_the_flag(script, start):
    flags = {"merge_peft_adapter.py": ["push_to_hub"], "gaudi_spawn.py": ["hostfile"]}.get(script)
    flags = flags or ["token", "model_revision" if script == "run_generation.py" else "hub_token"]
    flags += ["resume_from_checkpoint", "logging_dir", "hub_model_id"] if script in TRAINERS else []
    for flag in flags:
        kind = "token" if flag.endswith("token") else "name"
        for words in ([f"--{flag}="], [f"--{flag}", ""], [f"--{flag.replace('_', '-')}", " "]):
            with pytest.raises(InputError, match=rf"^--{flag}: is empty; give a {kind}, or leave it out$"):
                start(script, *words)


@pytest.mark.parametrize("script", SCRIPTS[:-1])
def test_a_name_that_is_not_utf_8_is_one_line_that_names_the_flag(script, start):
    """Else a tokenizer ends in a traceback when the first checkpoint is saved."""
    flag = "--output_name" if script == "merge_peft_adapter.py" else "--output_dir"
    message = f"^{flag}: got caf\ufffd, which is not UTF-8; give it as text, or another name$"
    with pytest.raises(InputError, match=message):
        start(script, f"{flag}=caf\udce9")


def test_dashes_do_as_well_as_underscores(start):
    for script, words, message in (
        ("sft.py", ["--do-train", "--learning-rate", "-1"], "learning_rate: got -1"),
        ("merge_peft_adapter.py", ["--adapter-model-name", "nowhere", "--output-name", "out"], "nowhere"),
        ("gaudi_spawn.py", ["--world-size", "0", "sft.py"], "--world_size: got 0"),
        ("run_generation.py", ["--model-name-or-path", "nowhere", "--max-new-tokens", "0"], "max_new_tokens: got 0"),
    ):
        with pytest.raises(InputError, match=message):
            start(script, *words)


@pytest.mark.parametrize("script", SCRIPTS)
def test_booleans_take_the_same_words_in_all_scripts(script, start, capsys):
    """The error that ends each command shows what was understood."""
    words, switch, on, off = {
        "sft.py": (["--output_dir", "out"], "do_eval", "--model_name_or_path: missing", "nothing to do"),
        "dpo.py": (["--eval_strategy", "no"], "do_train", "--model_name_or_path: missing", "nothing to do"),
        "merge_peft_adapter.py": (
            ["--adapter_model_name", "nowhere", "--output_name", "out"],
            *("verify", "nowhere", "nowhere"),
        ),
        "run_generation.py": (
            ["--reuse_cache", "--model_name_or_path", "nowhere", "--prompt", "x"],
            *("use_kv_cache", "nowhere", "contradicts --use_kv_cache False"),
        ),
        "gaudi_spawn.py": (["--use_deepspeed"], "use_mpi", "exclude each other", "there is no script nowhere.py"),
    }[script]
    script_words = ["nowhere.py"] if script == "gaudi_spawn.py" else []
    for value, message in [
        *((word, on) for word in ("true", "yes", "TRUE", "y", "1")),
        *((word, off) for word in "0fn"),
    ]:
        for given in ([f"--{switch}", value], [f"--{switch.replace('_', '-')}={value}"]):
            with pytest.raises(InputError, match=message):
                start(script, *words, *given, *script_words)
    for given, message in ((f"--{switch}", on), (f"--no_{switch}", off), (f"--no-{switch.replace('_', '-')}", off)):
        with pytest.raises(InputError, match=message):
            start(script, *words, given, *script_words)
    with pytest.raises(InputError, match=f"^--{switch}: got 'maybe'; give True or False"):
        start(script, *words, f"--{switch}=maybe", *script_words)


@pytest.mark.parametrize("script", TRAINERS)
def test_help_is_short_and_grouped_and_help_all_is_whole(script, start, capsys):
    short = shown(lambda: start(script, "--help"), capsys)
    assert len(short.splitlines()) < 85
    assert len(re.findall(r"^  --", short, re.MULTILINE)) > 55
    for group in ("Model", "LoRA", "Data", "Batches", "Optimisation", "Gaudi"):
        assert f"\n{group}:\n" in short
    assert "--learning_rate X" in short
    assert "--neftune_noise_alpha" not in short
    assert "--neftune_noise_alpha" in shown(lambda: start(script, "--help_all"), capsys)


def test_the_page_of_flags_is_what_its_command_writes():
    assert (ROOT / "docs" / "flags.md").read_text() == describe(), "run `make flags`"


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_flag_of_the_help_says_what_it_does_and_some_test_gives_it(script):
    groups = read_help(script)
    own = {flag.name for title, flags in groups.items() if title != "Help" for flag in flags}
    assert all(flag.text for flags in groups.values() for flag in flags)
    if script in TRAINERS:
        own |= {f"--{name}" for name in RARE} & {flag.name for flag in read_help(script, "--help_all")["Others"]}
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    given = {flag for flag in own if re.search(rf"{flag}\b|\b{flag[2:]}=|\"{flag[2:]}\":", tests)}
    assert own - given == set()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("", "OSError"),
        ("\n first  line \n more", "first line"),
        ("it fails:\n\n\tsize mismatch\nmore", "it fails: size mismatch"),
    ],
)
def test_a_page_of_another_librarys_error_is_told_in_one_line(said, told):
    assert one_line(OSError(said)) == told


@pytest.mark.parametrize("value", ["", "0", "no", "out"])
@pytest.mark.parametrize("said", ["steps: {} is too few", "{} is wrong", "it wants: {}", "a 'way {}' of it"])
def test_no_flag_is_blamed_for_a_word_that_may_be_anothers(value, said):
    error = ValueError(said.format(value))

    assert blame(error, ["--run_name", value, "--deepspeed", "file"], ()) is None
    assert blame(ValueError("no 'file'"), ["--run_name", value, "--deepspeed", "file"], ()).startswith(
        "--deepspeed: got"
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_is_one_line_and_exit_code_3(number, capsys):
    def write():
        raise OSError(number, "why", "out/answers")

    with pytest.raises(SystemExit) as ended:
        run_script(write)

    assert ended.value.code == 3
    assert capsys.readouterr().err.endswith("error: out/answers: why\n")


def test_a_token_behind_a_flag_that_was_misspelt_is_in_no_line(capsys):
    def fail():
        raise InputError("unknown argument '--tokn=hf_abcdefghijKLMNOP'; did you mean --token?")

    with pytest.raises(SystemExit):
        run_script(fail)

    assert "unknown argument '--tokn=hf_...'; did you mean --token?" in capsys.readouterr().err


def test_another_pipe_that_breaks_keeps_its_traceback():
    def fail():
        raise BrokenPipeError(errno.EPIPE, "of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        run_script(fail)


def test_a_reader_that_leaves_is_one_line_and_the_exit_code_of_a_broken_pipe():
    talks = "from align.cli import run_script; run_script(lambda: [print('word', flush=True) for _ in range(10**6)])"
    process = subprocess.Popen(
        [sys.executable, "-c", talks], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "word\n"
    process.stdout.close()

    assert process.stderr.read() == "-c: nobody reads standard output any more: stopped\n"
    assert process.wait() == 128 + signal.SIGPIPE
