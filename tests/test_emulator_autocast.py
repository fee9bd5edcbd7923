"""Autocast computes in the types that a card computes in. Run: pytest tests/test_emulator_autocast.py

The lists were read from gaudi-pytorch-bridge 1.19.0: hpu_ops/autocast_helpers.h.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from habana_frameworks.torch.hpex.kernels import FusedSDPA, RotaryPosEmbeddingHelperV2
from habana_frameworks.torch.hpex.normalization import FusedRMSNorm

HPU, WIDE, LOW = "hpu", torch.float32, torch.bfloat16
x, ids = torch.rand(4, 4).to(HPU), torch.arange(4).to(HPU)
mask = torch.ones(1, 1, 4, 4).to(HPU)


def in_autocast():
    return torch.autocast(HPU, torch.bfloat16)


# Each is computed from float32 tensors; those of the last group get a bfloat16 one too.
LOWER = {
    "matmul": lambda: x @ x,
    "linear": lambda: functional.linear(x, x),
    "bmm": lambda: torch.bmm(x[None], x[None]),
    "mul": lambda: x * x,
    "mul by a number": lambda: x * 2.0,
    "mean": lambda: x.mean(-1),
    "softmax": lambda: x.softmax(-1),
    "log_softmax": lambda: functional.log_softmax(x, -1),
    "dropout": lambda: functional.dropout(x, 0.5),
    "layer_norm": lambda: functional.layer_norm(x, (4,), x[0], x[0]),
    "attention": lambda: functional.scaled_dot_product_attention(*[x[None, None]] * 3, attn_mask=mask),
    "conv1d": lambda: functional.conv1d(x[None], x[:, :, None]),
}
FLOAT32 = {
    "embedding": lambda: functional.embedding(ids, x.bfloat16()),
    "exp": lambda: x.bfloat16().exp(),
    "log": lambda: x.bfloat16().log(),
    "pow": lambda: x.bfloat16() ** 2,
    "rsqrt": lambda: x.bfloat16().rsqrt(),
    "div": lambda: x.bfloat16() / 3,
    "logsumexp": lambda: x.bfloat16().logsumexp(-1),
    "cross_entropy": lambda: functional.cross_entropy(x.bfloat16(), ids),
    "mse_loss": lambda: functional.mse_loss(x.bfloat16(), x.bfloat16()),
    "softplus": lambda: functional.softplus(x.bfloat16()),
    "topk": lambda: x.bfloat16().topk(2).values,
    "reciprocal": lambda: x.bfloat16().reciprocal(),
}
WIDEST = {
    "add": lambda low: x + low,
    "sub": lambda low: low - x,
    "cat": lambda low: torch.cat([low, x]),
    "stack": lambda low: torch.stack([low, x]),
}
AS_THEY_ARE = {
    "sum": torch.sum,
    "where": lambda value: torch.where(value > 0.5, value, 0),
    "logsigmoid": functional.logsigmoid,
    "silu": functional.silu,
    "in place": lambda value: value.clone().mul_(2),
}


@pytest.mark.parametrize(
    ("compute", "dtype"),
    [pytest.param(each, LOW, id=name) for name, each in LOWER.items()]
    + [pytest.param(each, WIDE, id=name) for name, each in FLOAT32.items()],
)
def test_an_operation_of_a_list_is_computed_in_its_type(compute, dtype):
    with in_autocast():
        result = compute()

    assert result.dtype == dtype
    assert result.device.type == HPU


@pytest.mark.parametrize("name", WIDEST)
def test_some_operations_take_the_widest_type_that_they_are_given(name):
    with in_autocast():
        assert WIDEST[name](x.bfloat16()).dtype == WIDE
        if name in ("cat", "stack"):
            assert getattr(torch, name)([x.bfloat16()] * 2).dtype == LOW


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_other_operations_keep_the_type_that_they_are_given(name):
    with in_autocast():
        assert [AS_THEY_ARE[name](value).dtype for value in (x, x.bfloat16())] == [WIDE, LOW]


KERNELS = {
    "attention": lambda: FusedSDPA.apply(x[None, None], x[None, None], x[None, None]),
    "norm": lambda: FusedRMSNorm.apply(x, x[0], 1e-6),
    "rotary embedding": lambda: RotaryPosEmbeddingHelperV2.apply(x[None, None], x[None, None], x[None, None], None),
    "experts": lambda: torch.ops.hpu.mixture_of_experts(
        x, ids[:, None] % 2, x[:, :1], *[[x, x]] * 3, True, "silu", 0, 1
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_plugins_own_operators_are_in_no_list(name):
    outside = KERNELS[name]()

    with in_autocast():
        inside = KERNELS[name]()

    assert inside.dtype == WIDE
    assert torch.equal(inside, outside)


def test_norms_cast_their_first_argument_alone():
    weight = torch.full((4,), 1 + 2**-10, device=HPU)  # bfloat16 would make it 1
    row = torch.tensor([[-1.0, 1, -1, 1]], device=HPU)
    with in_autocast():
        narrow = functional.layer_norm(row, (4,), weight, eps=0)
    with torch.autocast(HPU, enabled=False):
        wide = functional.layer_norm(row.bfloat16(), (4,), weight, eps=0)

    assert torch.equal(narrow, wide)


def test_numbers_that_are_not_floats_and_float64_stay_as_they_are():
    with in_autocast():
        assert (ids * ids).dtype == torch.int64
        assert (x.double() @ x.double()).dtype == torch.float64


def test_gradients_have_the_types_of_the_weights():
    weight = torch.nn.Parameter(x.clone())
    with in_autocast():
        loss = functional.cross_entropy(x @ weight, ids)
    loss.backward()

    assert weight.grad.dtype == WIDE
    assert loss.dtype == WIDE


def test_tensors_of_the_host_are_cast_by_the_hosts_autocast_alone():
    host = torch.rand(4, 4)
    with in_autocast():
        assert (host @ host).dtype == WIDE
        assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", LOW):
        assert (host @ host).dtype == LOW
        assert (host * host).dtype == WIDE  # the CPU's lists
        assert (x @ x).dtype == WIDE
        assert not torch.is_autocast_enabled(HPU)


def test_lists_can_be_replaced_by_files(tmp_path):
    (tmp_path / "lower").write_text("add\nmm\n")
    (tmp_path / "wide").write_text("matmul\nabs\n")
    code = """
import torch
x = torch.rand(4, 4, device="hpu")
with torch.autocast("hpu", torch.bfloat16):
    for result in (x + x, x.mm(x), x.bfloat16() @ x.bfloat16(), x.bfloat16().abs(), x.bfloat16().exp(), x * x):
        print(result.dtype)
"""
    lists = {
        "PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST": str(tmp_path / "lower"),
        "PT_HPU_AUTOCAST_FP32_OPS_LIST": str(tmp_path / "wide"),
    }

    def types(**changes):
        environment = os.environ | lists | changes
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    low, wide = "torch.bfloat16", "torch.float32"
    assert types().stdout.split() == [low, low, wide, wide, low, wide]
    missing = types(PT_HPU_AUTOCAST_FP32_OPS_LIST=str(tmp_path / "none"))
    assert missing.stdout.split() == [low, low, low, low, wide, wide]
    assert f"Failed to open file with ops to autocast: {tmp_path / 'none'}. Default list loaded." in missing.stderr
