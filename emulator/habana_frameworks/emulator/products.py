"""Matrix products of bfloat16 and float16 on a CPU that has no instructions for them (x86 without AVX-512).

There torch 2.13 multiplies number by number, 10 to 80 times slower than in float32, and a training step takes seconds.
Here such a product is computed in float32 and rounded once, as a card does it; so is attention's backward pass.
"""

from collections.abc import Callable, Set
from functools import partial
from typing import Any

import torch

from habana_frameworks.emulator import kernels

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
FEW = 4  # with fewer rows or columns a product is as fast as reading its numbers


def slow_dtypes() -> set[torch.dtype]:
    """Those whose products this CPU computes number by number."""
    of_cpu = torch.ops.mkldnn
    supported = {torch.bfloat16: of_cpu._is_mkldnn_bf16_supported(), torch.float16: of_cpu._is_mkldnn_fp16_supported()}
    return {dtype for dtype, is_supported in supported.items() if not is_supported}


def install(dtypes: Set[torch.dtype]) -> None:
    """Puts the faster kernels in the place of torch's own for the CPU, below autograd and autocast."""
    if dtypes:
        for operation in PRODUCTS:
            kernels.replace(operation, "CPU", partial(_product, operation, dtypes))
        kernels.replace(ATTENTION, "CPU", partial(_attention_backward, dtypes))


def _product(operation: torch._ops.OpOverload, dtypes: Set[torch.dtype], native: Any) -> Callable:
    def kernel(keys, *args, **kwargs):
        left, right = args[-2:]
        dtype = left.dtype
        is_fast = dtype not in dtypes or (left.dim() == 2 and min(left.shape[0], right.shape[-1]) < FEW)
        if is_fast or any(each.dtype != dtype for each in args):  # torch's own refuses these
            return native.call_boxed(keys, *args, **kwargs)
        return operation(*map(torch.Tensor.float, args), **kwargs).to(dtype)

    return kernel


def _attention_backward(dtypes: Set[torch.dtype], native: Any) -> Callable:
    def kernel(keys, gradient, *args, **kwargs):
        dtype = gradient.dtype
        if dtype not in dtypes:
            return native.call_boxed(keys, gradient, *args, **kwargs)

        def widen(value: Any) -> Any:
            return value.float() if isinstance(value, torch.Tensor) and value.dtype == dtype else value

        wide = {name: widen(value) for name, value in kwargs.items()}
        return tuple(each.to(dtype) for each in ATTENTION(*map(widen, (gradient, *args)), **wide))

    return kernel
