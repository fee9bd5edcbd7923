"""Products of bfloat16 are fast and right on CPUs without its instructions. Run: pytest tests/test_emulator_products.py

Each case runs in a process of its own: kernels are replaced for good.
"""

import subprocess
import sys

import pytest

BEGIN = """
import torch
from torch import library
from torch.nn.functional import scaled_dot_product_attention as attention
from habana_frameworks.emulator import products
torch.manual_seed(0)
dtype = torch.DTYPE
def draw(*shape):
    return torch.randn(shape).to(dtype)
"""
ROUNDED_ONCE = """
get = library.get_kernel
class OfFloat32:
    def __init__(self, *named):
        self.native = get(*named)
    def call_boxed(self, keys, *args, **kwargs):
        assert args[-1].dtype == torch.float32, "torch's own kernel ran"
        return self.native.call_boxed(keys, *args, **kwargs)
library.get_kernel = OfFloat32
products.install({dtype})
left, right, bias = draw(5, 70), draw(70, 6), draw(6)
lefts, rights, biases = draw(2, 1, 70), draw(2, 70, 6), draw(2, 1, 6)
for made, wanted in [
    (torch.mm(left, right), left.float() @ right.float()),
    (left @ right, left.float() @ right.float()),
    (torch.addmm(bias, left, right, beta=0.5, alpha=2), 0.5 * bias.float() + 2 * (left.float() @ right.float())),
    (torch.nn.functional.linear(left, right.T.contiguous(), bias), bias.float() + left.float() @ right.float()),
    (torch.bmm(lefts, rights), lefts.float() @ rights.float()),
    (torch.baddbmm(biases, lefts, rights), biases.float() + lefts.float() @ rights.float()),
]:
    assert made.dtype == dtype
    torch.testing.assert_close(made, wanted.to(dtype), rtol=0.008, atol=1e-5)
    assert (made == wanted.to(dtype)).float().mean() > 0.9
"""
BACKWARD = """
leaves = [draw(2, 4, 24, 16).requires_grad_() for _ in range(3)]
masks = {"causal": {"is_causal": True}, "mask": {"attn_mask": draw(2, 1, 24, 24)}}
def gradients(leaves, **mask):
    return torch.autograd.grad(attention(*leaves, **mask).float().square().sum(), leaves)
native = {name: gradients(leaves, **mask) for name, mask in masks.items()}
products.install({dtype})
for name, mask in masks.items():
    wide = {key: value.float() if key == "attn_mask" else value for key, value in mask.items()}
    exact = gradients([leaf.detach().float().requires_grad_() for leaf in leaves], **wide)
    made = gradients(leaves, **mask)
    assert any((mine != torchs).any() for mine, torchs in zip(made, native[name])), "torch's own kernel ran"
    for mine, torchs, one in zip(made, native[name], exact):
        assert mine.dtype == dtype
        assert (mine.float() - one).norm() <= 1.02 * (torchs.float() - one).norm()
"""
OTHERS_STAY = """
left, right, row = draw(5, 70), draw(70, 6), draw(1, 70)
native = [row @ right, left.float() @ right.float(), left.double() @ right.double()]
products.install({dtype})
assert all(map(torch.equal, native, [row @ right, left.float() @ right.float(), left.double() @ right.double()]))
for wrong in (right.float(), right[:3], right[0]):
    try:
        torch.mm(left, wrong)
    except RuntimeError as error:
        print("refused", error)
    else:
        raise AssertionError
"""


def run(code: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", [ROUNDED_ONCE, BACKWARD, OTHERS_STAY], ids=["rounded_once", "backward", "others_stay"])
def test_products_are_rounded_once(case: str, dtype: str) -> None:
    run(BEGIN.replace("DTYPE", dtype) + case)


def test_a_cpu_without_the_instructions_gets_them() -> None:
    """Which those are is torch's to say: a training step takes seconds on a machine that is missed here."""
    code = """
products.install = print
torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: False
torch.ops.mkldnn._is_mkldnn_fp16_supported = lambda: True
torch.zeros(1, device="hpu")
"""
    assert run(BEGIN.replace("DTYPE", "bfloat16") + code) == "{torch.bfloat16}\n"
