"""dpo.py on the real GaudiDPOTrainer. Run: pytest tests/test_dpo.py"""

import json
import logging
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_rows
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file
from tiny import save_model

from align.errors import InputError, ResultError
from align.training import reference

FLAGS = ["--max_prompt_length", 48, "--max_length", 96, "--max_steps", 4, "--logging_steps", 1, "--eval_steps", 2]
FLAGS += ["--warmup_steps", 0, "--learning_rate", "1e-3", "--disable_tqdm", True, "--max_eval_samples", 4]
ZERO_3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": False},
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def make_rows(number, seed=0):
    rng = random.Random(seed)
    return [
        {
            "question": f"What is {i} and {rng.randint(1, 99)}?",
            "response_j": "It is four. " * rng.randint(1, 5),
            "response_k": "Thank you, no. " * rng.randint(1, 4),
        }
        for i in range(number)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "questions.jsonl", make_rows(80))


@pytest.fixture
def dpo(run, model, questions):
    """Runs dpo.py on the tiny model; later flags win. Returns what it printed."""

    def dpo(*arguments, model=model, data=questions, output="out"):
        paths = ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", output]
        return run("dpo.py", *FLAGS, *paths, *arguments)

    return dpo


def results(output="out", name="all"):
    return json.loads(Path(output, f"{name}_results.json").read_text())


def logged(output="out"):
    """What the trainer logged each step, from its last checkpoint."""
    states = sorted(Path(output).glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    return [entry for entry in json.loads(states[-1].read_text())["log_history"] if "loss" in entry]


BAD = {
    "no effect": (
        ["--generate_during_eval", "True"],
        "--generate_during_eval has no effect here: use --sample_prompts",
    ),
    "prompt as long as the limit": (["--max_prompt_length", 96], "--max_prompt_length 96: must be"),
    "beta": (["--beta", 0], "--beta: got 0"),
    "pairs compared": (["--loss_type", "aot"], "--loss_type aot compares the pairs of one micro-batch"),
    "smoothing": (
        ["--label_smoothing", 0.1, "--loss_type", "ipo"],
        "--label_smoothing has no effect on --loss_type ipo",
    ),
    "smoothing of tokens": (["--label_smoothing_factor", 0.1], "--label_smoothing_factor has no effect on preferences"),
    "smoothing range": (["--label_smoothing", 0.5], "--label_smoothing: got 0.5"),
    "synchronised": (
        ["--sync_ref_model", True, "--precompute_ref_log_probs"],
        "--sync_ref_model changes the reference",
    ),
    "synchronised adapter": (["--sync_ref_model"], "--sync_ref_model moves a second whole model"),
    "reference free": (["--reference_free", "--ref_model", "x"], "--reference_free: contradicts"),
    "mask dropped": (
        ["--flash_attention_causal_mask", True, "--attn_implementation", "gaudi_fused_sdpa"],
        "--flash_attention_causal_mask drops the mask",
    ),
    "samples of nothing": (["--sample_prompts", 2, "--eval_strategy", "no"], "--sample_prompts takes held-out prompts"),
    "evaluations and none": (["--do_eval", False], "--do_eval False: --eval_strategy steps evaluates; add"),
    "unknown flag": (["--betta", 1], "unknown argument '--betta'; did you mean --beta?"),
    "epochs beside steps": (["--num_train_epochs", 1], "--num_train_epochs has no effect beside --max_steps 4; add"),
    "neither epochs nor steps": (["--max_steps", -1], "--num_train_epochs 0: nothing would be trained"),
    "no model": (["--model_name_or_path", "nowhere"], "--model_name_or_path: nowhere is not a folder, and"),
    "no reference": (["--ref_model", "nowhere"], "--ref_model: nowhere is not a folder, and"),
    "no data": (["--dataset_name", "nothing.jsonl"], "--dataset_name: no such file"),
    "no target": (["--lora_target_modules", "wte"], "--lora_target_modules: none of wte is a module"),
    "dropout of nothing": (["--lora_dropout", 0.5], "--lora_dropout 0.5 has no effect while --disable_dropout is on"),
    "loss": (["--loss_type", "dpo"], "--loss_type: invalid choice"),
}


@pytest.mark.parametrize(("flags", "message"), BAD.values(), ids=BAD)
def test_bad_flags_end_in_one_clear_line(dpo, flags, message):
    with pytest.raises(InputError, match="^" + message.replace("?", r"\?").replace(".", r"\.")) as raised:
        dpo(*flags)

    assert "\n" not in str(raised.value)


ROWS = {
    "same answers": (
        {"response_k": "It is four. "},
        "no row of .* is left; dropped: 19 chosen and rejected are the same",
    ),
    "an empty answer": ({"response_j": ""}, r"row \d+: .*empty"),
}


@pytest.mark.parametrize(("change", "message"), ROWS.values(), ids=ROWS)
def test_bad_pairs_end_in_one_clear_line(dpo, change, message):
    rows = [{**row, "response_j": "It is four. ", **change} for row in make_rows(20)]

    with pytest.raises(InputError, match=message):
        dpo(data=write_rows("bad.jsonl", rows))


def test_a_run_saves_adapter_tokenizer_results_and_curves(dpo, model):
    dpo("--lora_target_modules", "q_proj", "v_proj")

    saved = {path.name for path in Path("out").iterdir()}
    assert saved >= {
        "adapter_model.safetensors",
        "tokenizer.json",
        "train_results.json",
        "eval_results.json",
        "curves.png",
    }
    metrics = results()
    for name in ("chosen", "rejected", "margins", "accuracies"):
        assert metrics.keys() >= {f"train_rewards/{name}", f"eval_rewards/{name}"}
    losses = [entry["loss"] for entry in logged()]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < losses[0]
    assert metrics["eval_rewards/margins"] > 0


def test_the_guides_targets_warn_about_dead_names_and_change_the_live_ones(dpo, caplog):
    caplog.set_level(logging.WARNING, "align")
    logging.getLogger("align").addHandler(caplog.handler)

    printed = dpo("--lora_target_modules", "q_proj", "v_proj", "k_proj", "out_proj", "fc_in", "fc_out", "wte")

    assert "out_proj, fc_in, fc_out, wte match no module" in printed.err + caplog.text
    changed = {name.split(".")[-3] for name in load_file("out/adapter_model.safetensors")}
    assert changed == {"q_proj", "v_proj", "k_proj"}


def test_stored_log_probs_are_used_again_and_never_for_another_input(dpo, model, tmp_path):
    stored = ["--precompute_ref_log_probs", "--ref_log_probs_dir", "stored", "--max_train_samples", 8]
    first = dpo(*stored)
    again = dpo(*stored, output="again")
    changed = {"length": ["--max_length", 64], "type": ["--bf16", False]}
    changed["reference"] = ["--ref_model", save_model(tmp_path / "other", seed=1)]
    others = [dpo(*stored, "--max_steps", 1, *flags, output=name) for name, flags in changed.items()]

    assert "Reference log-probs" in first.err
    assert "Reference log-probs" not in again.err
    assert all("Reference log-probs" in other.err for other in others)
    assert [entry["loss"] for entry in logged("again")] == [entry["loss"] for entry in logged()]


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_damaged_or_foreign_log_probs_are_refused_by_name(dpo, damage):
    dpo("--precompute_ref_log_probs", "--ref_log_probs_dir", "stored")
    first, second = sorted(Path("stored").iterdir())
    first.write_bytes(first.read_bytes()[:-8] if damage == "truncated" else second.read_bytes())

    with pytest.raises(InputError, match=f"^stored/{first.name} is"):
        dpo("--precompute_ref_log_probs", "--ref_log_probs_dir", "stored", output="again")


@pytest.mark.parametrize("bf16", [False, True])
def test_stored_log_probs_of_another_model_are_found_in_the_first_step(dpo, bf16):
    stored = ["--precompute_ref_log_probs", "--ref_log_probs_dir", "stored", "--eval_strategy", "no", "--bf16", bf16]
    dpo(*stored, "--max_steps", 1)
    path = next(Path("stored").iterdir())
    values = load_numpy(path)["log_probs"]
    values[:, 1] -= 10  # as if the reference had liked the rejected answers less
    reference.store(reference.Stored(path, None), values, write=True)

    with pytest.raises(
        ResultError, match=r"\(ln 2\): of pair \d+ the rejected answer has the log-prob .* stored/.* delete it"
    ):
        dpo(*stored, output="again")

    assert not list(Path("again").glob("checkpoint-*"))


@pytest.mark.parametrize(
    "flags", [[], ["--precompute_ref_log_probs"], ["--sync_ref_model", "--ref_model_sync_steps", "2"]]
)
def test_full_models_are_tuned_against_what_they_were(dpo, flags):
    dpo("--use_peft", False, "--learning_rate", "1e-4", *flags)

    assert Path("out/model.safetensors").exists()
    losses = [entry["loss"] for entry in logged()]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[1] < 0.693


DROPPING = {  # where families keep their dropout: family, its config, flags
    "modules": ("gpt2", {"resid_pdrop": 0.5}, []),
    "functions": ("opt", {"dropout": 0.1, "ffn_dim": 128, "word_embed_proj_dim": 64}, []),
    "the config": ("gpt_neox", {"attention_dropout": 0.5}, ["--use_peft", False]),
}


@pytest.mark.parametrize(("family", "changes", "more"), DROPPING.values(), ids=DROPPING)
def test_the_models_dropout_is_off_while_preferences_are_learnt_unless_it_is_asked_for(
    dpo, tmp_path, family, changes, more
):
    """With dropout policy and reference are never the same, so the first loss is not ln 2."""
    drops = save_model(tmp_path / "drops", family, "gpt2", **changes)
    flags = ["--max_steps", 1, "--eval_strategy", "no", *more]

    dpo(*flags, model=drops)
    dpo(*flags, "--disable_dropout", False, model=drops, output="dropped")

    assert logged()[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(logged("dropped")[0]["loss"] - math.log(2)) > 1e-3
    if more:  # the whole model is saved, as it was
        saved = json.loads(Path("out/config.json").read_text())
        assert {name: saved[name] for name in changes} == changes


def test_a_resumed_full_training_stores_what_the_model_was_before_it(dpo):
    flags = ["--use_peft", False, "--precompute_ref_log_probs", "--save_steps", 2, "--learning_rate", "1e-4"]
    dpo(*flags, "--ref_log_probs_dir", "stored")

    dpo(*flags, "--ref_log_probs_dir", "again", "--resume_from_checkpoint", "out/checkpoint-2")

    for path in Path("stored").iterdir():
        torch.testing.assert_close(load_file(Path("again", path.name)), load_file(path))


def test_another_reference_is_another_model(dpo, tmp_path):
    other = save_model(tmp_path / "other", seed=1)

    dpo("--ref_model", other)

    assert abs(logged()[0]["rewards/margins"]) > 1e-3


def test_a_reference_with_another_vocabulary_is_refused(dpo, tmp_path):
    other = save_model(tmp_path / "other", vocab_size=520)

    with pytest.raises(InputError, match="--ref_model: its vocabulary has 520 tokens, the model's has 512"):
        dpo("--ref_model", other)


def test_a_stream_trains_on_as_many_pairs_as_the_steps_take(dpo):
    dpo("--streaming", True, "--size_valid_set", 10, "--per_device_train_batch_size", 2)

    assert logged()[-1]["epoch"] == pytest.approx(1)
    assert "eval_rewards/margins" in results()


def test_answers_to_held_out_prompts_are_shown_before_and_after(dpo):
    printed = dpo("--sample_prompts", 2).out

    assert printed.count("[before] user\n\nWhat is") == printed.count("[after] user\n\nWhat is") == 2


def test_evaluation_alone_needs_no_training(dpo):
    dpo("--do_train", False, "--do_eval")

    assert results().keys() >= {"eval_loss", "eval_rewards/accuracies"}
    assert not Path("out/adapter_model.safetensors").exists()


def test_a_resumed_run_repeats_the_losses_of_one_that_was_not_interrupted(dpo):
    dpo("--save_steps", 2)
    expected = [entry["loss"] for entry in logged()]

    dpo("--save_steps", 2, "--resume_from_checkpoint", "out/checkpoint-2")

    assert [entry["loss"] for entry in logged()] == pytest.approx(expected, abs=1e-4)


def test_a_run_resumed_within_an_epoch_takes_all_its_steps(dpo):
    ten = write_rows(Path("ten.jsonl"), make_rows(10))
    flags = "--max_steps -1 --num_train_epochs 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    flags = [*flags.split(), "--save_steps", 1, "--eval_strategy", "no", "--share_prompts", False]
    dpo(*flags, data=ten)
    expected = [entry["loss"] for entry in logged()]
    Path("out").rename("whole")

    dpo(*flags, "--resume_from_checkpoint", "whole/checkpoint-1", data=ten)

    assert len(expected) == 6  # of which each third has one batch
    assert [entry["loss"] for entry in logged()] == pytest.approx(expected, abs=1e-4)


def test_two_ranks_under_zero_3_equal_one_process(dpo, model, questions):
    flags = ["--bf16", False, "--eval_steps", 4, "--precompute_ref_log_probs"]
    dpo(*flags, "--gradient_accumulation_steps", 8, "--ref_log_probs_dir", "one", output="one")
    Path("zero3.json").write_text(json.dumps(ZERO_3))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / "dpo.py"]
    paths = ["--model_name_or_path", model, "--dataset_name", questions, "--output_dir", "two"]
    paths += ["--ref_log_probs_dir", "two", "--deepspeed", "zero3.json"]
    subprocess.run([str(part) for part in launch + FLAGS + flags + paths], check=True, env={**os.environ, "RANK": ""})

    one, two = (load_file(f"{name}/adapter_model.safetensors") for name in ("one", "two"))
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, atol=1e-6, rtol=1e-4)
    assert results("two")["eval_loss"] == pytest.approx(results("one")["eval_loss"], abs=1e-5)
    assert [step["loss"] for step in logged("two")] == pytest.approx([step["loss"] for step in logged("one")], abs=1e-4)


def test_log_probs_that_the_disk_does_not_take_are_told_and_used(tmp_path, caplog):
    stored = reference.Stored(tmp_path / "gone" / "key.safetensors", None)

    reference.store(stored, np.array([[1.0, 2.0]]), write=True)

    assert stored.values.tolist() == [[1.0, 2.0]]
    assert "reference log-probs are not stored, so another run computes them anew: No such file" in caplog.text
