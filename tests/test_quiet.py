"""What a user reads on the terminal. Run: pytest tests/test_quiet.py"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_rows
from tiny import save_model

from align.quiet import quiet_imports
from align.upstream_fixes import adapt_transformers

ROOT = Path(__file__).parent.parent
CHATTER = ("hl-smi", "Multiple distributions", "experimental", "HPU fused kernel", "CTCLoss", "ds_accelerator")


def terminal(script, *flags):
    """Standard output and the lines of standard error, in a process of its own: imports happen once a process."""
    command = [sys.executable, ROOT / script, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def training():
    save_model(Path("model"))
    write_rows("data/train.jsonl", [{"prompt": f"What is {n}?", "completion": " A number."} for n in range(8)])
    flags = ["--model_name_or_path", "model", "--dataset_name", "data", "--output_dir", "out", "--do_train"]
    return [*flags, "--max_steps", 2, "--logging_steps", 1, "--max_seq_length", 64]


def test_the_first_line_of_training_is_ours_and_nothing_foreign_is_on_standard_output(training):
    flags = ["--world_size", 2, "--use_mpi", ROOT / "sft.py", *training, "--bf16"]
    out, told = terminal("gaudi_spawn.py", *flags, "--deepspeed", ROOT / "configs" / "llama2_ds_zero3_config.json")
    assert told.startswith("INFO the chat template")
    assert not [words for words in CHATTER if words in out + told]
    assert out.startswith("step 1/2")


def test_generation_with_beams_prints_the_text_and_nothing_else():
    adapt_transformers()  # before transformers' Auto classes have seen, and remembered, a Mixtral of its own
    save_model(Path("model"), "mixtral")
    flags = ["--model_name_or_path", "model", "--prompt", "hello", "--max_new_tokens", 2, "--num_beams", 2]
    out, told = terminal("run_generation.py", *flags)
    assert out.startswith("hello")
    assert out.count("\n") == 2
    assert not [words for words in CHATTER if words in told]


def import_what_fails():
    with quiet_imports():
        print("why it fails")
        import nowhere_to_be_found  # noqa: F401


def test_control_c_while_libraries_are_imported_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended, quiet_imports():
        raise KeyboardInterrupt

    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith(": SIGINT: stopped\n")


def test_what_a_failed_import_has_said_is_shown(capsys):
    with pytest.raises(ModuleNotFoundError):
        import_what_fails()
    assert capsys.readouterr().err == "why it fails\n"


@pytest.mark.parametrize("flags", [["--log_level", "debug"], ["--log-level=debug"]])
def test_debugging_shows_what_libraries_say_on_standard_error(flags, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sft.py", *flags])
    with quiet_imports():
        print("what the library found")
    assert capsys.readouterr() == ("", "what the library found\n")


def test_the_line_of_a_step_is_rounded_and_the_log_is_whole(training, run):
    shown = run("sft.py", *training).out.splitlines()
    entry = json.loads(Path("out/trainer_state.json").read_text())["log_history"][0]
    assert shown[0] == f"step 1/2: loss {entry['loss']:.4f}, learning rate 5e-05, epoch 1.00"
    assert entry["loss"] != round(entry["loss"], 4)
    assert sum("max_memory_allocated" in line for line in shown) == 1


def test_the_line_of_a_preference_step_shows_margin_and_accuracy(run):
    save_model(Path("model"))
    rows = [{"prompt": f"What is {n}?", "chosen": " A number.", "rejected": " No idea."} for n in range(8)]
    write_rows("pairs/train.jsonl", rows)
    flags = ["--model_name_or_path", "model", "--dataset_name", "pairs", "--subset", "", "--eval_strategy", "no"]
    shown = run("dpo.py", *flags, "--output_dir", "out", "--max_steps", 1, "--logging_steps", 1).out
    assert shown.startswith("step 1/1: loss 0.6931, margin 0.0000, accuracy 0.000, ")
