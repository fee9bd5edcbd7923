"""Each fused kernel against plain torch, in float32, and what it accepts and refuses. Run: pytest tests/conformance

The headings name the files of gaudi-pytorch-bridge 1.19.0 in which a fact was read.
"""

import pytest
import torch
from torch.nn import functional

from habana_frameworks.torch.hpex import optimizers
from habana_frameworks.torch.hpex.kernels import (
    CTCLoss,
    FusedSDPA,
    RotaryPosEmbeddingHelperV1,
    RotaryPosEmbeddingHelperV2,
    RotaryPosEmbeddingHelperV3,
    RotaryPosEmbeddingMode,
    apply_rotary_pos_emb,
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
        ((PACKED, 0.0, None, None, "none", True), PACKED),
        ((None, 0.0, True, None, "fast", True), CAUSAL),
    ],
    ids=["full", "causal", "padding mask", "4-D mask", "4-D bool mask, recomputed", "causal, fast, recomputed"],
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


def test_rotary_embedding_reads_its_tables_from_a_column_on():
    angles = torch.rand(LENGTH, DIM // 2)
    skipped = torch.rand(1, 1, LENGTH, 3)
    tables = (torch.cat((f(angles), f(angles)), dim=-1)[None, None] for f in (torch.cos, torch.sin))
    cos, sin = (torch.cat((skipped, table), dim=-1) for table in tables)

    assert_same(
        lambda states: RotaryPosEmbeddingHelperV1.apply(states, cos, sin, 3),
        lambda states: turned_halves(states, angles),
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
        generator = torch.Generator("hpu").manual_seed(step)
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


# hpex/kernels/FusedSDPA.py


@pytest.mark.parametrize(
    ("arguments", "needs_gradients", "message"),
    [
        ((None, 0.0, False, None, "fast", True), True, "only with is_causal"),
        ((None, 0.0, True, None, "None", False, "valid"), True, "inputs without gradients"),
        ((None, 0.0, False, None, "None", False, "valid"), False, "needs is_causal"),
        ((ALL, 0.0, True, None, "None", False, "valid"), False, "no mask"),
        ((None, 0.0, False, None, "None", True, None, "left", True), False, "none in recompute mode"),
        ((None, 0.0, False, None, "None", False, None, "left", False, True), True, "where gradients are wanted"),
    ],
)
def test_attention_refuses_what_the_kernel_lacks(arguments, needs_gradients, message):
    inputs = [tensor.requires_grad_(needs_gradients) for tensor in qkv(2)]
    arguments = [torch.tensor([3, 7]) if argument == "valid" else argument for argument in arguments]

    with pytest.raises(AssertionError, match=message):
        FusedSDPA.apply(*inputs, *arguments)


def test_attention_of_grouped_heads_takes_masks_of_four_dimensions_alone():
    for mask in (ALL[0], ALL[0, 0]):
        assert FusedSDPA.apply(*qkv(HEADS), mask).shape == (BATCH, HEADS, LENGTH, DIM)
        with pytest.raises(ValueError, match="a mask has 4 dimensions"):
            FusedSDPA.apply(*qkv(2), mask)


def test_attention_takes_its_arguments_by_position_alone():
    with pytest.raises(TypeError, match="attn_mask"):
        FusedSDPA.apply(*qkv(2), attn_mask=None)


def test_attention_recomputes_where_the_context_says_so_and_the_call_does_not():
    inputs = [tensor.requires_grad_() for tensor in qkv(2)]

    assert not torch.hpu.recompute_sdp_enabled()
    with torch.hpu.sdp_kernel():
        assert torch.hpu.recompute_sdp_enabled()
        with pytest.raises(AssertionError, match="only with is_causal"):
            FusedSDPA.apply(*inputs, None, 0.0, False, None, "fast")
        FusedSDPA.apply(*inputs, None, 0.0, False, None, "fast", False)
    with torch.hpu.sdp_kernel(enable_recompute=False):
        FusedSDPA.apply(*inputs, None, 0.0, False, None, "fast")


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_returns_its_probabilities_and_what_dropout_kept(kv_heads):
    query, key, value = qkv(kv_heads)

    result, shares, kept = FusedSDPA.apply(
        query, key, value, PACKED, 0.5, False, None, "None", None, None, "left", True, True
    )

    assert shares.shape == kept.shape == (BATCH, HEADS, LENGTH, LENGTH)
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(BATCH, HEADS, LENGTH))
    wide = value.repeat_interleave(HEADS // kv_heads, dim=1)
    torch.testing.assert_close(result, shares * kept * 2 @ wide)
    assert 0 < kept.sum() < kept.numel()
    plain = FusedSDPA.apply(query, key, value, PACKED, 0.0, False, None, "None", None, None, "left", False, True)
    torch.testing.assert_close(plain[0], FusedSDPA.apply(query, key, value, PACKED))


# hpex/kernels/RotaryPosEmbeddingHelper.py


@pytest.mark.parametrize(
    ("dtype", "table", "expected"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_rotary_embedding_has_the_wider_type_and_gives_its_tables_no_gradient(dtype, table, expected):
    states = torch.randn(BATCH, HEADS, LENGTH, DIM, dtype=dtype, requires_grad=True)
    cos, sin = (torch.rand(1, 1, LENGTH, DIM, dtype=table, requires_grad=True) for _ in range(2))

    turned = RotaryPosEmbeddingHelperV2.apply(states, cos, sin, None)
    turned.float().sum().backward()

    assert turned.dtype == expected
    assert states.grad.dtype == dtype
    assert cos.grad is sin.grad is None


def test_the_order_of_rotary_arguments_is_tables_positions_offset_and_mode():
    angles = torch.rand(LENGTH, DIM // 2)
    halves = [torch.cat((f(angles), f(angles)), dim=-1)[None, None] for f in (torch.cos, torch.sin)]
    pairs = [f(angles).repeat_interleave(2, dim=-1)[None, None] for f in (torch.cos, torch.sin)]
    states = torch.randn(BATCH, HEADS, LENGTH, DIM)

    blockwise = apply_rotary_pos_emb(states, *halves, None, 0, RotaryPosEmbeddingMode.BLOCKWISE)
    pairwise = apply_rotary_pos_emb(states, *pairs, None, 0, RotaryPosEmbeddingMode.PAIRWISE)

    torch.testing.assert_close(blockwise, turned_halves(states, angles))
    torch.testing.assert_close(pairwise, turned(states.unflatten(-1, (-1, 2)).contiguous(), angles).flatten(-2))
    torch.testing.assert_close(apply_rotary_pos_emb(states, *halves), blockwise)
    with pytest.raises(TypeError):
        RotaryPosEmbeddingHelperV1.apply(states, *halves)  # the offset has no default


def test_a_position_beyond_the_table_is_an_error_where_a_card_reads_on():
    with pytest.raises(IndexError, match="512 is out of bounds"):
        RotaryPosEmbeddingHelperV2.apply(
            torch.ones(1, 1, 1, DIM), *torch.ones(2, 1, 1, 512, DIM), torch.tensor([[512]])
        )


# hpex/normalization/FusedRMSNorm.py, hpu_ops/backend/rms_norm_gen.cpp


def test_rms_norm_takes_six_arguments_and_is_float32_where_types_differ():
    data, gamma = torch.randn(BATCH, LENGTH, DIM), torch.randn(DIM)

    plain = FusedRMSNorm.apply(data, gamma, 1e-6)

    assert torch.equal(plain, FusedRMSNorm.apply(data, gamma, 1e-6, False, 1, True))
    assert FusedRMSNorm.apply(data.bfloat16(), gamma, 1e-6).dtype == torch.float32
    with pytest.raises(TypeError):
        FusedRMSNorm.apply(data, gamma, eps=1e-6)


@pytest.mark.parametrize("wrong", ["data", "gamma"])
def test_rms_norm_has_no_kernel_for_whole_numbers(wrong):
    inputs = {"data": torch.randn(2, DIM), "gamma": torch.ones(DIM)}
    inputs[wrong] = inputs[wrong].int()

    with pytest.raises(RuntimeError, match=r"no kernel for torch.int32 \(called at .*test_kernels.py:"):
        FusedRMSNorm.apply(*inputs.values(), 1e-6)


# hpex/normalization/FusedClipNorm.py


def test_clipping_takes_one_tensor_and_has_no_norm_without_gradients():
    weight = torch.nn.Parameter(torch.zeros(2))
    clip = FusedClipNorm([weight], 1.0)

    assert clip.clip_norm([weight]) == 0
    weight.grad = torch.tensor([3.0, 4.0])
    assert clip.clip_norm(weight) == 5
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]))


# hpex/optimizers/FusedAdamW.py


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"eps": -1e-8}], ids=str
)
def test_adamw_refuses_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match=r"Invalid .* - should be"):
        FusedAdamW([torch.nn.Parameter(torch.zeros(2))], **wrong)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, [torch.bfloat16, torch.bfloat16]),
        (torch.float32, [torch.float32, torch.float32]),
        ((torch.bfloat16, torch.float32), [torch.bfloat16, torch.float32]),
    ],
    ids=str,
)
def test_adamw_keeps_moments_of_the_type_that_was_asked_for(asked, expected):
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = FusedAdamW([weight], lr=0.1, moments_dtype=asked)
    weight.grad = torch.full_like(weight, 2)

    optimizer.step()

    state = optimizer.state[weight]
    assert state["step"] == 0  # the group counts
    assert optimizer.param_groups[0]["step"] == 1
    assert [state[name].dtype for name in ("exp_avg", "exp_avg_sq")] == expected
    torch.testing.assert_close(weight.float(), torch.full((3,), 0.9), atol=4e-3, rtol=0)


def test_adamw_rounds_its_step_to_the_type_of_the_weights():
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = FusedAdamW([weight], lr=0.0999, eps=0, bias_correction=False, moments_dtype=torch.float32)
    weight.grad = torch.ones_like(weight)

    optimizer.step()

    step = torch.tensor(0.0999).bfloat16().float() * (1 - 0.9) / (1 - 0.999) ** 0.5
    assert weight.item() == pytest.approx(-step.bfloat16().item())


@pytest.mark.parametrize(("is_lazy", "expected"), [(True, 1.5), (False, 1.4921875)])
def test_adamw_rounds_its_decay_to_the_type_of_the_weights_in_eager_mode(monkeypatch, is_lazy, expected):
    monkeypatch.setattr(optimizers, "is_lazy", lambda: is_lazy)
    weight = torch.nn.Parameter(torch.full((1,), 1.5, dtype=torch.bfloat16))
    weight.grad = torch.zeros_like(weight)

    FusedAdamW([weight], lr=0.025, weight_decay=0.1).step()

    assert weight.item() == expected


@pytest.mark.parametrize("known_as", ["bias_correction", "correct_bias", None])
def test_adamw_takes_the_states_of_older_plugins_and_of_torch(known_as):
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = FusedAdamW([weight], lr=0.1)
    saved = optimizer.state_dict()
    corrects = saved["param_groups"][0].pop("bias_correction")
    if known_as is not None:
        saved["param_groups"][0][known_as] = corrects
    optimizer.load_state_dict(saved)
    weight.grad = torch.ones_like(weight)

    optimizer.step()

    assert weight.item() == pytest.approx(-0.1, rel=1e-4)  # 0.0316 without correction


# hpu_ops/backend/mixture_of_experts.cpp


@pytest.mark.parametrize("permuted", [True, False], ids=["[out, in] weights", "[in, out] weights"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_experts_may_come_with_their_first_two_weights_in_one(permuted, activation):
    states, shares, table = torch.randn(3, 4), torch.rand(3, 2), torch.tensor([[0, 1], [1, 0], [0, 1]])
    w1, w2 = ([torch.randn(6, 4) if permuted else torch.randn(4, 6) for _ in range(2)] for _ in range(2))
    w3 = [torch.randn(4, 6) if permuted else torch.randn(6, 4) for _ in range(2)]
    w12 = [torch.cat(pair, dim=0 if permuted else 1) for pair in zip(w1, w2, strict=True)]
    rest = (permuted, activation, 0, 1)

    fused = torch.ops.hpu.mixture_of_experts.fused_weights(states, table, shares, w12, w3, *rest)

    torch.testing.assert_close(fused, torch.ops.hpu.mixture_of_experts(states, table, shares, w1, w2, w3, *rest))


def test_experts_know_three_activations():
    weights = [torch.ones(2, 2)]
    with pytest.raises(RuntimeError, match='Activation "tanh" not found'):
        torch.ops.hpu.mixture_of_experts(
            torch.ones(1, 2), torch.zeros(1, 1).long(), torch.ones(1, 1), *[weights] * 3, True, "tanh", 0, 0
        )


# hpu_ops/backend/kv_reorder_gen.cpp


def test_beams_change_places_between_two_columns():
    cache = torch.arange(2 * 4 * 1 * 5 * 1).float().reshape(2, 4, 1, 5, 1)
    before = cache.clone()
    beams = torch.tensor([[3, 1, 0, 2], [2, 2, 2, 2]])
    packed = (beams * torch.tensor([64, 16, 4, 1])).sum(dim=-1).to(torch.uint8)

    torch.ops.hpu.kv_reorder_(cache, torch.tensor([1, 0]), torch.tensor([3, 5]), packed)

    assert torch.equal(cache[0, :, :, 1:3], before[0, beams[0]][:, :, 1:3])
    assert torch.equal(cache[0, :, :, [0, 3, 4]], before[0, :, :, [0, 3, 4]])
    assert torch.equal(cache[1], before[1, beams[1]])


# hpex/kernels/CTCLoss.py


def test_ctc_loss_equals_torch():
    scores, targets = torch.randn(9, 2, 5), torch.randint(1, 5, (2, 3))
    lengths = torch.tensor([9, 7]), torch.tensor([3, 2])

    assert_same(
        lambda scores: CTCLoss.apply(scores.log_softmax(-1), targets, *lengths),
        lambda scores: functional.ctc_loss(scores.log_softmax(-1), targets, *lengths),
        scores,
    )


# scripts/hpu_op.yaml: what these kernels compute is there for the card alone


def kernels_and_inputs():
    """Each fused kernel with what it takes, its tensors first."""
    row, table, places = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 9, 4), torch.zeros(1, 2, dtype=torch.long)
    routed = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    weight, step = torch.ones(4, 4), torch.tensor([-0.1])
    ops = torch.ops.hpu
    return {
        "attention": (FusedSDPA.apply, [row, row, row, torch.zeros(1, 1, 2, 2)]),
        "norm": (FusedRMSNorm.apply, [row, weight[0], 1e-6]),
        "rotary embedding": (RotaryPosEmbeddingHelperV2.apply, [row, table, table, places]),
        "experts": (
            lambda states, table, shares, *w: ops.mixture_of_experts(
                states, table, shares, *([each] for each in w), True, "silu", 0, 0
            ),
            [row[0, 0], *routed, weight, weight, weight],
        ),
        "AdamW": (
            lambda *tensors: ops.optimizer_adamw(*([each] for each in tensors[:4]), tensors[4], 0.9, 0.99, 1e-8, 1.0),
            [weight.clone(), weight.clone(), weight.clone(), weight.clone(), step],
        ),
        "kv_reorder": (ops.kv_reorder_, [torch.ones(1, 4, 1, 2, 1), places[0, :1], places[0, :1] + 1, places[0, :1]]),
    }


@pytest.mark.parametrize("name", kernels_and_inputs())
def test_a_kernel_refuses_each_tensor_of_the_host_and_names_the_line(name):
    kernel, inputs = kernels_and_inputs()[name]
    kernel(*inputs)

    for place, value in enumerate(inputs):
        if isinstance(value, torch.Tensor):
            on_host = [each.cpu() if number == place else each for number, each in enumerate(inputs)]
            with pytest.raises(RuntimeError, match=r"test_kernels.py:\d+"):
                kernel(*on_host)
