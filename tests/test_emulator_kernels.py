"""python -m pytest tests/test_emulator_kernels.py: each fused kernel against plain torch, in float32."""

import pytest
import torch
from torch.nn import functional

from habana_frameworks.torch.hpex.kernels import (
    FusedSDPA,
    RotaryPosEmbeddingHelperV1,
    RotaryPosEmbeddingHelperV2,
    RotaryPosEmbeddingHelperV3,
)
from habana_frameworks.torch.hpex.normalization import FusedClipNorm, FusedRMSNorm
from habana_frameworks.torch.hpex.optimizers import FusedAdamW

BATCH, HEADS, LENGTH, DIM = 2, 4, 7, 8


@pytest.fixture(autouse=True)
def on_the_card():
    torch.manual_seed(0)
    with torch.device("hpu"):
        yield


def assert_same(kernel, reference, *inputs):
    """Both give the same result and, for a random gradient of it, the same gradients, within 1e-6."""
    upstream, results = None, []
    for function in (kernel, reference):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        result = function(*leaves)
        upstream = torch.randn_like(result) if upstream is None else upstream
        results.append([result, *torch.autograd.grad(result, leaves, upstream)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def additive(keep):
    return torch.zeros(keep.shape, device=keep.device).masked_fill(~keep, torch.finfo(torch.float32).min)


def written_out_attention(query, key, value, keep):
    """softmax(q k / sqrt(dim)) v, each key head repeated for its queries; `keep` is True where a key is seen."""
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~keep, -torch.inf).softmax(dim=-1) @ value


CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None].hpu()
PADDED = (torch.arange(LENGTH) < torch.tensor([[5], [7]]))[:, None, None].hpu()
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2, 2]]).hpu()
PACKED = (SEGMENTS[:, None, :, None] == SEGMENTS[:, None, None, :]) & CAUSAL
ALL = torch.ones(1, 1, 1, 1, dtype=torch.bool).hpu()


def qkv(kv_heads):
    return (torch.randn(BATCH, heads, LENGTH, DIM) for heads in (HEADS, kv_heads, kv_heads))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("arguments", "keep"),
    [
        ((None, 0.0, False), ALL),
        ((None, 0.0, True), CAUSAL),
        ((additive(PADDED), 0.0, False), PADDED),
        ((additive(PACKED), 0.0, False), PACKED),
        ((PACKED, 0.0, None, None, "fast", True), PACKED),
    ],
    ids=["full", "causal", "padding mask", "4-D mask", "4-D bool mask, fast, recomputed"],
)
def test_attention_equals_the_written_out_softmax(kv_heads, arguments, keep):
    assert_same(
        lambda *inputs: FusedSDPA.apply(*inputs, *arguments),
        lambda *inputs: written_out_attention(*inputs, keep),
        *qkv(kv_heads),
    )


def test_attention_scales_as_told():
    query, key, value = qkv(HEADS)

    scaled = FusedSDPA.apply(query, key, value, None, 0.0, False, 0.1)

    torch.testing.assert_close(scaled, written_out_attention(query * 0.1 * DIM**0.5, key, value, ALL))


@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_sees_only_valid_keys_and_no_later_ones(side):
    query, key, value = qkv(2)
    valid = torch.tensor([3, 7])
    first = LENGTH - valid if side == "left" else torch.zeros(2, dtype=torch.long)

    result = FusedSDPA.apply(query, key, value, None, 0.0, True, None, "None", False, valid, side)

    for row, (start, length) in enumerate(zip(first, valid, strict=True)):
        kept = slice(start, start + length)
        alone = [tensor[row : row + 1, :, kept] for tensor in (query, key, value)]
        expected = written_out_attention(*alone, CAUSAL[..., :length, :length])
        torch.testing.assert_close(result[row : row + 1, :, kept], expected, atol=1e-6, rtol=1e-6)
    assert result.isfinite().all()


def test_attention_of_a_row_that_sees_nothing_is_finite():
    query, key, value = (tensor.requires_grad_() for tensor in qkv(2))
    mask = additive(PACKED & (torch.arange(LENGTH) < 5)[:, None])

    FusedSDPA.apply(query, key, value, mask).sum().backward()

    assert all(tensor.grad.isfinite().all() for tensor in (query, key, value))


def turned(pairs, angles):
    """Rotation as multiplication of complex numbers; pairs [..., n, 2], angles [..., n]."""
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.polar(torch.ones_like(angles), angles))


def turned_halves(states, angles):
    """Feature i pairs with feature i + dim / 2; states [batch, heads, length, dim]."""
    pairs = torch.stack(states.chunk(2, dim=-1), dim=-1)
    return torch.cat(turned(pairs, angles).unbind(-1), dim=-1)


def test_rotary_embedding_turns_each_token_by_its_position():
    angles = torch.rand(20, DIM // 2)
    cos, sin = (torch.cat((f(angles), f(angles)), dim=-1)[None, None] for f in (torch.cos, torch.sin))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [5, 6, 7, 8, 9, 18, 19]])

    assert_same(
        lambda states: RotaryPosEmbeddingHelperV2.apply(states, cos, sin, positions),
        lambda states: turned_halves(states, angles[positions][:, None]),
        torch.randn(BATCH, HEADS, LENGTH, DIM),
    )


def test_rotary_embedding_turns_from_an_offset_on():
    angles = torch.rand(20, DIM // 2)
    cos, sin = (torch.cat((f(angles), f(angles)), dim=-1)[None, None] for f in (torch.cos, torch.sin))

    assert_same(
        lambda states: RotaryPosEmbeddingHelperV1.apply(states, cos, sin, 4),
        lambda states: turned_halves(states, angles[4 : 4 + LENGTH]),
        torch.randn(BATCH, HEADS, LENGTH, DIM),
    )


def test_rotary_embedding_turns_neighbouring_pairs_and_leaves_the_rest():
    angles = torch.rand(LENGTH, 1, DIM // 4)
    cache = torch.stack((angles.cos(), angles.sin()), dim=-1)

    def reference(states):
        pairs = states[..., : DIM // 2].unflatten(-1, (-1, 2)).contiguous()
        return torch.cat((turned(pairs, angles[:, :, None]).flatten(-2), states[..., DIM // 2 :]), dim=-1)

    assert_same(
        lambda states: RotaryPosEmbeddingHelperV3.apply(states, cache),
        reference,
        torch.randn(LENGTH, BATCH, HEADS, DIM),
    )


def test_rms_norm_equals_torch_and_keeps_bfloat16():
    data, gamma = torch.randn(BATCH, LENGTH, DIM), torch.randn(DIM)

    assert_same(
        lambda data, gamma: FusedRMSNorm.apply(data, gamma, 1e-6),
        lambda data, gamma: functional.rms_norm(data, (DIM,), gamma, 1e-6),
        data,
        gamma,
    )

    assert FusedRMSNorm.apply(data.bfloat16(), gamma.bfloat16(), 1e-6).dtype == torch.bfloat16


@pytest.mark.parametrize("largest", [0.1, 100.0], ids=["clipped", "small enough"])
def test_clipping_equals_torch(largest):
    ours, theirs = ([torch.nn.Parameter(torch.zeros(3, size)) for size in (2, 5, 1)] for _ in range(2))
    for one, other in zip(ours[:2], theirs[:2], strict=True):  # the last one has no gradient
        one.grad = torch.randn_like(one)
        other.grad = one.grad.clone()

    norm = FusedClipNorm(iter(ours), largest).clip_norm(iter(ours))

    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, largest))
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-6)


def make_model_and_groups():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    decayed, others = ([p for p in model.parameters() if p.dim() == dim] for dim in (2, 1))
    return model, [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(16, 4, generator=generator), torch.randn(16, 3, generator=generator)
        optimizer.zero_grad()
        functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def test_twenty_steps_of_adamw_equal_torch():
    model, groups = make_model_and_groups()
    ours = train(model, FusedAdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-8), range(20))
    model, groups = make_model_and_groups()
    theirs = train(model, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-8), range(20))

    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_adamw_goes_on_from_a_saved_state():
    model, groups = make_model_and_groups()
    straight = train(model, FusedAdamW(groups, lr=1e-2), range(6))
    model, groups = make_model_and_groups()
    optimizer = FusedAdamW(groups, lr=1e-2)
    train(model, optimizer, range(3))

    other_model, groups = make_model_and_groups()
    other_model.load_state_dict(model.state_dict())
    other_optimizer = FusedAdamW(groups, lr=1e-2)
    other_optimizer.load_state_dict(optimizer.state_dict())
    resumed = train(other_model, other_optimizer, range(3, 6))

    assert all(torch.equal(one, other) for one, other in zip(straight, resumed, strict=True))


@pytest.mark.parametrize("decay", [[0.9], [torch.tensor([0.9]).hpu(), True]], ids=["lazy", "eager"])
def test_the_adamw_operator_takes_one_step_in_place(decay):
    weight, gradient = torch.ones(4), torch.randn(4)
    exp_avg, exp_avg_sq = torch.zeros(4), torch.zeros(4)
    neg_step = torch.tensor([-0.1])

    torch.ops.hpu.optimizer_adamw([gradient], [weight], [exp_avg], [exp_avg_sq], neg_step, 0.9, 0.99, 1e-8, *decay)

    torch.testing.assert_close(exp_avg, 0.1 * gradient)
    torch.testing.assert_close(exp_avg_sq, 0.01 * gradient**2)
    torch.testing.assert_close(weight, 0.9 - 0.1 * gradient.sign())


@pytest.mark.parametrize("permuted", [True, False], ids=["[out, in] weights", "[in, out] weights"])
def test_mixture_of_experts_sums_the_routed_experts(permuted):
    tokens, hidden, ffn, experts = 6, 8, 12, 3
    table = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1], [1, 0], [0, 2]])
    shares = torch.rand(tokens, 2)
    gates, ups, downs = (torch.randn(experts, *shape) / 3 for shape in ((ffn, hidden), (ffn, hidden), (hidden, ffn)))

    def kernel(states, shares, *stacks):
        w1, w2, w3 = ([weight if permuted else weight.t() for weight in stack] for stack in stacks)
        return torch.ops.hpu.mixture_of_experts(
            hidden_states=states,
            expert_routing_table=table,
            router_weights=shares,
            w1=w1,
            w2=w2,
            w3=w3,
            permuted_weights=permuted,
            activation="silu",
            experts_min=0,
            experts_max=experts - 1,
        )

    def reference(states, shares, gates, ups, downs):
        rows = []
        for token in range(tokens):
            state, row = states[token], 0
            for choice, expert in enumerate(table[token]):
                inner = functional.silu(gates[expert] @ state) * (ups[expert] @ state)
                row = row + shares[token, choice] * (downs[expert] @ inner)
            rows.append(row)
        return torch.stack(rows)

    assert_same(kernel, reference, torch.randn(tokens, hidden), shares, gates, ups, downs)
