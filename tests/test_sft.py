"""sft.py on the real GaudiSFTTrainer. Run: pytest tests/test_sft.py"""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_rows
from safetensors.torch import load_file
from tiny import save_model

from align.errors import InputError

FLAGS = "--max_seq_length 128 --max_steps 3 --logging_steps 1 --learning_rate 1e-3 --disable_tqdm True".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    number = random.Random(0).randint
    rows = [
        {"question": f"What is two and {i}?", "response_j": "It is four. " * number(1, 6), "response_k": "No."}
        for i in range(120)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "questions.jsonl", rows)


@pytest.fixture
def sft(run, model, questions):
    def sft(*arguments, output="out"):
        run("sft.py", "--model_name_or_path", model, "--dataset_name", questions, "--output_dir", output, *arguments)
        return json.loads(Path(output, "all_results.json").read_text())

    return sft


def losses(output="out"):
    states = sorted(Path(output).glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    return [entry["loss"] for entry in json.loads(states[-1].read_text())["log_history"] if "loss" in entry]


@pytest.mark.parametrize(
    ("packing", "smoothing"), [(True, 0), (False, 0), (True, 0.1)], ids=["packed", "buckets", "smoothed"]
)
def test_losses_equal_plain_transformers_on_each_sample_alone(sft, model, packing, smoothing, monkeypatch):
    from align.data.packing import BucketCollator, PackedCollator

    seen = []
    for kind in (PackedCollator, BucketCollator):
        collate = kind.__call__
        monkeypatch.setattr(
            kind, "__call__", lambda self, rows, collate=collate: seen.append(rows) or collate(self, rows)
        )
    flags = ["--use_peft", "False", "--do_train", "--gradient_accumulation_steps", "2", "--packing", packing]
    flags += ["--label_smoothing_factor", smoothing]
    sft(*FLAGS, *flags, "--per_device_train_batch_size", "2", "--optim", "sgd", "--learning_rate", "0.5")

    del seen[0]  # the row that is probed
    steps = [split_samples(seen[2 * step] + seen[2 * step + 1]) for step in range(3)]
    Path("steps.json").write_text(json.dumps(steps))
    reference = [sys.executable, Path(__file__).parent / "plain_reference.py", model, "steps.json", str(smoothing)]
    expected = json.loads(subprocess.run(reference, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert losses() == pytest.approx(expected, abs=2e-4)  # what the log rounds to, and little more


def split_samples(rows):
    """The samples in packed or plain rows, each on its own."""
    samples = []
    for row in rows:
        segments = np.asarray(row.get("segment_ids", np.ones(len(row["input_ids"]))))
        for segment in np.unique(segments):
            samples.append(
                {name: np.asarray(row[name])[segments == segment].tolist() for name in ("input_ids", "labels")}
            )
    return samples


def test_a_run_leaves_adapter_tokenizer_results_and_curves(sft):
    results = sft("--do_train", "--do_eval", "--bf16", *FLAGS)
    files = {path.name for path in Path("out").iterdir()}
    expected = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert expected | {"train_results.json", "eval_results.json", "all_results.json", "curves.png"} <= files
    assert {"train_loss", "eval_loss", "perplexity"} <= results.keys()


def test_gradients_do_not_depend_on_how_a_global_batch_is_cut(sft, monkeypatch):
    from align.training.supervised import SupervisedTrainer

    norms = {}
    step = SupervisedTrainer.training_step
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        total = []
        monkeypatch.setattr(
            SupervisedTrainer,
            "training_step",
            lambda self, *args, total=total, **kwargs: total.append(step(self, *args, **kwargs)) or total[-1],
        )
        flags = f"--per_device_train_batch_size {batch_size} --gradient_accumulation_steps {accumulation} --max_steps 1"
        sft("--do_train", "--lora_dropout", "0", *FLAGS, *flags.split(), output=f"out{batch_size}")
        norms[batch_size] = float(sum(total))
        assert losses(f"out{batch_size}")[0] == pytest.approx(norms[batch_size], abs=1e-4)
    assert norms[4] == pytest.approx(norms[8], abs=1e-5)
    assert norms[2] == pytest.approx(norms[8], abs=1e-5)


def test_a_model_whose_forward_takes_no_count_has_the_same_loss_however_a_step_is_cut(sft, questions, monkeypatch):
    """transformers asks `accepts_loss_kwargs`; such a model's loss is the mean of each batch."""
    monkeypatch.setattr("transformers.PreTrainedModel.accepts_loss_kwargs", False, raising=False)
    alike = write_rows("alike.jsonl", [json.loads(questions.read_text().splitlines()[0])] * 40)
    flags = ["--do_train", *FLAGS, "--lora_dropout", "0", "--packing", "False", "--dataset_name", alike]

    sft(*flags, "--per_device_train_batch_size", "4")
    sft(*flags, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4", output="cut")

    assert losses("cut") == pytest.approx(losses(), abs=2e-4)


def test_full_training_in_bfloat16_keeps_changes_that_bfloat16_rounds_away(sft, model):
    sft("--do_train", "--bf16", "--use_peft", "False", *FLAGS, "--max_steps", "1", "--learning_rate", "1e-6")

    before, after = load_file(model / "model.safetensors"), load_file("out/model.safetensors")
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    name = "model.layers.0.mlp.up_proj.weight"
    assert (before[name] != after[name]).float().mean() > 0.9
    assert (before[name].bfloat16() != after[name].bfloat16()).float().mean() < 0.1


def test_scale_clip_and_type_are_those_that_the_flags_name(sft):
    sgd = [
        "--do_train",
        *FLAGS,
        "--max_steps",
        "1",
        "--optim",
        "sgd",
        "--learning_rate",
        "1",
        "--max_grad_norm",
        "0.01",
    ]
    sft(*sgd, "--lora_alpha", "64")
    sft(*sgd, "--use_peft", "False", "--torch_dtype", "bfloat16", output="full")

    assert json.loads(Path("out/adapter_config.json").read_text())["lora_alpha"] == 64
    adapter = load_file("out/adapter_model.safetensors")  # of which B was 0, and A has no gradient yet
    moved = torch.cat([weight.flatten() for name, weight in adapter.items() if "lora_B" in name]).norm().item()
    assert moved == pytest.approx(0.01, rel=1e-3)
    assert {weight.dtype for weight in load_file("full/model.safetensors").values()} == {torch.bfloat16}


def test_resuming_repeats_the_run_that_was_not_interrupted(sft):
    flags = ["--do_train", *FLAGS, "--max_steps", "6", "--save_steps", "2", "--lora_dropout", "0"]
    sft(*flags)
    whole = torch.load("out/checkpoint-6/optimizer.pt", weights_only=True)
    for folder in Path("out").glob("checkpoint-[56]"):
        folder.rename("away-" + folder.name)
    sft(*flags, "--resume_from_checkpoint", "True")
    again = torch.load("out/checkpoint-6/optimizer.pt", weights_only=True)
    for number, state in whole["state"].items():
        torch.testing.assert_close(again["state"][number]["exp_avg"], state["exp_avg"])


def test_overwriting_leaves_nothing_of_the_earlier_run(sft):
    sft("--do_train", *FLAGS, "--save_steps", "3")
    again = ["--do_train", "--use_peft", "False", "--overwrite_output_dir", *FLAGS, "--max_steps", "2"]
    sft(*again)

    left = {path.name for path in Path("out").iterdir()}
    assert {"model.safetensors", "checkpoint-2"} <= left
    assert not left & {"adapter_config.json", "adapter_model.safetensors", "checkpoint-3"}
    with pytest.raises(InputError, match="--overwrite_output_dir would replace out/checkpoint-2, which this run reads"):
        sft(*again, "--model_name_or_path", "out/checkpoint-2")


def test_a_run_resumed_within_an_epoch_takes_all_its_steps(sft, questions):
    Path("ten.jsonl").write_text("".join(questions.read_text().splitlines(keepends=True)[:10]))
    flags = "--max_steps -1 --num_train_epochs 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    flags = ["--do_train", *FLAGS, *flags.split(), "--save_steps", "1", "--lora_dropout", "0", "--packing", "False"]
    sft(*flags, "--dataset_name", "ten.jsonl")
    expected = losses()
    Path("out").rename("whole")

    sft(*flags, "--dataset_name", "ten.jsonl", "--resume_from_checkpoint", "whole/checkpoint-1")

    assert len(expected) == 6  # of which each third has one batch
    assert losses() == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(
    "flags",
    [
        "--use_peft False",
        "--packing False --num_buckets 3",
        "--gradient_checkpointing",
        "--use_hpu_graphs_for_inference --use_hpu_graphs_for_training",
        "--streaming True --size_valid_set 20",
        "--streaming True --size_valid_set 20 --packing False",
        "--dataloader_num_workers 2",
        "--use_flash_attention --attn_implementation gaudi_fused_sdpa --flash_attention_recompute",
        "--max_steps -1 --num_train_epochs 1 --eval_strategy epoch --save_strategy epoch --pipelining_fwd_bwd",
    ],
)
def test_every_way_to_train_lowers_the_loss(sft, flags):
    results = sft("--do_train", "--do_eval", "--bf16", *FLAGS, *flags.split())
    assert losses()[-1] < losses()[0]
    assert results["eval_loss"] > 0


def test_samples_are_padded_to_the_limit_where_that_is_asked_for(run, model, questions):
    flags = ["--model_name_or_path", model, "--dataset_name", questions, "--output_dir", "out", "--do_train", *FLAGS]
    said = run("sft.py", *flags, "--packing", False, "--pad_max", True).err
    assert re.search(r"train: .* useful; shapes: 1 \(\[8, 128\]\)", said)
    assert losses()[-1] < losses()[0]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_attention_is_computed_in_the_fused_kernel_unless_the_flag_says_no_with_the_same_losses(
    run, questions, family, monkeypatch
):
    from habana_frameworks.torch.hpex.kernels import FusedSDPA

    recomputes, attend = [], FusedSDPA.apply
    monkeypatch.setattr(FusedSDPA, "apply", lambda *call: recomputes.append(call[8:9]) or attend(*call))
    save_model(Path("model"), family)
    flags = ["--model_name_or_path", "model", "--dataset_name", questions, "--do_train", "--lora_dropout", 0, *FLAGS]
    called = {}
    ways = {"default": [], "on": ["--use_flash_attention"], "off": ["--use_flash_attention", False]}
    ways["fast"] = ["--attn_implementation", "gaudi_fused_sdpa", "--flash_attention_fast_softmax"]
    for name, more in ways.items():
        run("sft.py", *flags, *more, "--skip_probe", True, "--output_dir", name)
        called[name] = recomputes[:]
        recomputes.clear()

    assert len(called["default"]) == len(called["on"]) > 0
    assert not called["off"]
    assert losses("default") == pytest.approx(losses("off"), abs=1e-6)
    assert losses("on") == pytest.approx(losses("off"), abs=1e-6)
    if family == "llama":  # mistral's class says it to the card by a context
        assert {*called["default"]} == {(True,)} != {*called["on"]} == {*called["fast"]}  # no gradients else


def test_the_loss_of_an_evaluation_is_the_mean_over_its_tokens_in_any_batches(sft):
    flags = ["--do_eval", "--max_seq_length", "128", "--disable_tqdm", "True", "--per_device_eval_batch_size"]
    packed = sft(*flags, "8", output="packed")["eval_loss"]
    smooth = ["--label_smoothing_factor", "0.1"]  # of training alone
    assert sft(*flags, "3", *smooth, output="smaller")["eval_loss"] == pytest.approx(packed, abs=1e-5)
    assert sft(*flags, "8", "--packing", "False", output="buckets")["eval_loss"] == pytest.approx(packed, abs=1e-5)


def test_show_examples_prints_what_is_learnt_between_marks_and_what_was_cut(run, model, questions):
    arguments = ["--model_name_or_path", model, "--dataset_name", questions, "--do_train", "--show_examples", "200"]
    shown = run("sft.py", *arguments, "--max_seq_length", "40").out
    assert "\033[90m" in shown
    assert "▸" in shown
    assert "\033[7;32m<|end|>\033[0m\033[32m◂" in shown
    assert "(cut: lost its end, and the token that ends it)" in shown
    assert not Path("trainer_output").exists()


def test_flags_that_change_the_samples_are_never_answered_from_the_cache(run, model, questions):
    arguments = ["--model_name_or_path", model, "--dataset_name", questions, "--do_train", "--show_examples", "200"]
    Path("other.jinja").write_text("{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}")
    flags = ["", "--chat_template plain", "--chat_template other.jinja", "--max_seq_length 40", "--train_on_prompt"]
    flags += ["--max_seq_length 40 --truncation keep_end", "--max_seq_length 40 --truncation drop"]

    shown = [run("sft.py", *arguments, *each.split()).out for each in flags]

    assert len(set(shown)) == len(flags)
    assert "Assistant:" in shown[1]
    assert "<assistant>" in shown[2]


def test_show_examples_of_pairs_names_both_answers_and_writes_a_page(run, model, questions):
    arguments = ["--model_name_or_path", model, "--dataset_name", questions, "--do_train", "--show_examples", "1"]
    shown = run("dpo.py", *arguments, "--output_dir", "out").out
    page = Path("out/examples.html").read_text()
    for text in ("train, sample 1, chosen", "train, sample 1, rejected"):
        assert text in shown
        assert text in page
    assert "<b>▸</b><b>It is four." in page
    assert "<b><i>&lt;|end|&gt;</i></b>" in page


def test_a_tokenizer_that_ends_texts_otherwise_than_its_model_is_told(run, model, questions, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr("sft.start_logging", lambda args: None)
    other = Path(shutil.copytree(model, "other"))
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|start|>"}))
    run("sft.py", "--model_name_or_path", other, "--dataset_name", questions, "--do_train", "--show_examples", "1")
    assert "ends a text with '<|start|>' (its eos_token)" in caplog.text
    assert "the model's texts end with ['<|end|>']" in caplog.text
    assert "the chat template ends a turn with '<|eot|>'" in caplog.text


def test_a_target_that_matches_nothing_is_named_and_left_out(sft, caplog, monkeypatch):
    monkeypatch.setattr("sft.start_logging", lambda args: None)
    sft("--do_train", *FLAGS, "--lora_target_modules", "q_proj", "v_proj", "out_proj", "wte")
    assert "--lora_target_modules: out_proj, wte match no module of this llama model" in caplog.text
    assert set(json.loads(Path("out/adapter_config.json").read_text())["target_modules"]) == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--do_trian", "unknown argument '--do_trian'; did you mean --do_train?"),
        ("--learning_rate fast", "--learning_rate: got 'fast'; give a number, 1e-12 to 1000"),
        ("--do_train --num_train_epochs 0", "--num_train_epochs 0: nothing would be trained; give"),
        ("--do_train --per_gpu_train_batch_size 4", "no effect here: use --per_device_train_batch_size"),
        ("--do_train --sample_prompts 2", "--sample_prompts takes held-out prompts: add --do_eval"),
        ("--output_dir out", "nothing to do: give --do_train, --do_eval or both"),
        ("--do_train --model_name_or_path nowhere", "--model_name_or_path: nowhere is not a folder, and"),
        ("--do_train --tokenizer_name_or_path nowhere", "--tokenizer_name_or_path: nowhere is not a folder, and"),
        ("--do_train --deepspeed nowhere.json", "nowhere.json"),
        ("--do_train --lora_target_modules wte", "none of wte is a module .* its linear modules are down_proj"),
        ("--do_train --lora_target_modules (q", r"'\(q' is not a regular expression"),
        ("--do_train --lora_target_modules q_proj .*up_proj", r"'.\*up_proj' is not a module's name"),
        ("--do_train --seed -1", "--seed: got -1; give 0 to 4294967295"),
        ("--do_train --lora_r 0", "--lora_r: got 0; give 1 to 65536"),
        ("--do_train --packing False --num_buckets 0", "--num_buckets: got 0; give 1 or more"),
        ("--do_train --use_habana False", "cannot be used without `--use_habana`"),
        ("--do_train --resume_from_checkpoint True", "--resume_from_checkpoint: no checkpoint at out"),
        ("--do_train --output_dir file", "--output_dir: file is a file; name a folder"),
        (
            "--do_train --output_dir held",
            r"--output_dir: held holds another run \(adapter_config.json\); add --resume auto",
        ),
        ("--do_train --flash_attention_causal_mask --attn_implementation gaudi_fused_sdpa", "add --packing False"),
        (
            "--do_train --flash_attention_recompute --flash_attention_fast_softmax "
            "--attn_implementation gaudi_fused_sdpa",
            "no gradients for it with --flash_attention_recompute",
        ),
        (
            "--do_train --use_flash_attention False --flash_attention_recompute --attn_implementation gaudi_fused_sdpa",
            "--flash_attention_recompute: is a mode of flash attention; leave --use_flash_attention False out",
        ),
    ],
)
def test_wrong_input_is_one_line_that_names_the_flag(run, model, questions, flags, message):
    Path("file").touch()
    Path("held").mkdir()
    Path("held/adapter_config.json").touch()
    with pytest.raises(InputError, match=message) as error:
        run("sft.py", "--model_name_or_path", model, "--dataset_name", questions, "--output_dir", "out", *flags.split())
    assert "\n" not in str(error.value)
    assert not Path("out").exists()


def test_an_input_error_ends_the_process_with_exit_code_2_and_one_line():
    script = Path(__file__).parent.parent / "sft.py"
    ended = subprocess.run([sys.executable, script, "--nonsense"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("sft.py: error: unknown argument '--nonsense'")


def test_an_attention_that_is_wrong_for_the_family_is_refused(run, tmp_path, questions):
    mixtral = save_model(tmp_path / "mixtral", "mixtral")
    flags = ["--do_train", "--bf16", "--attn_implementation", "sdpa", *FLAGS]
    with pytest.raises(InputError, match="--attn_implementation sdpa: computes mixtral models wrongly"):
        run("sft.py", "--model_name_or_path", mixtral, "--dataset_name", questions, "--output_dir", "out", *flags)


def test_a_vocabulary_beyond_the_embedding_is_refused(run, tmp_path, questions):
    small = save_model(tmp_path / "small", vocab_size=300)
    with pytest.raises(InputError, match="its ids go up to .*, the model's embedding has 300 rows"):
        run("sft.py", "--model_name_or_path", small, "--dataset_name", questions, "--do_train", "--output_dir", "out")


def test_an_adapter_is_merged_without_a_word_into_the_base_that_it_was_trained_on_alone(run, questions, caplog):
    """A base of that name may have been written anew since, as `sft/merged` is by the next merge."""
    save_model(Path("base"))
    run(
        "sft.py",
        "--model_name_or_path",
        "base",
        "--dataset_name",
        questions,
        "--output_dir",
        "out",
        "--do_train",
        *FLAGS,
    )
    merge = ["merge_peft_adapter.py", "--adapter_model_name", "out", "--output_name", "merged", "--overwrite"]
    run(*merge)
    assert "trained on" not in caplog.text
    save_model(Path("base"), seed=1)

    with pytest.raises(
        InputError, match="--base_model_name: not given; base is not what out was trained on: its weights"
    ):
        run(*merge)
    run(*merge, "--base_model_name", "base")

    assert "Warning: base is not what out was trained on" in caplog.text


def test_an_embedding_whose_scale_peft_leaves_out_is_no_target(run, questions):
    save_model(Path("base"), "gemma3_text", head_dim=16)
    command = ["--model_name_or_path", "base", "--dataset_name", questions, "--output_dir", "out", "--do_train", *FLAGS]

    with pytest.raises(InputError, match="--lora_target_modules: model.embed_tokens of this gemma3_text model scales"):
        run("sft.py", *command, "--lora_target_modules", "q_proj", "embed_tokens")
