"""python -m pytest tests/test_attention.py"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from optimum.habana.transformers.modeling_utils import adapt_transformers_to_gaudi
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from align.data.packing import IGNORED, PackedCollator, RowDataset
from align.errors import InputError
from align.models import attention
from align.models.attention import check_context, find_visible, may_skip_probe, probe, probe_rows, segment_mask
from align.models.families import EXACT_IN_FUSED_KERNEL, FAMILIES, Family, choose_class
from align.upstream_fixes import keep_out_of_autocast, mend_transformers

HPU = torch.device("hpu")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
FEWER_HEADS = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
MODELS = {
    "llama": FEWER_HEADS,
    "mistral": FEWER_HEADS | {"sliding_window": 4},
    "mixtral": FEWER_HEADS | {"sliding_window": 4, "num_local_experts": 4},
    "qwen2": FEWER_HEADS,
    "qwen3": FEWER_HEADS,
    "gemma2": FEWER_HEADS | {"sliding_window": 4},
    "gpt2": NO_DROPOUT,
    "gptj": NO_DROPOUT | {"rotary_dim": 4},
    "gpt_oss": FEWER_HEADS | {"sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": FEWER_HEADS | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "nemotron": FEWER_HEADS,
    "phi3": FEWER_HEADS | {"sliding_window": 4, "pad_token_id": 0},
}


def make_model(model_type: str, attn_implementation: str = "eager", dtype=torch.float32, **options):
    """For texts of up to 20 tokens, longer than any window here. Weights so wide that attention matters."""
    adapt_transformers_to_gaudi()
    mend_transformers()
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES | MODELS.get(model_type, {}) | options)
    chosen = choose_class(config, longest=20)
    make = AutoModelForCausalLM.from_config if chosen is AutoModelForCausalLM else chosen._from_config
    model = make(config, attn_implementation=attn_implementation, torch_dtype=dtype)
    keep_out_of_autocast(model)
    return model.to(HPU).train()


def draw(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(3, 96, length).tolist()


def forward(model, **inputs) -> torch.Tensor:
    """Logits from lists or tensors of ids."""
    return model(**{name: torch.as_tensor(ids).to(HPU) for name, ids in inputs.items()}, use_cache=False).logits


def add_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    labels = labels[:, 1:].flatten().to(HPU)
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")


def take_gradients(model) -> torch.Tensor:
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("model_type", MODELS)
def test_a_packed_batch_has_the_loss_and_gradients_of_its_samples_alone(model_type):
    model = make_model(model_type)
    samples = [
        {"input_ids": draw(n), "labels": [IGNORED] * (n // 3) + draw(n)[n // 3 :], "length": n} for n in (11, 9, 7, 6)
    ]
    trained = sum(label != IGNORED for sample in samples for label in sample["labels"][1:])

    alone = sum(
        add_losses(forward(model, input_ids=[sample["input_ids"]]), torch.tensor([sample["labels"]]))
        for sample in samples
    )
    (alone / trained).backward()
    expected = take_gradients(model)

    rows = RowDataset(Dataset.from_list(samples), 20)
    batch = PackedCollator.for_sft(3, 20, pad_token_id=0)([rows[row] for row in range(len(rows))])
    mask = segment_mask(model, batch["segment_ids"].to(HPU), batch["position_ids"].to(HPU))
    inputs = {name: batch[name].to(HPU) for name in ("input_ids", "position_ids")}
    packed = add_losses(model(**inputs, attention_mask=mask, use_cache=False).logits, batch["labels"])
    (packed / trained).backward()

    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=0)
    torch.testing.assert_close(take_gradients(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", MODELS)
def test_two_answers_share_a_prompt_without_seeing_each_other(model_type):
    model = make_model(model_type)
    prompt, chosen, rejected = draw(8, 1), draw(6, 2), draw(5, 3)
    alone = [forward(model, input_ids=[prompt + answer])[0, 8:] for answer in (chosen, rejected)]

    ids = {
        "segment_ids": torch.ones(1, 19, dtype=torch.long, device=HPU),
        "branch_ids": torch.tensor([[0] * 8 + [1] * 6 + [2] * 5], device=HPU),
        "position_ids": torch.tensor([[*range(14), *range(8, 13)]], device=HPU),
    }
    mask = segment_mask(model, **ids)
    tokens = torch.tensor([prompt + chosen + rejected], device=HPU)
    shared = model(input_ids=tokens, position_ids=ids["position_ids"], attention_mask=mask, use_cache=False).logits

    torch.testing.assert_close(shared[0, 8:14], alone[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(shared[0, 14:], alone[1], rtol=0, atol=1e-5)


def test_a_token_sees_its_own_segment_and_the_shared_prompt_alone():
    visible = find_visible(torch.tensor([[1, 1, 1, 1, 2, 0]]), torch.tensor([[0, 1, 1, 2, 0, 0]]))
    assert visible[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def packed_row(*lengths: int) -> dict[str, torch.Tensor]:
    """Samples of these lengths in one row, with four columns of padding."""
    row = {
        "input_ids": sum(map(draw, lengths), []) + [0] * 4,
        "position_ids": [position for length in lengths for position in range(length)] + [0] * 4,
        "segment_ids": [number + 1 for number, length in enumerate(lengths) for _ in range(length)] + [0] * 4,
    }
    return {name: torch.tensor(ids) for name, ids in row.items()}


def shared_row() -> dict[str, torch.Tensor]:
    """A prompt of 8 tokens, a gap, and two answers, each behind the prompt's last token."""
    prompt, chosen, rejected = draw(8, 1), draw(6, 2), draw(5, 3)
    row = {
        "input_ids": [*prompt[:-1], 0, 0, prompt[-1], *chosen, prompt[-1], *rejected],
        "position_ids": [*range(7), 0, 0, *range(7, 14), *range(7, 13)],
        "segment_ids": [1] * 7 + [0, 0] + [1] * 13,
        "branch_ids": [0] * 9 + [1] * 7 + [2] * 6,
    }
    return {name: torch.tensor(ids) for name, ids in row.items()}


def padded_row() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor(draw(11) + [0] * 5), "attention_mask": torch.tensor([1] * 11 + [0] * 5)}


ROWS = {"packed": packed_row(11, 9), "shared": shared_row(), "padded": padded_row()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("model_type", MODELS)
def test_the_probe_accepts_rows_that_are_right(model_type, precision):
    model = make_model(model_type, dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32)
    assert all(probe_rows(model, row, HPU, autocast=precision == "autocast") for row in ROWS.values())


def test_a_model_whose_numbers_overflow_is_one_line_that_does_not_blame_its_attention():
    model = make_model("llama")
    with torch.no_grad():
        for projection in model.model.layers[0].mlp.children():
            getattr(projection, "weight", torch.zeros(())).fill_(1e30)

    with pytest.raises(InputError, match="^--ref_model: this llama model gives values that are not finite for a row"):
        probe_rows(model, ROWS["packed"], HPU, flag="--ref_model")


def test_texts_beyond_the_positions_of_their_model_are_told_or_refused(caplog):
    llama, gpt2 = (AutoConfig.for_model(model_type, max_position_embeddings=8) for model_type in ("llama", "gpt2"))

    check_context(llama, 9)
    check_context(gpt2, 8)
    with pytest.raises(InputError, match="--ref_model: texts of the data have up to 9 tokens, and this gpt2 model"):
        check_context(gpt2, 9, "--ref_model")

    assert "this llama model knows 8 (config.json): it may fail on longer ones" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_probe_stops_mixtral_with_the_attention_that_sees_the_future(dtype):
    model = make_model("mixtral", attn_implementation="sdpa", dtype=dtype, sliding_window=None)
    with pytest.raises(InputError, match="--attn_implementation sdpa: .* see later ones .* try .* eager"):
        probe_rows(model, ROWS["packed"], HPU)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (lambda visible: visible | True, "packed"),
        (lambda visible: torch.tril(torch.ones_like(visible)), "packed"),
        (lambda visible: torch.tril(torch.ones_like(visible)), "shared"),
        (lambda visible: visible & (torch.arange(visible.shape[1], device=visible.device) > 1), "packed"),
    ],
    ids=["sees all", "sees other samples", "sees the other answer", "does not see the first tokens"],
)
def test_the_probe_notices_a_mask_that_is_wrong(fault, kind, autocast, monkeypatch, caplog):
    model = make_wide("llama")
    monkeypatch.setattr(attention, "find_visible", lambda *ids: fault(find_visible(*ids)))
    assert not probe_rows(model, ROWS[kind], HPU, autocast)
    assert ("cannot share a prompt" if kind == "shared" else "keep samples in one row apart") in caplog.text


def test_the_probe_notices_a_window_of_one_token_more(monkeypatch):
    model = make_wide("mistral")
    monkeypatch.setattr(attention, "find_window", lambda config: config.sliding_window + 1)
    assert not probe_rows(model, ROWS["packed"], HPU)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2}),
        ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4}),
    ],
)
def test_what_counts_columns_is_packed_and_shares_no_prompts(model_type, options):
    """ALiBi, and a window that is none of the mask: the second answer stands farther from its prompt."""
    model = make_wide(model_type, **options)
    assert probe_rows(model, ROWS["packed"], HPU)
    assert not probe_rows(model, ROWS["shared"], HPU)


def make_wide(*args, **options):
    model = make_model(*args, **options)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.3)
    return model


def test_a_model_that_padding_changes_is_refused(monkeypatch):
    model = make_wide("llama")
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: forward(**inputs | {"attention_mask": None}))
    assert probe_rows(model, padded_row(), HPU)  # padding stands behind the tokens, which do not see it
    monkeypatch.setattr(model, "forward", lambda input_ids, **inputs: forward(input_ids=input_ids.flip(1).flip(1)))
    left = {name: ids.flip(0) for name, ids in padded_row().items()}
    with pytest.raises(InputError, match="--ref_model: padding changes what this llama model says"):
        probe_rows(model, left, HPU, flag="--ref_model")


def test_a_model_that_refuses_the_mask_is_not_packed():
    options = {"n_layer": 2, "n_head": 4}
    result = probe(make_model("bloom", **options), ROWS["packed"], HPU)
    assert result.earlier_moved < 1e-5
    assert result.row_differs == float("inf")


def test_the_probe_notices_an_option_that_drops_the_mask():
    options = {"use_flash_attention": True, "flash_attention_causal_mask": True}
    assert not probe_rows(make_wide("llama"), ROWS["packed"], HPU, **options)


def test_the_probe_accepts_an_adapter_and_flash_attention():
    model = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert probe_rows(model, ROWS["packed"], HPU, use_flash_attention=True, flash_attention_recompute=True)


@pytest.fixture
def kernel_calls(monkeypatch):
    """The arguments of each call of Gaudi's fused kernel."""
    from habana_frameworks.torch.hpex.kernels import FusedSDPA

    calls, attend = [], FusedSDPA.apply
    monkeypatch.setattr(FusedSDPA, "apply", lambda *arguments: calls.append(arguments) or attend(*arguments))
    return calls


IN_KERNEL = {"use_flash_attention": True, "flash_attention_recompute": True}


@pytest.mark.parametrize("model_type", set(EXACT_IN_FUSED_KERNEL) - {"mixtral"})  # which knows no other attention
def test_a_packed_row_has_the_loss_and_gradients_in_the_fused_kernel_that_it_has_without(model_type, kernel_calls):
    options = {"multi_query": True} if model_type == "falcon" else FEWER_HEADS | {"sliding_window": None}
    model = make_model(model_type, **options)
    row = {name: ids[None].to(HPU) for name, ids in ROWS["packed"].items()}
    mask = segment_mask(model, row.pop("segment_ids"), row["position_ids"])

    def train(**inputs) -> tuple[torch.Tensor, torch.Tensor]:
        loss = add_losses(model(**row, attention_mask=mask, use_cache=False, **inputs).logits, row["input_ids"])
        loss.backward()
        return loss, take_gradients(model)

    expected = train()
    assert not kernel_calls
    found = train(**IN_KERNEL)

    assert len(kernel_calls) == model.config.num_hidden_layers
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3"])
def test_a_packed_row_reaches_the_fused_kernel_as_a_padded_batch_of_optimum_habanas_does(model_type, kernel_calls):
    model = make_model(model_type, sliding_window=None)
    row = {name: ids[None].to(HPU) for name, ids in ROWS["packed"].items()}
    padded = {"input_ids": row["input_ids"], "attention_mask": (row["segment_ids"] > 0).long()}
    model(**padded, use_cache=False, **IN_KERNEL)
    expected = kernel_calls[:]
    kernel_calls.clear()

    mask = segment_mask(model, row.pop("segment_ids"), row["position_ids"])
    model(**row, attention_mask=mask, use_cache=False, **IN_KERNEL)

    def describe(calls):
        return [[(each.shape, each.dtype) if torch.is_tensor(each) else each for each in call] for call in calls]

    assert describe(kernel_calls) == describe(expected)
    assert kernel_calls[0][3].shape == (1, 1, *2 * [row["input_ids"].shape[1]])


@pytest.mark.parametrize("model_type", MODELS)
def test_within_autocast_packing_is_right_and_no_mask_is_infinite(model_type):
    model, masks = make_model(model_type).bfloat16().to(HPU), []
    ids = torch.ones(1, 4, dtype=torch.long, device=HPU)
    segment_mask(model, ids, ids)  # the blocks take what bounds their masks

    def note_masks(_, args, kwargs):
        masks.extend(value for value in (*args, *kwargs.values()) if torch.is_tensor(value) and value.dim() == 4)

    for module in model.modules():
        if type(module).__name__.endswith(("Layer", "Block")):
            module.register_forward_pre_hook(note_masks, with_kwargs=True)
    assert probe_rows(model, ROWS["packed"], HPU, autocast=True)

    assert all(mask.bfloat16().isfinite().all() for mask in masks)
    assert any((mask < -1e38).any() for mask in masks)


@pytest.mark.parametrize("model_type", ["gpt2"])
def test_within_autocast_the_probe_notices_a_mask_in_the_wrong_form(model_type, monkeypatch):
    model = make_model(model_type).bfloat16()
    monkeypatch.setitem(FAMILIES, model_type, Family())
    assert not probe_rows(model, ROWS["packed"], HPU, autocast=True)


def test_the_probe_gathers_what_zero3_has_partitioned():
    """In a process of its own, as DeepSpeed stays initialised."""
    code = """
import deepspeed, habana_frameworks.torch.distributed.hccl
from test_attention import HPU, ROWS, make_model, probe_rows
deepspeed.init_distributed("hccl", rank=0, world_size=1)
for model_type in ("mixtral", "gpt2"):
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 1, "zero_optimization": {"stage": 3}}):
        model = make_model(model_type)
    print(model_type, probe_rows(model, ROWS['packed'], HPU), sum(weight.numel() for weight in model.parameters()))
"""
    here = Path(__file__).parent
    environment = {"PYTHONPATH": f"{here}:{here.parent}", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert "mixtral True 0\n" in result.stdout
    assert "gpt2 True 0\n" in result.stdout


def test_the_probe_leaves_the_model_as_it_was():
    model = make_model("gpt2")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    probe_rows(model, ROWS["packed"], HPU)
    assert model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_padding_leaves_logits_and_gradients_finite():
    model = make_model("llama")
    ids = torch.zeros(2, 12, dtype=torch.long, device=HPU)
    logits = model(input_ids=ids, position_ids=ids, attention_mask=segment_mask(model, ids, ids)).logits
    logits.sum().backward()
    assert logits.isfinite().all()
    assert take_gradients(model).isfinite().all()


@pytest.mark.parametrize(("kind", "is_left_out"), [("jamba", False), ("llama", True)])
def test_a_model_that_carries_a_state_is_probed_even_where_no_probe_is_wanted(kind, is_left_out, caplog):
    """Its samples would leak into each other in silence."""
    model = SimpleNamespace(config=SimpleNamespace(model_type=kind))

    assert may_skip_probe(model, asked=True) is is_left_out
    assert ("jamba models are probed all the same" in caplog.text) is not is_left_out
