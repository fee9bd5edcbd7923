"""The head in blocks against plain log-softmax. Run: pytest tests/test_head.py"""

import pytest
import torch
from tiny import make_config
from torch.nn import functional
from transformers import AutoModelForCausalLM

from align.models import head as heads
from align.models.head import TokenScores, find_head, shift
from align.upstream_fixes import keep_no_input_of_frozen_layers

CPU, HPU = torch.device("cpu"), torch.device("hpu")


def inputs(dtype=torch.float32, tokens=300, size=32, vocabulary=50):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(tokens, size, generator=generator), torch.randn(vocabulary, size, generator=generator)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, torch.randn(tokens)


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 50)])
def test_log_probs_and_gradients_are_those_of_a_plain_log_softmax(bias):
    hidden, weight, targets, slopes = inputs()
    logits = functional.linear(hidden, weight, bias)
    expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    wanted = torch.autograd.grad(expected, (hidden, weight), slopes)

    found, means = TokenScores.apply(hidden, weight, bias, targets)
    gradients = torch.autograd.grad(found, (hidden, weight), slopes)

    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(means, logits.mean(-1), atol=1e-6, rtol=1e-6)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_under_autocast_the_head_computes_in_bfloat16_and_scores_are_float32():
    hidden, weight, targets, slopes = (tensor.detach().to(HPU) for tensor in inputs())
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast(HPU.type, torch.bfloat16):
        found, _ = TokenScores.apply(hidden, weight, None, targets)
    gradients = torch.autograd.grad(found, (hidden, weight), slopes)

    rounded = functional.linear(hidden.bfloat16(), weight.bfloat16()).float().log_softmax(-1)
    expected = rounded.gather(-1, targets[:, None])[:, 0]
    wanted = torch.autograd.grad(expected, (hidden, weight), slopes)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)


def test_a_head_that_is_not_trained_keeps_no_logits_for_its_gradient():
    hidden, weight, targets, _ = inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        TokenScores.apply(hidden, weight.detach(), None, targets)

    assert kept == [hidden.numel()]


NO_DROPOUT = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2", "gpt2"])
def test_a_model_gives_the_loss_that_it_gives_with_whole_logits(family):
    torch.manual_seed(0)
    changes = NO_DROPOUT if family == "gpt2" else {}
    model = AutoModelForCausalLM.from_config(make_config(family, **changes)).train().to(HPU)
    ids = torch.randint(500, (2, 20))
    labels = ids.masked_fill(torch.rand(2, 20) < 0.3, heads.IGNORED).to(HPU)
    ids = ids.to(HPU)
    expected = model(input_ids=ids, labels=labels).loss
    expected.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    head = find_head(model, HPU, graphs=False)
    with head.scoring(shift(labels)):
        loss = model(input_ids=ids, labels=labels).loss
    loss.backward()

    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-6, rtol=1e-5)
    assert model(input_ids=ids).logits.shape[-1] == 512


def test_a_frozen_layer_under_zero_3_keeps_no_input_and_gives_the_same_gradients(monkeypatch):
    from deepspeed.runtime.zero import partition_parameters

    plain = partition_parameters.zero3_linear_wrap
    monkeypatch.setattr(partition_parameters, "zero3_linear_wrap", plain)
    keep_no_input_of_frozen_layers()
    hidden, weight, _, _ = inputs()
    for bias, trained in ((None, False), (torch.ones(50), False), (None, True)):
        kept, used = [], weight if trained else weight.detach()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda x: x):  # noqa: B023
            output = partition_parameters.zero3_linear_wrap(hidden, used, bias)
        wanted = torch.autograd.grad(functional.linear(hidden, used, bias).sum(), hidden)
        torch.testing.assert_close(torch.autograd.grad(output.sum(), hidden), wanted)
        assert any(tensor.shape == hidden.shape for tensor in kept) == trained


def test_an_embedding_gives_the_type_that_autocast_asks_for_without_casting_its_table(monkeypatch):
    model = AutoModelForCausalLM.from_config(make_config("llama")).bfloat16().to(HPU)
    ids = torch.arange(6, device=HPU).view(2, 3)
    expected = model.get_input_embeddings()(ids)
    heads.look_up_as_stored(model)
    look_up, tables = functional.embedding, []

    def note_what_is_cast(ids, table, *rest):
        if torch.is_autocast_enabled(HPU.type):
            tables.append(len(table))
        return look_up(ids, table, *rest)

    monkeypatch.setattr(functional, "embedding", note_what_is_cast)
    with torch.autocast(HPU.type, torch.bfloat16):
        found = model.get_input_embeddings()(ids)

    assert found.dtype == torch.float32
    assert found.bfloat16().equal(expected)
    assert tables == [1]


@pytest.mark.parametrize(("family", "changes"), [("gemma2", {"head_dim": 16}), ("granite", {"logits_scaling": 2.0})])
def test_a_model_that_changes_its_logits_keeps_them_whole_and_says_so(family, changes, caplog):
    caplog.set_level("INFO", "align")
    model = AutoModelForCausalLM.from_config(make_config(family, **changes))

    assert find_head(model, CPU, graphs=False) is None
    assert "logits of whole rows are kept: the model's" in caplog.text
    ids = torch.arange(4)[None]
    assert model(input_ids=ids, labels=ids).loss > 0
