"""Autocast for dry tensors, which torch itself leaves as they are.

The lists are those of gaudi-pytorch-bridge 1.19.0 (hpu_ops/autocast_helpers.h), or the files of one name a line that
PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST and PT_HPU_AUTOCAST_FP32_OPS_LIST name, as for the real plugin.
"""

import os
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from habana_frameworks.emulator.dry import is_dry

LOWER = """addmm addbmm baddbmm bmm batch_norm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
dot dropout feature_dropout group_norm instance_norm
layer_norm leaky_relu linear matmul mean mm mul mv softmax log_softmax
scaled_dot_product_attention""".split()
FLOAT32 = """acos addcdiv asin atan2 bilinear binary_cross_entropy binary_cross_entropy_with_logits cdist cosh
cosine_embedding_loss cosine_similarity cross_entropy cross_entropy_loss dist div divide embedding embedding_bag erfinv
exp expm1 hinge_embedding_loss huber_loss kl_div l1_loss log log10 log1p log2 logsumexp margin_ranking_loss mse_loss
multi_margin_loss multilabel_margin_loss nll_loss pdist poisson_nll_loss pow reciprocal renorm rsqrt sinh smooth_l1_loss
soft_margin_loss softplus tan topk triplet_margin_loss truediv true_divide""".split()
FIRST_ONLY = {"layer_norm", "group_norm", "instance_norm", "batch_norm"}
OPERATORS = {"__matmul__": "matmul", "__rmatmul__": "matmul", "__mul__": "mul", "__rmul__": "mul", "__truediv__": "div"}
OPERATORS |= {"__rtruediv__": "div", "__pow__": "pow", "__rpow__": "pow", "multiply": "mul"}


def _names(variable: str, default: list[str]) -> set[str]:
    path = os.environ.get(variable)
    return set(Path(path).read_text().split() if path else default)


class _Casting(TorchFunctionMode):
    """Casts what functions of the lists are called with; weights once, as long as the outermost context lasts."""

    def __init__(self, dtype: torch.dtype, lower: set[str], wide: set[str]):
        super().__init__()
        self.dtype, self.lower, self.wide = dtype, lower, wide
        self.weights: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        name = OPERATORS.get(name, name)
        dtype = self.dtype if name in self.lower else torch.float32 if name in self.wide else None
        if dtype is not None and torch.is_autocast_enabled("cpu"):
            if name in FIRST_ONLY:
                args = (self.cast(args[0], dtype), *args[1:]) if args else args
            else:
                args = tuple(self.cast(argument, dtype) for argument in args)
                kwargs = {key: self.cast(value, dtype) for key, value in kwargs.items()}
        return function(*args, **kwargs)

    def cast(self, value, dtype: torch.dtype):
        if not isinstance(value, torch.Tensor) or not is_dry(value) or value.dtype == dtype:
            return value
        if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return value
        if dtype == self.dtype and value.is_leaf and value.requires_grad and value.dtype == torch.float32:
            if id(value) not in self.weights:
                self.weights[id(value)] = value, value.to(dtype)
            return self.weights[id(value)][1]
        return value.to(dtype)


def install() -> None:
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__
    lower = _names("PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST", LOWER)
    wide = _names("PT_HPU_AUTOCAST_FP32_OPS_LIST", FLOAT32)

    def enter_and_cast(context):
        context.casting = None
        if context.device == "hpu" and context._enabled and not torch.is_autocast_enabled("cpu"):
            context.casting = _Casting(context.fast_dtype, lower, wide)
            context.casting.__enter__()
        return enter(context)

    def leave_and_cast(context, *exception):
        result = leave(context, *exception)
        if context.casting is not None:
            context.casting.__exit__(*exception)
        return result

    torch.autocast.__enter__, torch.autocast.__exit__ = enter_and_cast, leave_and_cast
