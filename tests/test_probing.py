"""What is tried on the loaded model before its first answer. Run: pytest tests/test_probing.py"""

import json
from pathlib import Path

import pytest
import torch
from family_models import save_family_model
from tiny import make_tokenizer

from align.errors import ResultError
from align.generation import prompts, stepping
from align.generation.probing import choose_prompts
from align.generation.prompts import Batch
from align.models import families
from align.upstream_fixes import adapt_transformers

PROMPTS = ["What is the capital of France? It is", "Hello", "two and two"]


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """`save(row)` is the folder of a family's tiny model."""
    root = tmp_path_factory.mktemp("models")
    adapt_transformers()

    def save(row):
        folder = root / row
        if not folder.exists():
            save_family_model(folder, row)
            make_tokenizer("llama-3").save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def generate(run):
    """Texts of a model, three prompts in a batch."""

    def generate(folder, *flags):
        options = ["--max_new_tokens", 8, "--batch_size", 3, "--ignore_eos", "--output_dir", "out"]
        options += ["--overwrite_output_dir", "--prompt", *PROMPTS]
        run("run_generation.py", "--model_name_or_path", folder, *options, *flags)
        return [json.loads(line)["text"] for line in Path("out/generations.jsonl").read_text().splitlines()]

    return generate


def change_inputs(monkeypatch, model_class, change):
    """What optimum-habana's class gets for a forward pass of the generation loop."""
    prepare = model_class.prepare_inputs_for_generation
    monkeypatch.setattr(
        model_class, "prepare_inputs_for_generation", lambda *args, **kwargs: change(prepare(*args, **kwargs))
    )


def forget_a_fault(monkeypatch):
    """Of OPT, whose class in optimum-habana goes wrong with a cache."""
    monkeypatch.delitem(families.FAMILIES, "opt")


def forget_the_window(monkeypatch):
    """Of 8 tokens, which optimum-habana's Mistral does not keep to with a cache."""
    monkeypatch.setattr(families, "find_window", lambda config: None)


def let_the_mask_leak(monkeypatch):
    from optimum.habana.transformers.models import GaudiLlamaForCausalLM

    change_inputs(
        monkeypatch,
        GaudiLlamaForCausalLM,
        lambda inputs: inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])},
    )


def count_columns(monkeypatch):
    from optimum.habana.transformers.models import GaudiGPT2LMHeadModel

    def change(inputs):
        width = inputs["input_ids"].shape[1]
        columns = torch.arange(width, device="hpu") if width > 1 else inputs["token_idx"] - 1
        return inputs | {"position_ids": columns.repeat(len(inputs["input_ids"]), 1)}

    change_inputs(monkeypatch, GaudiGPT2LMHeadModel, change)


def bend_alibi(monkeypatch):
    """Biases that do not grow evenly depend on where a row begins."""
    from transformers.models.mpt import modeling_mpt

    build = modeling_mpt.build_mpt_alibi_tensor
    monkeypatch.setattr(modeling_mpt, "build_mpt_alibi_tensor", lambda *args: -(build(*args) ** 2))


FAULTS = {
    "opt": forget_a_fault,
    "mistral (window)": forget_the_window,
    "llama": let_the_mask_leak,
    "gpt2": count_columns,
    "mpt": bend_alibi,
}


@pytest.mark.parametrize("row", FAULTS)
def test_where_padding_or_the_cache_change_texts_transformers_class_runs_and_is_right(
    row, save, generate, monkeypatch, caplog
):
    right = generate(save(row), "--use_hpu_graphs")
    caplog.clear()
    FAULTS[row](monkeypatch)

    texts = generate(save(row), "--use_hpu_graphs", "--bucket_size", 32)

    kind = json.loads((save(row) / "config.json").read_text())["model_type"]
    told = [message for message in caplog.messages if "runs with transformers' own class" in message]
    assert len(told) == 1
    assert "says something else with padding and cache than without (logits moved by" in told[0]
    assert f"--bucket_size has no effect: {kind} models run without static shapes." in caplog.messages
    assert texts == right
    assert generate(save(row), "--skip_probe") != right


def test_a_class_that_stops_gives_way(save, generate, monkeypatch, caplog):
    monkeypatch.delitem(families.FAMILIES, "cohere")

    assert all(generate(save("cohere")))

    assert "as optimum-habana's stops with an error (TypeError: GaudiCohereDecoderLayer.forward()" in caplog.text


def test_where_no_class_is_right_the_run_ends_before_the_first_answer(save, generate, monkeypatch):
    forward = stepping.GrowingShapes._forward

    def forget_the_cache(self, texts, first):
        return forward(self, texts, first) * (-1 if first else 1)

    monkeypatch.setattr(stepping.GrowingShapes, "_forward", forget_the_cache)

    with pytest.raises(ResultError, match="this olmo2 model says something else .*; --use_kv_cache False"):
        generate(save("olmo2"))
    assert not list(Path("out").glob("generations*"))


@pytest.mark.parametrize(
    "flags",
    [["--num_beams", "2"], ["--reuse_cache", "--use_hpu_graphs"], ["--bf16", "--use_flash_attention"]],
    ids=" ".join,
)
def test_what_is_right_passes_and_the_probe_changes_no_text(flags, save, generate, caplog):
    tried = generate(save("llama"), *flags)

    assert "transformers' own class" not in caplog.text
    assert tried == generate(save("llama"), *flags, "--skip_probe")


def test_the_most_padded_prompt_is_tried_beside_the_longest_of_its_batch():
    encoded = [[0] * length for length in (3, 9, 10, 60, 900, 901)]
    batches = [Batch([0, 1, 2], 16), Batch([3], 64), Batch([4, 5], 1024)]

    tried, width = choose_prompts(encoded, batches)

    assert (list(map(len, tried)), width) == ([3, 10], 16)
    assert choose_prompts(encoded[3:4], [Batch([0], 60)]) == (encoded[3:4], 60)
    assert prompts.pad_batch(tried, width, 3, 0)[1].sum(1).tolist() == [3, 10, 3]


def test_prompts_one_by_one_of_a_model_with_a_state_are_not_padded_which_is_told(save, generate, caplog):
    alone = generate(save("mamba"), "--batch_size", 1)
    assert "--max_input_tokens" not in caplog.text

    assert generate(save("mamba"), "--batch_size", 1, "--max_input_tokens", 64) == alone

    assert "--max_input_tokens cuts prompts here, and pads none: mamba models" in caplog.text
    assert json.loads(Path("out/generation_results.json").read_text())["shapes"] > 1
