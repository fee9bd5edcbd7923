"""Runs that are interrupted and go on as if they were not. Run: pytest tests/test_resume.py"""

import dataclasses
import errno
import fcntl
import importlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_rows
from datasets import IterableDataset
from safetensors.torch import load_file
from test_dpo import make_rows
from tiny import save_model
from transformers import TrainerCallback

from align import cli
from align.data.loading import find_source
from align.errors import InputError, ResultError, Stopped
from align.training import checkpoints
from align.training.checkpoints import find_damage, identify_rows
from align.training.results import read_results
from align.training.supervised import SupervisedTrainer

COMMON = "--logging_steps 3 --disable_tqdm True --bf16 False --save_steps 2 --warmup_steps 0 --eval_strategy no".split()
COMMON += "--learning_rate 1e-2".split()
SCRIPTS = {
    "sft.py": "--do_train --max_steps 6 --max_seq_length 64 --per_device_train_batch_size 2",
    "dpo.py": "--max_steps 6 --max_prompt_length 48 --max_length 96 --gradient_accumulation_steps 2",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "questions.jsonl", make_rows(80))


@pytest.fixture
def train(run, model, questions):
    """`train("sft.py", flags, output=...)`; later flags win."""

    def train(script, *flags, output="out", **replaced):
        paths = {"--model_name_or_path": model, "--dataset_name": questions, "--output_dir": output}
        paths = [part for pair in paths.items() for part in pair]
        return run(script, *SCRIPTS[script].split(), *COMMON, *paths, *flags)

    return train


class StopAt(TrainerCallback):
    """Does something at the end of a step, or in the evaluation after it, as the machine would."""

    def __init__(self, step, what, event):
        self.step, self.what = step, what
        setattr(self, event, self.look)

    def look(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.what()


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(4, function)` calls it at the end of that step of the next run; `event` names another moment of it."""
    import transformers.trainer

    before = list(transformers.trainer.DEFAULT_CALLBACKS)

    def at_step(step, what, event="on_step_end"):
        callbacks = [*before, StopAt(step, what, event)]
        monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", callbacks)

    return at_step


class Killed(BaseException):
    """Ends a run as SIGKILL would, but for this process."""


def die():
    raise Killed


def weights(output="out"):
    name = next(name for name in ("adapter_model.safetensors", "model.safetensors") if Path(output, name).exists())
    return load_file(Path(output, name))


def assert_same_run(one, other):
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
    results = [json.loads(Path(output, "all_results.json").read_text()) for output in (one, other)]
    assert results[0]["train_loss"] == pytest.approx(results[1]["train_loss"], abs=1e-6)


def losses(output):
    history = json.loads(Path(output, "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


WAYS = {
    "sft packed": ("sft.py", []),
    "sft buckets": ("sft.py", ["--packing", "False", "--num_buckets", 3]),
    "sft stream": ("sft.py", ["--streaming", True, "--size_valid_set", 5]),
    "sft full": ("sft.py", ["--use_peft", False, "--learning_rate", "1e-3", "--do_eval", "--sample_prompts", 1]),
    "dpo": ("dpo.py", []),
    "dpo synced": (
        "dpo.py",
        ["--use_peft", False, "--sync_ref_model", "--ref_model_sync_steps", 2, "--learning_rate", "1e-3"],
    ),
}


@pytest.mark.parametrize(("script", "flags"), WAYS.values(), ids=WAYS)
def test_a_killed_run_resumes_to_the_weights_of_one_that_was_not(train, at_step, script, flags, capsys):
    train(script, *flags, output="whole")
    at_step(5, die)
    with pytest.raises(Killed):
        train(script, *flags, "--resume", "auto")
    at_step(0, die)
    capsys.readouterr()

    said = train(script, *flags, "--resume", "auto").out

    assert_same_run("out", "whole")
    assert losses("out") == losses("whole")
    assert "[before]" not in said, "the model has been trained for some steps"
    answers = [
        re.findall(r'class="said">([^<]*)<', Path(output, "report.html").read_text()) for output in ("out", "whole")
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) == (2 if "--sample_prompts" in flags else 0)


def test_a_finished_run_that_is_resumed_trains_nothing(train):
    train("sft.py")
    before = weights(), json.loads(Path("out/all_results.json").read_text())["train_loss"]

    for _ in range(2):
        train("sft.py", "--resume", "auto")

    assert sorted(path.name for path in Path("out").glob("*checkpoint*")) == [f"checkpoint-{n}" for n in (2, 4, 6)]
    assert json.loads(Path("out/all_results.json").read_text())["train_loss"] == pytest.approx(before[1], abs=1e-6)
    assert all(torch.equal(tensor, weights()[name]) for name, tensor in before[0].items())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, model, questions):
    """A run of each script that was stopped after step 4."""
    folder = tmp_path_factory.mktemp("stopped")
    for script, flags in SCRIPTS.items():
        paths = ["--model_name_or_path", str(model), "--dataset_name", str(questions)]
        arguments = [*flags.split(), *COMMON, "--max_steps", "4", *paths, "--output_dir", str(folder / script)]
        before, sys.argv = sys.argv, [script, *arguments]
        importlib.import_module(script.removesuffix(".py")).main()
        sys.argv = before
    return folder


OTHERS = {
    "seed": ("sft.py", ["--seed", 1], "--seed 42, this is 1"),
    "rank of the adapter": ("sft.py", ["--lora_r", 4], "--lora_r 8, this is 4"),
    "targets": ("sft.py", ["--lora_target_modules", "v_proj"], "--lora_target_modules None, this is ['v_proj']"),
    "all weights": ("sft.py", ["--use_peft", False], "--use_peft True, this is False"),
    "packing": ("sft.py", ["--packing", False], "--packing True, this is False"),
    "length": ("sft.py", ["--max_seq_length", 32], "another --dataset_name|--max_seq_length 64, this is 32"),
    "accumulation": ("sft.py", ["--gradient_accumulation_steps", 2], "--gradient_accumulation_steps 1, this is 2"),
    "smoothing": ("sft.py", ["--label_smoothing_factor", 0.1], "--label_smoothing_factor 0.0, this is 0.1"),
    "batch that no memory holds": (
        "sft.py",
        ["--per_device_train_batch_size", 2**31 - 1],
        "--max_seq_length 64: a batch of 137,438,953,408 tokens; give at most 67,108,864",
    ),
    "batch size": ("sft.py", ["--per_device_train_batch_size", 4], "another number of rows"),
    "fewer rows": ("sft.py", ["--max_train_samples", 40], "another --dataset_name"),
    "rows held out": ("sft.py", ["--do_eval"], "another --dataset_name: .* other rows, .* --do_eval False -> True"),
    "optimizer": ("sft.py", ["--optim", "sgd"], "--optim adamw_torch, this is sgd"),
    "pairs a step": ("dpo.py", ["--per_device_train_batch_size", 4], "another number of rows"),
    "beta": ("dpo.py", ["--beta", 0.5], "--beta 0.1, this is 0.5"),
    "loss": ("dpo.py", ["--loss_type", "ipo"], "--loss_type sigmoid, this is ipo"),
}


@pytest.mark.parametrize(("script", "flags", "message"), OTHERS.values(), ids=OTHERS)
def test_what_decides_the_steps_must_be_as_it_was(train, stopped, monkeypatch, script, flags, message):
    monkeypatch.setattr("align.models.loading.load_model", die)  # refused before that

    with pytest.raises(InputError) as refused:
        train(script, "--resume", "auto", *flags, output=stopped / script)

    assert re.search(message.replace("[", r"\[").replace("]", r"\]"), str(refused.value)), refused.value
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("what", ["model", "data", "reference"])
def test_another_model_or_data_set_is_refused_by_name(train, stopped, tmp_path, what):
    script = "dpo.py" if what == "reference" else "sft.py"
    flag = {"model": "--model_name_or_path", "data": "--dataset_name", "reference": "--ref_model"}[what]
    other = (
        save_model(tmp_path / "other", seed=1) if what != "data" else write_rows("other.jsonl", make_rows(80, seed=1))
    )

    with pytest.raises(InputError, match=f"was made with another {flag}: "):
        train(script, "--resume", "auto", flag, other, output=stopped / script)


def test_rows_of_another_day_are_refused_with_the_way_out(train, stopped):
    dated = "{{ strftime_now('%d') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    Path("dated.jinja").write_text(dated)
    message = "was made with another --dataset_name: .*; the chat template writes the date, .* --chat_template"
    with pytest.raises(InputError, match=message):
        train("sft.py", "--resume", "auto", "--chat_template", "dated.jinja", output=stopped / "sft.py")


@pytest.fixture(scope="module", params=SCRIPTS)
def described(request):
    """A run of a script as its checkpoints describe it, and the names of its flags."""
    script = importlib.import_module(request.param.removesuffix(".py"))
    given = ["--output_dir", "out", "--model_name_or_path", "model", "--dataset_name", "rows.jsonl"]
    parsed = cli.parse_arguments(script.ARGUMENTS, script.__doc__, script.RECIPE, argv=given, script=request.param)
    parser = cli.make_parser(script.ARGUMENTS, script.__doc__, script.RECIPE)
    tokenizer = SimpleNamespace(fingerprint="one", template=SimpleNamespace(writes_date=False))
    run = checkpoints.Run.of(request.param, parsed, {}, script.FOLDER, {"--model_name_or_path": "one"}, tokenizer)
    return run, {action.dest for action in parser._actions if action.option_strings} - {"help", "version"}


@pytest.fixture
def resume(monkeypatch):
    """`resume(run, flags={…})`: checks the run against a checkpoint of one that differs in these."""

    def resume(run, ranks=1, **differs):
        about = {"flags": run.flags, "facts": run.facts, "settings": run.settings, "world_size": ranks}
        about["software"] = checkpoints.software()
        manifest = about | {name: about[name] | values for name, values in differs.items()}
        monkeypatch.setattr(checkpoints, "read_manifest", lambda folder: manifest)
        run.check("checkpoint-4")

    return resume


def test_each_flag_that_has_changed_is_refused_or_told_but_for_those_of_no_consequence(described, resume, caplog):
    run, flags = described
    assert flags - run.flags.keys() == set(checkpoints.SECRETS)
    caplog.set_level("INFO", "align")
    for name in sorted(flags - set(checkpoints.SECRETS) - checkpoints.UNTOLD):
        caplog.clear()
        try:
            resume(run, flags={name: "other"})
        except InputError as error:
            assert f"checkpoint-4 was made with --{name} other, this is " in str(error)  # noqa: PT017
        else:
            assert f"changed since checkpoint-4: --{name} other -> " in caplog.text
    for name in run.facts:
        with pytest.raises(InputError, match="checkpoint-4 was made with another "):
            resume(run, facts={name: "other"})


def test_what_the_optimizer_takes_from_the_checkpoint_cannot_be_changed_and_other_settings_are_told(
    described, resume, caplog
):
    run, _ = described
    caplog.set_level("INFO", "align")
    plateau = dataclasses.replace(run, flags=run.flags | {"lr_scheduler_type": "reduce_lr_on_plateau"})
    sharded = dataclasses.replace(
        run, settings={"deepspeed optimizer.type": "AdamW", "deepspeed gradient_clipping": 1.0}
    )
    for made, differs, cause in (
        (plateau, {"flags": {"weight_decay": 0.5}}, "the schedule goes on as it was saved"),
        (
            run,
            {"settings": {"gaudi_config_name use_fused_adam": False}},
            "--gaudi_config_name use_fused_adam False,",
        ),
        (run, {"flags": {"lr_scheduler_type": "reduce_lr_on_plateau"}}, "the schedule goes on"),
        (sharded, {"flags": {"adam_beta2": 0.5}}, "the optimizer of DeepSpeed's file goes on as it was saved"),
        (
            sharded,
            {"settings": {"deepspeed optimizer.params.lr": 1.0}},
            "--deepspeed optimizer.params.lr 1.0, this",
        ),
    ):
        with pytest.raises(InputError, match=cause):
            resume(made, **differs)
    with pytest.raises(InputError, match="holds the shards of 2 ranks, these are 1; start as many as before"):
        resume(dataclasses.replace(run, facts=run.facts | {"--deepspeed": "ZeRO-3"}), ranks=2)
    resume(run, flags={"learning_rate": 3e-4})
    resume(run, flags={"f_divergence_type": "FDivergenceType.REVERSE_KL"} if "beta" in run.flags else {})

    resume(sharded, settings={"deepspeed gradient_clipping": 0.5}, software={"torch": "1.0"})

    assert "changed since checkpoint-4: --deepspeed gradient_clipping 0.5 -> 1.0, torch 1.0 -> " in caplog.text


def test_of_a_stream_what_decides_its_rows_must_be_as_it_was(train, monkeypatch):
    """Nobody has read all of it, so that tokens cannot be compared."""
    stream = ["--streaming", True, "--size_valid_set", 5, "--resume", "auto"]
    train("sft.py", *stream, "--max_steps", 2)
    monkeypatch.setattr("align.models.loading.load_model", die)

    for flags, message in (
        (["--chat_template", "plain"], "with another --tokenizer_name_or_path or --chat_template"),
        (["--max_train_samples", 70], "with --max_train_samples None, this is 70"),
        (["--do_eval"], "with --do_eval False, this is True"),
    ):
        with pytest.raises(InputError, match=message):
            train("sft.py", *stream, *flags)


def test_a_stream_of_many_files_is_told_apart_by_their_sizes_and_a_few_of_their_bytes(tmp_path, monkeypatch):
    stream = IterableDataset.from_generator(lambda: iter(()))
    opened = []

    def count_and_open(*given):
        opened.append(given)
        return open(*given)

    monkeypatch.setattr("align.merge.checkpoints.open", count_and_open, raising=False)

    def identify():
        opened.clear()
        return identify_rows(stream, {"set": find_source("set", None, "data/finetune")})

    for number in range(200):
        write_rows(tmp_path / f"set/data/finetune/{number:03}.jsonl", [{"text": str(number)}])
    whole = identify()
    assert 0 < len(opened) <= 64
    os.utime("set/data/finetune/000.jsonl", (1, 1))
    write_rows("set/data/rl/rows.jsonl", [{"text": "of another script"}])
    assert identify() == whole
    write_rows("set/data/finetune/000.jsonl", [{"text": "9"}])
    edited = identify()
    write_rows("set/data/finetune/001.jsonl", [{"text": "longer"}])
    assert len({whole, edited, identify()}) == 3


def test_the_same_model_and_data_in_another_place_are_the_same(train, model, questions, tmp_path):
    train("sft.py", "--max_steps", 4, "--lr_scheduler_type", "constant")
    shutil.copytree(model, "copy")
    shutil.copy(questions, "copy.jsonl")

    flags = ["--model_name_or_path", "copy", "--dataset_name", "copy.jsonl", "--lr_scheduler_type", "constant"]
    train("sft.py", "--resume", "auto", *flags)

    train("sft.py", "--lr_scheduler_type", "constant", output="whole")
    assert_same_run("out", "whole")


def test_results_that_are_damaged_are_set_aside_and_the_run_ends_well(train, stopped, caplog):
    shutil.copytree(stopped / "sft.py", "out")
    path = Path("out/all_results.json")
    path.write_text('{"train_loss": 2.')

    said = train("sft.py", "--resume", "auto", "--max_steps", 4).err

    assert (
        said.count("out/all_results.json is damaged: a new one is begun, the old one is kept as out/damaged-all") == 1
    )
    assert json.loads(path.read_text())["train_loss"] > 0
    for damage in (b"", b"[1, 2]", b"\xff\x00", b"[" * 100_000):
        path.write_bytes(damage)
        assert read_results(path) == {}
        assert Path("out/damaged-all_results.json").read_bytes() == damage


def test_another_learning_rate_and_schedule_hold_from_the_resume_on(train, stopped):
    shutil.copytree(stopped / "sft.py", "out")
    flags = ["--learning_rate", "2e-3", "--lr_scheduler_type", "constant", "--weight_decay", 0.1, "--logging_steps", 1]

    said = train("sft.py", "--resume", "auto", *flags).err

    assert "--learning_rate 0.01 -> 0.002" in said
    assert "--lr_scheduler_type linear -> constant" in said
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    assert [entry["learning_rate"] for entry in history if entry["step"] > 4 and "loss" in entry] == [2e-3, 2e-3]


def test_a_learning_rate_that_the_run_is_too_short_for_is_told(train):
    said = train("sft.py", "--max_steps", 2, "--warmup_steps", 2, "--save_strategy", "no").err
    assert "the learning rate rises for 2 steps (--warmup_steps) and the run has 2: it never comes to" in said


def test_resume_auto_leaves_a_finished_model_without_checkpoints_alone(train):
    train("sft.py", "--save_strategy", "no")
    before = Path("out/adapter_model.safetensors").read_bytes()

    with pytest.raises(InputError, match="--resume auto: out holds a model .adapter_model.safetensors. but no"):
        train("sft.py", "--save_strategy", "no", "--resume", "auto", "--learning_rate", "1e-2")

    assert Path("out/adapter_model.safetensors").read_bytes() == before


def test_resume_auto_begins_where_there_is_nothing_and_without_it_nothing_is_replaced(train):
    train("sft.py", "--resume", "auto", "--max_steps", 2)

    with pytest.raises(InputError, match="holds another run .*; add --resume auto to go on"):
        train("sft.py")
    with pytest.raises(InputError, match="--resume auto contradicts --overwrite_output_dir"):
        train("sft.py", "--resume", "auto", "--overwrite_output_dir")
    with pytest.raises(InputError, match="--resume goes on with training: add --do_train"):
        train("sft.py", "--resume", "auto", "--do_train", False, "--do_eval")
    with pytest.raises(InputError, match="nowhere"):
        train(
            *("sft.py", "--resume_from_checkpoint", False, "--do_train", False, "--do_eval"),
            *("--model_name_or_path", "nowhere"),
        )


def test_a_checkpoint_without_optimizer_says_so(train):
    train("sft.py", "--save_only_model", "--max_steps", 2)

    with pytest.raises(InputError, match="checkpoint-2 was made with --save_only_model"):
        train("sft.py", "--resume_from_checkpoint", "out/checkpoint-2")


def test_code_planted_in_any_file_of_a_checkpoint_is_not_run(train, stopped):
    from test_resume_soak import plant

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        shutil.rmtree("out", ignore_errors=True)
        shutil.copytree(stopped / "sft.py", "out")
        plant(Path("out/checkpoint-4", name), Path("it ran").absolute())

        with pytest.raises(InputError, match="out/checkpoint-4 holds more than tensors and is not loaded"):
            train("sft.py", "--resume", "auto")

        assert not Path("it ran").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_names_the_command_that_goes_on(train, at_step, number):
    at_step(3, lambda: os.kill(os.getpid(), number))

    with pytest.raises(Stopped, match=f"{signal.Signals(number).name}: stopped after step 4; out/checkpoint-4") as stop:
        train("sft.py", "--save_strategy", "no")

    assert stop.value.number == number
    assert [path.name for path in Path("out").glob("*checkpoint-*")] == ["checkpoint-4"]
    assert not Path("out/adapter_model.safetensors").exists()


EVALUATED = ["--do_eval", "--eval_strategy", "steps", "--eval_steps", 2, "--max_eval_samples", 8]


def test_a_signal_to_all_processes_does_not_end_those_that_load_rows(train, at_step):
    def signal_all():
        pids = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
        assert len(pids) == 3
        subprocess.run(["kill", "-TERM", *map(str, pids)], check=True)  # by somebody else
        time.sleep(1)

    at_step(3, signal_all)
    with pytest.raises(Stopped, match="SIGTERM: stopped after step 4; out/checkpoint-4 is saved"):
        train("sft.py", "--dataloader_num_workers", 2)


def test_a_signal_does_not_wait_for_an_evaluation(train, at_step, capsys):
    train("sft.py", *EVALUATED, output="whole")
    batches = []
    at_step(4, lambda: batches.append(1) or os.kill(os.getpid(), signal.SIGTERM), "on_prediction_step")

    with pytest.raises(Stopped, match="SIGTERM: stopped after step 4; out/checkpoint-4 is saved"):
        train("sft.py", *EVALUATED, "--save_steps", 6, "--per_device_eval_batch_size", 1)

    assert len(batches) == 1
    assert "the evaluation after step 4 was not finished, and is not in the log" in capsys.readouterr().err
    at_step(0, die)
    train("sft.py", *EVALUATED, "--resume", "auto")
    assert_same_run("out", "whole")


def test_a_signal_while_the_model_is_saved_waits_until_it_is_there(train, monkeypatch):
    move_in = SupervisedTrainer._move_in

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        move_in(*arguments)

    monkeypatch.setattr(SupervisedTrainer, "_move_in", interrupted)

    with pytest.raises(Stopped, match="SIGTERM: stopped; the model is saved in out; the same command with --resume"):
        train("sft.py", "--max_steps", 2)

    assert weights()
    assert not list(Path("out").glob("unfinished-*"))


@pytest.mark.parametrize(
    ("number", "before", "error", "message"),
    [
        (signal.SIGUSR1, True, Stopped, "SIGUSR1: stopped; the model is saved in out"),
        (signal.SIGINT, False, KeyboardInterrupt, None),  # nobody looks any more
    ],
)
def test_a_signal_around_the_save_of_the_model_ends_the_run_with_it_there(
    train, monkeypatch, number, before, error, message
):
    save_model = SupervisedTrainer.save_model

    def interrupted(*arguments):
        if before:
            os.kill(os.getpid(), number)
        save_model(*arguments)
        if not before:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(SupervisedTrainer, "save_model", interrupted)

    with pytest.raises(error, match=message):
        train("sft.py", "--max_steps", 2)

    assert weights()


def test_templates_beside_the_first_are_saved_as_the_tokenizer_has_them(train, model):
    shutil.copytree(model, "tools")
    Path("tools/additional_chat_templates").mkdir()
    shutil.copy("tools/chat_template.jinja", "tools/additional_chat_templates/tool_use.jinja")

    train("sft.py", "--max_steps", 2, "--model_name_or_path", "tools")

    for folder in ("out", "out/checkpoint-2"):
        saved = Path(folder, "additional_chat_templates/tool_use.jinja").read_text()
        assert saved == Path("tools/chat_template.jinja").read_text()
    assert not list(Path("out").glob("unfinished-*"))


BEST = [*EVALUATED, "--load_best_model_at_end", "--save_total_limit", 1, "--metric_for_best_model", "loss"]


def test_the_best_model_is_saved_and_the_last_checkpoint_stays_to_go_on_from(train, at_step):
    best_first = [*BEST, "--greater_is_better", True]  # the loss falls, so that the first one counts as the best
    at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="out/checkpoint-6 is saved"):
        train("sft.py", *best_first, "--max_steps", 8)
    at_step(0, die)
    shutil.copytree("out", "moved")
    shutil.rmtree("out")

    for _ in range(2):
        train("sft.py", *best_first, "--resume", "auto", "--max_steps", 8, output="moved")

    assert {path.name for path in Path("moved").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-8"}
    best = load_file("moved/checkpoint-2/adapter_model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in weights("moved").items())
    with open("moved/checkpoint-2/adapter_model.safetensors", "ab") as damaged:
        damaged.write(b"more")
    with pytest.raises(
        ResultError, match="--load_best_model_at_end: moved/checkpoint-2 cannot be loaded .adapter_model"
    ):
        train("sft.py", *best_first, "--resume", "auto", "--max_steps", 8, output="moved")


def test_the_best_model_is_also_saved_where_only_the_best_ones_are_kept(train):
    train(
        "sft.py", *BEST[:-4], "--save_strategy", "best", "--metric_for_best_model", "loss", "--greater_is_better", True
    )

    best = load_file("out/checkpoint-2/adapter_model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in weights().items())


@pytest.mark.parametrize(
    ("flags", "what"),
    [(["--greater_is_better", True], "greater_is_better"), (["--max_eval_samples", 2], "dataset_name held-out rows")],
)
def test_the_best_checkpoint_so_far_counts_no_more_where_it_was_chosen_by_something_else(train, flags, what):
    train("sft.py", *BEST, "--max_steps", 4)

    said = train("sft.py", *BEST, *flags, "--max_steps", 8, "--resume", "auto").err

    line = f"out/checkpoint-4, the best checkpoint so far, was chosen by another --{what}: the best of those to come"
    assert line in said
    best = json.loads(Path("out/trainer_state.json").read_text())["best_global_step"]
    assert best == (6 if "--greater_is_better" in flags else 8), "the loss falls"


def test_a_checkpoint_that_is_further_than_the_run_is_told(train, stopped):
    shutil.copytree(stopped / "sft.py", "out")

    said = train("sft.py", "--max_steps", 3, "--resume", "auto").err

    assert "out/checkpoint-4 has taken 4 steps, more than the 3 asked for" in said


def test_the_versions_of_packages_are_asked_for_once_a_run(train, monkeypatch):
    asked = []
    checkpoints.software.cache_clear()
    monkeypatch.setattr(checkpoints, "version", lambda name: asked.append(name) or "1.0")

    train("sft.py", "--max_steps", 3, "--save_steps", 1)

    checkpoints.software.cache_clear()
    assert sorted(asked) == sorted(checkpoints.PACKAGES)


def test_checkpoints_by_the_clock(train):
    train("sft.py", "--save_strategy", "no", "--save_seconds", "1e-9", "--max_steps", 3)

    assert sorted(path.name for path in Path("out").glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-3",
    ]


# ---------------------------------------------------------------- steps and results


@pytest.fixture
def poisoned(model, tmp_path, monkeypatch):
    """A model that is not finite where it meets one word, and rows of which one has it."""
    monkeypatch.setattr("align.models.guard.check_values", lambda *_: None)  # it would find that before the run
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    word = tokenizer("~", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        loaded.get_input_embeddings().weight[word] = torch.nan
    loaded.save_pretrained("poisoned")
    tokenizer.save_pretrained("poisoned")
    rows = make_rows(40)
    rows[7]["question"] += " ~"
    return ["--model_name_or_path", "poisoned", "--dataset_name", write_rows(Path("rows.jsonl"), rows)]


@pytest.mark.parametrize("script", ["sft.py", "dpo.py"])
def test_a_row_that_is_not_finite_is_left_out_named_and_kept(train, poisoned, script):
    steps = ["--max_steps", 20, "--skip_probe", True] + (["--packing", False] if script == "sft.py" else [])

    said = train(script, *poisoned, *steps, "--save_strategy", "no", "--logging_steps", 1).err

    assert re.search(
        r"step \d+: a loss is not finite; the step is not taken. Its rows \(.*7.*\) are in out/bad_batch", said
    )
    kept = [json.loads(line) for line in Path("out/bad_batch.jsonl").read_text().splitlines()]
    assert any("~" in str(row) for row in kept)
    assert 7 in [row["row"] for row in kept]
    assert all(tensor.isfinite().all() for tensor in weights().values())
    assert "NaN" not in Path("out/trainer_state.json").read_text()
    assert len(losses("out")) == 20 - len({row["step"] for row in kept}), "a step that was left out has no loss"
    results = json.loads(Path("out/train_results.json").read_text())
    assert results["train_loss"] == pytest.approx(np.mean(losses("out")), abs=1e-5)


def test_a_run_whose_steps_stay_not_finite_ends(train, poisoned):
    rows = write_rows(Path("all.jsonl"), [{**row, "question": "~"} for row in make_rows(20)])

    with pytest.raises(ResultError, match="number 2 of --max_nonfinite_steps 2"):
        train("sft.py", *poisoned, "--dataset_name", rows, "--skip_probe", True, "--max_nonfinite_steps", 2)

    assert not list(Path("out").glob("*checkpoint*"))


def test_a_run_that_takes_no_step_is_no_result(train, poisoned):
    rows = write_rows(Path("all.jsonl"), [{**row, "question": "~"} for row in make_rows(20)])

    with pytest.raises(ResultError, match="no step was taken: the loss or gradient of each was not finite"):
        train("sft.py", *poisoned, "--dataset_name", rows, "--skip_probe", True, "--max_nonfinite_steps", 9)


def test_an_evaluation_that_is_not_finite_is_exit_code_3(train, poisoned):
    rows = write_rows(Path("all.jsonl"), [{**row, "question": "~"} for row in make_rows(20)])

    with pytest.raises(ResultError, match="the evaluation loss after step 0 is nan"):
        train("sft.py", *poisoned, "--dataset_name", rows, "--skip_probe", True, "--do_train", False, "--do_eval")


def spoil(name, change):
    """Changes a tensor after it was written and before it is looked at."""

    def spoiled(self, folder, state):
        path = next(Path(folder).glob("*model.safetensors"))
        tensors = load_file(path)
        key = next(key for key in tensors if name in key)
        tensors[key] = change(tensors[key])
        tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
        from safetensors.torch import save_file

        save_file(tensors, path, metadata={"format": "pt"})
        return CHECK(self, folder, state)

    from align.training.gate import Gate

    CHECK = Gate.check
    return spoiled


FAULTS = {
    "half": (lambda tensor: tensor[: len(tensor) // 2].contiguous(), "was saved as"),
    "empty": (lambda tensor: tensor[:0].contiguous(), "was saved as"),
    "gone": (lambda tensor: None, "is not among what was saved"),
    "not finite": (lambda tensor: tensor * torch.inf, "not finite"),
    "another": (lambda tensor: tensor + 1, "with other values than it has in memory"),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("peft", [True, False], ids=["adapter", "full"])
def test_what_is_saved_wrongly_never_gets_its_name(train, monkeypatch, peft, change, message):
    monkeypatch.setattr("align.training.gate.Gate.check", spoil("q_proj", change))

    with pytest.raises(ResultError, match=f"{message}.*; kept as out/failed-checkpoint-1"):
        train("sft.py", "--use_peft", peft, "--max_steps", 1, "--save_steps", 1)

    assert not list(Path("out").glob("checkpoint-*"))


def test_weights_that_training_did_not_change_are_no_result(train, monkeypatch):
    monkeypatch.setattr("habana_frameworks.torch.hpex.optimizers.FusedAdamW.step", lambda self, closure=None: None)

    with pytest.raises(ResultError, match="no weight has changed .* kept as out/failed-checkpoint-2"):
        train("sft.py", "--max_steps", 2)


def test_every_save_loads_in_plain_peft_and_transformers(train):
    train("sft.py", "--max_steps", 2)
    train("sft.py", "--max_steps", 2, "--use_peft", False, output="full")
    code = """
import sys
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
for folder in ("out", "out/checkpoint-2"): AutoPeftModelForCausalLM.from_pretrained(folder)
for folder in ("full", "full/checkpoint-2"): AutoModelForCausalLM.from_pretrained(folder)
assert "optimum.habana" not in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


# ---------------------------------------------------------------- torn checkpoints


def change_manifest(folder, **values):
    """`None` takes a value out."""
    manifest = json.loads((folder / "manifest.json").read_text()) | values
    left = {name: value for name, value in manifest.items() if value is not None or name not in values}
    (folder / "manifest.json").write_text(json.dumps(left))


def replace_by_an_older_one(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("checkpoint-2"), folder)


TEARS = {
    "no manifest": lambda folder, file: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder, file: (folder / "manifest.json").write_text('{"version": 2, "fil'),
    "an empty manifest": lambda folder, file: (folder / "manifest.json").write_text("{}"),
    "a manifest without flags": lambda folder, file: change_manifest(folder, flags=None),
    "a manifest of another seed": lambda folder, file: change_manifest(folder, flags={"seed": 43}),
    "a manifest of another release": lambda folder, file: change_manifest(folder, version=3),
    "a manifest of brackets": lambda folder, file: (folder / "manifest.json").write_text("[" * 100_000),
    "an older one": lambda folder, file: replace_by_an_older_one(folder),
    "a file gone": lambda folder, file: file.unlink(),
    "a file cut": lambda folder, file: file.write_bytes(file.read_bytes()[:-1]),
    "a file empty": lambda folder, file: file.write_bytes(b""),
    "a bit flipped": lambda folder, file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    "a file too many": lambda folder, file: (folder / "more").touch(),
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, stopped):
    """Two checkpoints of each kind: an adapter's, a whole model's, and shards as DeepSpeed lays them out."""
    from align.training import checkpoints

    folder = tmp_path_factory.mktemp("kinds")
    shutil.copytree(stopped / "sft.py", folder / "adapter")
    for kind, names in {
        "full": ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"],
        "zero3": ["latest", "rng_state_0.pth", "rng_state_1.pth"]
        + [f"global_step4/zero_pp_rank_{rank}_{part}" for rank in (0, 1) for part in ("model.pt", "optim.pt")],
    }.items():
        for step in (2, 4):
            staged = folder / kind / f"unfinished-checkpoint-{step}"
            for name in names:
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                (staged / name).write_bytes(os.urandom(5000))
            (staged / "trainer_state.json").write_text(json.dumps({"global_step": step}))
            if kind == "zero3":
                (staged / "latest").write_text("global_step4")
            about = {name: kind() for name, kind in checkpoints.NEEDED.items() if name != "order"}
            about |= {"order": None, "step": step, "resumable": True, "progress": dict.fromkeys(checkpoints.SUMS, 0)}
            checkpoints.commit(staged, folder / kind / f"checkpoint-{step}", about)
    return folder


@pytest.mark.parametrize("tear", TEARS.values(), ids=TEARS)
@pytest.mark.parametrize("kind", ["adapter", "full", "zero3"])
def test_a_torn_checkpoint_is_named_in_one_line_and_the_one_before_it_taken(kinds, kind, tear, caplog, tmp_path):
    from align.training import checkpoints

    folder = shutil.copytree(kinds / kind, tmp_path / "torn")
    for name in checkpoints.list_files(folder / "checkpoint-4"):
        torn = shutil.copytree(folder, tmp_path / "one", dirs_exist_ok=True)
        caplog.clear()
        tear(torn / "checkpoint-4", torn / "checkpoint-4" / name)

        assert checkpoints.find_last(torn, 0, 1) == torn / "checkpoint-2"

        assert len(caplog.records) == 1
        assert "checkpoint-4 cannot be resumed (" in caplog.text
        shutil.rmtree(torn)


def drop_the_hash(folder):
    change_manifest(folder, version=1, xxh3_128=None)


def edit(folder, **values):
    """As somebody does who gives the manifest its right hash afterwards, or the version that has none."""
    manifest = json.loads((folder / "manifest.json").read_text()) | values
    del manifest["xxh3_128"], manifest["version"]
    checkpoints.write_manifest(folder, manifest.pop("files"), manifest)


def flip_a_bit(folder):
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"step": 4', b'"step": 5'))


UNUSABLE = {
    "another release's": (lambda folder: change_manifest(folder, version=3), "its version is 3, this release reads 2"),
    "a bit flipped": (flip_a_bit, "manifest.json is damaged"),
    "renamed": (lambda folder: folder.rename(folder.with_name("checkpoint-5")), "it is of step 4, under another name"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "flags that are none": (lambda folder: edit(folder, flags=[1]), "manifest.json is damaged"),
    "settings that are none": (lambda folder: edit(folder, settings=7), "manifest.json is damaged"),
    "sums that are gone": (lambda folder: edit(folder, progress={}), "manifest.json is damaged"),
    "sums that are none": (
        lambda folder: edit(folder, progress=dict.fromkeys(checkpoints.SUMS, "1")),
        "manifest.json is damaged",
    ),
}


def test_checkpoints_that_cannot_be_used_are_named_and_never_deleted(train, stopped):
    for spoil_checkpoint, reason in UNUSABLE.values():
        shutil.rmtree("out", ignore_errors=True)
        Path("out").mkdir()
        shutil.copytree(stopped / "sft.py/checkpoint-4", "out/checkpoint-4")
        spoil_checkpoint(Path("out/checkpoint-4"))
        before = sorted(Path("out").rglob("*"))

        with pytest.raises(InputError, match=f"none to go on from; out/checkpoint-. cannot be resumed .{reason}"):
            train("sft.py", "--resume", "auto")

        assert [path for path in sorted(Path("out").rglob("*")) if path.name != ".lock"] == before


def edit_state(folder, **values):
    """The trainer's own state, after which the manifest gets its right hash."""
    path = folder / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values if values else {}))
    edit(folder, files=checkpoints.seal(folder))


def test_a_state_that_was_edited_with_its_manifest_is_not_gone_on_from(train, stopped):
    shutil.copytree(stopped / "sft.py", "out")
    for values, reason in (
        ({"wibble": 4}, "trainer_state.json is not that of a trainer"),
        ({}, "trainer_state.json is of step 0, manifest.json of step 4"),
        ({"global_step": "4"}, "trainer_state.json is not that of a trainer"),
        ({"global_step": 4, "log_history": [7]}, "trainer_state.json is not that of a trainer"),
        ({"global_step": 3, "log_history": []}, "trainer_state.json is of step 3, manifest.json of step 4"),
    ):
        edit_state(Path("out/checkpoint-4"), **values)
        assert find_damage(Path("out/checkpoint-4")) == reason

    with pytest.raises(InputError, match=f"out/checkpoint-4 cannot be resumed: {reason}"):
        train("sft.py", "--resume_from_checkpoint", "out/checkpoint-4")
    said = train("sft.py", "--max_steps", 4, "--resume", "auto").err
    assert f"out/checkpoint-4 cannot be resumed ({reason}); looking for the one before it" in said
    assert_same_run("out", stopped / "sft.py")


def test_where_the_only_checkpoint_is_torn_a_run_begins_anew(train, stopped):
    Path("out").mkdir()
    shutil.copytree(stopped / "sft.py/checkpoint-4", "out/checkpoint-4")
    Path("out/checkpoint-4/optimizer.pt").unlink()
    shutil.copytree("out/checkpoint-4", "out/checkpoint-mine")

    said = train("sft.py", "--max_steps", 4, "--resume", "auto").err

    assert Path("out/checkpoint-mine/adapter_model.safetensors").exists(), "a copy of somebody's own"
    assert "out/checkpoint-4 cannot be resumed (optimizer.pt is missing), and there is none before it" in said
    assert_same_run("out", stopped / "sft.py")


def test_a_checkpoint_of_the_release_before_is_resumed(train, stopped):
    shutil.copytree(stopped / "sft.py", "out")
    drop_the_hash(Path("out/checkpoint-4"))

    train("sft.py", "--max_steps", 4, "--resume", "auto")

    assert_same_run("out", stopped / "sft.py")


def test_a_checkpoint_that_is_a_link_to_elsewhere_is_gone_on_from_and_replaced_without_a_look_behind_it(train, stopped):
    shutil.copytree(stopped / "sft.py", "out")
    for step in (2, 4):
        shutil.move(f"out/checkpoint-{step}", f"far-{step}")
        Path(f"out/checkpoint-{step}").symlink_to(Path(f"far-{step}").absolute())

    train("sft.py", "--max_steps", 4, "--resume_from_checkpoint", "out/checkpoint-2")
    assert_same_run("out", stopped / "sft.py")
    assert not list(Path("out").glob("unfinished-*"))
    with pytest.raises(InputError, match="out holds checkpoints; name one, such as out/checkpoint-4"):
        train("sft.py", "--resume_from_checkpoint", "out")
    train("sft.py", "--overwrite_output_dir", "--save_steps", 6)

    assert [path.name for path in Path("out").glob("checkpoint-*")] == ["checkpoint-6"]
    assert [find_damage(Path(f"far-{step}")) for step in (2, 4)] == [None, None]


def test_a_limit_keeps_what_was_just_saved_and_not_the_torn_one_before_which_the_run_goes_on(train, at_step):
    train("sft.py", "--max_steps", 4)
    shutil.copytree("out/checkpoint-2", "out/checkpoint-2-mine")
    Path("out/checkpoint-4/optimizer.pt").unlink()
    at_step(4, die)

    with pytest.raises(Killed):
        train("sft.py", "--save_steps", 1, "--save_total_limit", 1, "--max_steps", 4, "--resume", "auto")

    at_step(0, die)
    assert {path.name for path in Path("out").glob("checkpoint-*")} == {"checkpoint-2-mine"} | {
        f"checkpoint-{step}" for step in (3, 4)
    }


def test_a_checkpoint_of_elsewhere_begins_a_folder_of_its_own_and_replaces_no_other_run(train, stopped, caplog):
    here = ["--resume_from_checkpoint", stopped / "sft.py/checkpoint-2", "--max_steps", 4]
    train("sft.py", "--max_steps", 6, "--save_steps", 6, "--seed", 1)

    with pytest.raises(InputError, match="--output_dir: out holds another run .*; add --resume auto"):
        train("sft.py", *here)
    train("sft.py", *here, "--overwrite_output_dir")

    assert_same_run("out", stopped / "sft.py")
    assert [path.name for path in Path("out").glob("checkpoint-*")] == ["checkpoint-4"]
    with pytest.raises(InputError, match="--resume_from_checkpoint contradicts --overwrite_output_dir"):
        train("sft.py", "--resume_from_checkpoint", "out/checkpoint-4", "--overwrite_output_dir")


class CrashPoint:
    """Dies when the `number`-th file below an unfinished folder is opened or renamed; counts them."""

    def __init__(self):
        self.number, self.seen, self.is_on = 0, 0, False
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if (
            self.is_on
            and event in ("open", "os.rename", "shutil.rmtree")
            and "unfinished-checkpoint-4" in str(arguments[0])
        ):
            self.seen += 1
            if self.seen == self.number:
                raise Killed


CRASH = CrashPoint()


@pytest.fixture
def slow_disk(monkeypatch):
    """`slow_disk(2, wait)` calls that before checkpoint-2 is flushed."""
    seal = checkpoints.seal

    def slow_disk(step, wait):
        def seal_slowly(folder):
            if folder.name == f"unfinished-checkpoint-{step}":
                wait()
            return seal(folder)

        monkeypatch.setattr(checkpoints, "seal", seal_slowly)

    return slow_disk


def test_steps_are_taken_while_the_disk_takes_a_checkpoint(train, stopped, slow_disk, at_step):
    step_3_ended, seen = threading.Event(), []

    def look():
        seen.extend(path.name for path in Path("out").glob("*checkpoint-*"))
        step_3_ended.set()

    slow_disk(2, lambda: step_3_ended.wait(60) or die())
    at_step(3, look)
    train("sft.py", "--max_steps", 4)

    assert seen == ["unfinished-checkpoint-2"]
    assert not [path for path in Path("out").glob("checkpoint-*") if find_damage(path)]
    assert_same_run("out", stopped / "sft.py")
    shutil.rmtree("out/checkpoint-4")
    at_step(0, die)
    train("sft.py", "--max_steps", 4, "--resume", "auto")
    assert_same_run("out", stopped / "sft.py")


def test_a_run_that_fails_while_the_disk_takes_a_checkpoint_keeps_it(train, stopped, slow_disk, at_step):
    slow_disk(2, lambda: time.sleep(1))
    at_step(2, die, event="on_step_begin")

    with pytest.raises(Killed):
        train("sft.py", "--max_steps", 4)

    assert [path.name for path in Path("out").glob("*checkpoint-*")] == ["checkpoint-2"]
    assert find_damage(Path("out/checkpoint-2")) is None


def test_who_looks_at_a_checkpoint_when_it_is_saved_finds_it_whole(train, slow_disk, at_step):
    damage = []
    slow_disk(2, lambda: time.sleep(1))
    at_step(2, lambda: damage.append(find_damage(Path("out/checkpoint-2"))), event="on_save")

    train("sft.py", "--max_steps", 3)

    assert damage == [None]


PLACES = 35  # files that a save opens, renames or removes


@pytest.mark.parametrize(
    "number", [*range(1, PLACES, 4), *(pytest.param(n, marks=pytest.mark.soak) for n in range(2, PLACES + 1))]
)
def test_a_save_that_dies_at_any_file_leaves_a_run_that_goes_on(train, stopped, number):
    CRASH.number, CRASH.seen, CRASH.is_on = number, 0, True
    try:
        with pytest.raises(Killed):
            train("sft.py", "--max_steps", 4)
    finally:
        CRASH.is_on = False
    assert not Path("out/checkpoint-4").exists()

    train("sft.py", "--max_steps", 4, "--resume", "auto")

    assert_same_run("out", stopped / "sft.py")


@pytest.mark.parametrize("script", ["sft.py", "dpo.py"])
def test_a_second_run_in_the_same_folder_is_refused_before_it_loads(script, run):
    Path("out").mkdir()
    with open("out/.lock", "w") as held:
        held.write("process 7 on another-host")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"another run writes into out \(process 7 on another-host\)"):
            run(script, "--output_dir", "out", "--do_train", "--max_steps", "1", "--model_name_or_path", "nowhere")


def test_a_lock_that_is_no_file_is_named(train):
    Path("out").mkdir()
    os.mkfifo("out/.lock")
    with pytest.raises(InputError, match=r"--output_dir: \S+/out/.lock is no file.*remove it"):
        train("sft.py")


def test_a_folder_that_cannot_be_made_or_is_full_is_one_line_before_a_model_loads(train, monkeypatch):
    Path("file").write_text("")
    Path("nowhere").symlink_to("gone")
    Path("loop").symlink_to("loop")
    for folder, message in (
        ("nowhere", "nowhere is a link to a folder that is not there"),
        ("loop", "loop is a link to a folder that is not there"),
        ("file/out", "file/out cannot be made: Not a directory"),
        ("", "is empty; give a name"),
        ("x" * 300, "File name too long"),
    ):
        with pytest.raises(InputError, match=f"--output_dir: {message}"):
            train("sft.py", output=folder)
    with monkeypatch.context() as patched:
        patched.setattr("datasets.config.HF_DATASETS_CACHE", Path("file/cache"))
        with pytest.raises(
            InputError, match="the variables HF_HOME and HF_DATASETS_CACHE: file/cache cannot be written"
        ):
            train("sft.py")
    with pytest.raises(InputError, match="--logging_dir: file/logs cannot be written: Not a directory"):
        train("sft.py", "--report_to", "tensorboard", "--logging_dir", "file/logs")
    with pytest.raises(InputError, match="the folder of reference log-probs: file/kept cannot be written: Not a dir"):
        train("dpo.py", "--precompute_ref_log_probs", "--ref_log_probs_dir", "file/kept")
    Path("blocked/tokenizer.json").mkdir(parents=True)
    with pytest.raises(InputError, match="--output_dir: blocked/tokenizer.json is a folder where a file of that name"):
        train("sft.py", output="blocked")
    Path("linked").mkdir()
    Path("linked/trainer_state.json").symlink_to("gone")
    with pytest.raises(InputError, match="--output_dir: linked/trainer_state.json is a link to nothing where a file"):
        train("sft.py", output="linked")
    write_rows("rows/rows.jsonl", make_rows(5))
    with pytest.raises(InputError, match="--output_dir: rows/out lies in --dataset_name rows, all files of which"):
        train("sft.py", "--dataset_name", "rows", output="rows/out")
    Path("project").mkdir()
    Path("project/README.md").write_text("mine")
    for more in ([], ["--resume", "auto"]):
        with pytest.raises(InputError, match="--output_dir: project holds a README.md of no run, which would be"):
            train("sft.py", *more, output="project")
    train("sft.py", "--show_examples", 1, output="project")
    assert Path("project/README.md").read_text() == "mine"
    monkeypatch.setattr("align.output.LEAST_FREE", 1 << 60)
    with pytest.raises(InputError, match="--output_dir: the disk of out has [0-9]+ MiB left"):
        train("sft.py")
    with pytest.raises(InputError, match="--output_dir: the disk of project has"):
        train("sft.py", "--overwrite_output_dir", output="project")
    Path("project/trainer_state.json").write_text("{}")  # of a run whose weights were removed
    with pytest.raises(InputError, match="--output_dir: the disk of project has"):
        train("sft.py", output="project")


@pytest.fixture
def full_disk(monkeypatch):
    """`full_disk("_write_model", 2)`: at that trainer's second call of it, no file may grow beyond 100 bytes."""

    def full_disk(method, call):
        real, calls = getattr(SupervisedTrainer, method), []

        def limited(*arguments):
            calls.append(method)
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100 if len(calls) == call else before[0], before[1]))
            try:
                return real(*arguments)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        monkeypatch.setattr(SupervisedTrainer, method, limited)

    return full_disk


@pytest.mark.parametrize("method", ["_write_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(train, full_disk, method):
    full_disk(method, 2)

    told = train("sft.py", "--max_steps", 3, "--save_steps", 1).err

    assert "out/checkpoint-2 is not saved: " in told
    assert sorted(path.name for path in Path("out").glob("*checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    assert not [path for path in Path("out").glob("checkpoint-*") if find_damage(path)]


def test_a_disk_that_is_full_beside_the_next_step_costs_a_checkpoint_and_not_the_run(train, slow_disk):
    slow_disk(2, has_no_room)

    told = train("sft.py", "--max_steps", 3, "--save_steps", 1, "--save_total_limit", 1).err

    assert "out/checkpoint-2 is not saved: No space left on device; earlier ones stay" in told
    assert [path.name for path in Path("out").glob("*checkpoint-*")] == ["checkpoint-3"]
    assert find_damage(Path("out/checkpoint-3")) is None


def test_a_checkpoint_whose_folder_cannot_be_made_costs_itself_alone(train, at_step):
    at_step(1, lambda: Path("out/unfinished-checkpoint-2").write_text("in the way"))

    told = train("sft.py", "--max_steps", 3, "--save_steps", 1).err

    assert "out/checkpoint-2 is not saved: File exists (out/unfinished-checkpoint-2)" in told
    assert [find_damage(Path("out", name)) for name in ("checkpoint-1", "checkpoint-3")] == [None, None]


def has_no_room(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_with_the_log_of_tensorboard_ends_that_log_alone(train, monkeypatch):
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", has_no_room)

    said = train("sft.py", "--max_steps", 4, "--logging_steps", 1, "--report_to", "tensorboard").err

    assert said.count("--report_to tensorboard: its log ends here: No space left on device; trainer_state.json") == 1
    assert "Traceback" not in said
    assert weights()


def test_errors_of_threads_other_than_tensorboards_are_still_shown(monkeypatch):
    from align.training.results import TensorBoardLog

    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda told: shown.append(told.exc_value.errno))
    TensorBoardLog()

    thread = threading.Thread(target=has_no_room)
    thread.start()
    thread.join()

    assert shown == [errno.ENOSPC]


def test_a_report_that_the_disk_does_not_take_is_told_with_where_the_model_is(train, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", has_no_room)

    with pytest.raises(ResultError, match="the model is in out, but not all of its report: No space left on device"):
        train("sft.py", "--max_steps", 2)

    assert weights()


@pytest.mark.parametrize("room", ["files", "preparing"])
def test_a_disk_of_caches_that_is_full_is_one_line_that_names_it(train, monkeypatch, room):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("cache").absolute())
    monkeypatch.setattr(f"align.data.{room}.seal", has_no_room)

    with pytest.raises(InputError, match="HF_DATASETS_CACHE: .*/cache/align cannot be written: No space"):
        train("sft.py")


def test_a_model_that_the_disk_does_not_take_is_exit_code_3_and_the_run_goes_on_from_its_checkpoint(train, full_disk):
    full_disk("_write_model", 2)

    with pytest.raises(ResultError, match="the model is not saved into out: File too large.*add --resume auto"):
        train("sft.py", "--max_steps", 2, "--save_steps", 2)

    assert not list(Path("out").glob("adapter_model*"))
    train("sft.py", "--max_steps", 2, "--save_steps", 2, "--resume", "auto")
    assert weights()
