"""run_generation.py against plain transformers. Run: pytest tests/test_run_generation.py"""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_rows
from tiny import make_tokenizer, save_model

from align.checkpoints import open_checkpoint
from align.errors import InputError, run_script
from align.generation import adapt_transformers, decode_new, plan_batches

FAMILIES = ["llama", "mistral", "mixtral", "qwen2", "gpt2"]
TOKENIZERS = {"llama": "llama-2", "mistral": "mistral", "mixtral": "mistral", "qwen2": "qwen", "gpt2": "gpt2"}
PROMPTS = [
    "Hello",
    "What is the capital of France?",
    "two and two",
    "I am fine, thank you very much. How are you today? Hello there, be brief, of course!",
    "System: be brief.",
    "is",
    "It is four. It is four. It is four.",
    "thank you",
]
END_TOKENS = list(range(8, 512, 16))  # so many that random models end their texts, each at another length
NEW_TOKENS = 20


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A random model of each family, the folder of an adapter for the Llama, and plain transformers' texts."""
    root = tmp_path_factory.mktemp("models")
    adapt_transformers()  # before transformers' Auto classes have seen, and remembered, a model of its own
    for family in FAMILIES:
        save_model(root / family, family, TOKENIZERS[family], initializer_range=0.2)
        path = root / family / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": END_TOKENS}))
    make_adapter(root / "llama", root / "adapter")
    return root


def make_adapter(model, folder):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)


@pytest.fixture(scope="module")
def plain(models):
    """`plain[name]`: what plain transformers say to PROMPTS, by family and for what only the Llama is asked."""
    job = {"prompts": PROMPTS, "options": {"max_new_tokens": NEW_TOKENS}}
    jobs = {family: job | {"model": str(models / family)} for family in FAMILIES}
    jobs["adapter"] = jobs["llama"] | {"adapter": str(models / "adapter")}
    jobs["penalty"] = jobs["llama"] | {"options": job["options"] | {"repetition_penalty": 1.5}}
    jobs["beams"] = jobs["llama"] | {"options": job["options"] | {"num_beams": 3}}
    (models / "jobs.json").write_text(json.dumps(list(jobs.values())))
    command = [sys.executable, ROOT / "tests" / "plain_generation.py", models / "jobs.json"]
    texts = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return dict(zip(jobs, texts, strict=True))


@pytest.fixture
def generate(run, models):
    """Answers to PROMPTS, or to what the flags name, as written to --output_dir."""

    def generate(*flags, family="llama", prompts=PROMPTS, output="out"):
        asked = ["--prompt", *prompts] if prompts else []
        options = ["--max_new_tokens", NEW_TOKENS, "--output_dir", output, *asked, *flags]
        run("run_generation.py", "--model_name_or_path", models / family, *options)
        return [json.loads(line) for line in Path(output, "generations.jsonl").read_text().splitlines()]

    return generate


def count_parameters(folder):
    return sum(math.prod(tensor.shape) for tensor in open_checkpoint(folder).tensors.values())


def texts(answers):
    return [answer["text"] for answer in answers]


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--use_kv_cache", "False"],
        ["--use_hpu_graphs", "--limit_hpu_graphs", "--use_flash_attention"],
        ["--bucket_size", "16", "--use_hpu_graphs"],
        ["--reuse_cache", "--use_hpu_graphs"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_plain_transformers(generate, plain, family, flags, batch_size):
    if family == "gpt2" and "--reuse_cache" in flags:
        with pytest.raises(InputError, match="--reuse_cache: optimum-habana has none for gpt2"):
            generate(*flags, family=family)
        return

    answers = generate("--batch_size", batch_size, *flags, family=family)

    assert texts(answers) == plain[family]
    assert {answer["stopped"] for answer in answers} == {True, False}
    assert all(answer["tokens"] == NEW_TOKENS for answer in answers if not answer["stopped"])


def test_two_ranks_that_share_a_model_say_what_one_says(models, plain):
    command = [sys.executable, ROOT / "gaudi_spawn.py", "--world_size", "2", "--use_deepspeed"]
    folders = [str(models / family) for family in FAMILIES]

    command += [ROOT / "tests" / "generation_ranks.py", *folders, "--", *PROMPTS]

    ranks = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)

    for family in FAMILIES:
        answers = [json.loads(line) for line in Path(family, "generations.jsonl").read_text().splitlines()]
        assert texts(answers) == plain[family]
        results = json.loads(Path(family, "generation_results.json").read_text())
        assert results["cards"] == 2
        assert family == "gpt2" or results["parameters"] < 0.8 * count_parameters(models / family)
    assert "DeepSpeed splits no gpt2 model" in ranks.stderr


@pytest.mark.parametrize("flags", [("adapter", "--peft_model"), ("penalty", 1.5), ("beams", 3)])
def test_adapter_penalty_and_beams_are_those_of_plain_transformers(generate, plain, models, flags):
    name, value = flags
    options = {
        "adapter": ["--peft_model", models / "adapter"],
        "penalty": ["--repetition_penalty", value],
        "beams": ["--num_beams", value],
    }
    assert texts(generate("--batch_size", 8, *options[name])) == plain[name] != plain["llama"]
