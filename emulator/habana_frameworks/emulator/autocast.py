"""Gaudi's autocast: which operations a card computes in the lower precision, and which in float32.

The lists and their meaning are those of gaudi-pytorch-bridge 1.19.0 (hpu_ops/autocast_helpers.h and .cpp; the overloads
are those of its generated hpu_autocast_ops*.cpp). PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST and
PT_HPU_AUTOCAST_FP32_OPS_LIST name files that replace a list, a name a line.

Only tensors on the card are cast. Those of the host are cast as torch does it, by `torch.autocast("cpu")`.
"""

import functools
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from habana_frameworks.emulator import kernels, placement

LOWER = frozenset(
    """addbmm addmm baddbmm batch_norm bmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d dot
    dropout feature_dropout group_norm instance_norm layer_norm leaky_relu linear log_softmax matmul mean mm mul mv
    scaled_dot_product_attention softmax""".split()
)
FLOAT32 = frozenset(
    """acos addcdiv asin atan2 bilinear binary_cross_entropy binary_cross_entropy_with_logits cdist cosh
    cosine_embedding_loss cosine_similarity cross_entropy_loss dist div divide embedding embedding_bag erfinv exp expm1
    hinge_embedding_loss huber_loss kl_div l1_loss log log10 log1p log2 logsumexp margin_ranking_loss mse_loss
    multi_margin_loss multilabel_margin_loss nll_loss pdist poisson_nll_loss pow reciprocal renorm rsqrt sinh
    smooth_l1_loss soft_margin_loss softplus tan topk triplet_margin_loss true_divide truediv""".split()
)
PROMOTE = frozenset("add addcdiv addcmul cat div exp iadd mul pow stack sub truediv".split())
FIRST_ONLY = frozenset("batch_norm group_norm instance_norm layer_norm".split())
LISTS = {"PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST": LOWER, "PT_HPU_AUTOCAST_FP32_OPS_LIST": FLOAT32}

KEY = torch._C.DispatchKey.AutocastCPU
KEYS = torch._C.DispatchKeySet(KEY)


class _State(threading.local):
    """What was asked for each device of this thread. torch's own switch is that of the host, and is on for both."""

    def __init__(self):
        self.enabled = {"cpu": False, "hpu": False}
        self.dtype = torch.bfloat16


_state = _State()


# torch's functions of these names, after torch's own as their first argument


def is_autocast_enabled(native: Callable, *device: str) -> bool:
    asked = _state.enabled.get(*device) if device else None
    return native(*device) if asked is None else asked


def set_autocast_enabled(native: Callable, *arguments: Any) -> None:
    device, enabled = arguments if len(arguments) == 2 else (None, *arguments)
    if device not in _state.enabled:
        native(*arguments)
        return
    if device == "hpu" and enabled:
        register()
    _state.enabled[device] = enabled
    native("cpu", any(_state.enabled.values()))


def get_autocast_dtype(native: Callable, device: str) -> torch.dtype:
    return _state.dtype if device == "hpu" else native(device)


def set_autocast_dtype(native: Callable, device: str, dtype: torch.dtype) -> None:
    if device == "hpu":
        _state.dtype = dtype
    else:
        native(device, dtype)


FUNCTIONS = (is_autocast_enabled, set_autocast_enabled, get_autocast_dtype, set_autocast_dtype)


def as_one_kernel(function: Callable) -> Callable:
    """`function`, which stands for an operator of the plugin's own and takes its arguments by position.

    Autocast has kernels for torch's operators alone (scripts/gen_op_files/code_templates.py): it casts nothing here.
    """

    @functools.wraps(function)
    def wrapper(*args):
        if not torch.is_autocast_enabled("hpu"):
            return function(*args)
        with torch.autocast("hpu", enabled=False):
            return function(*args)

    return wrapper


def load_list(variable: str) -> frozenset[str]:
    path = os.environ.get(variable)
    if path is None:
        return LISTS[variable]
    try:
        return frozenset(Path(path).read_text().splitlines())
    except OSError:
        print(f"Failed to open file with ops to autocast: {path}. Default list loaded.", file=sys.stderr)
        return LISTS[variable]


_lower, _float32 = map(load_list, LISTS)  # as on a card: when the plugin is loaded, and not later


@functools.cache
def register() -> None:
    """Puts Gaudi's lists where torch looks for the CPU's, once; tensors of the host still find the CPU's."""
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, name = name.partition("::")
        base, _, overload = name.partition(".")
        if namespace != "aten":
            continue
        cast = find_cast(base)
        if cast is None and not kernels.has_kernel(f"aten::{name}", KEY.name):
            continue
        operation = getattr(getattr(torch.ops.aten, base), overload or "default")
        schema = operation._schema
        if schema.is_mutable or not any("Tensor" in str(argument.type) for argument in schema.arguments):
            continue
        kernels.replace(operation, KEY.name, functools.partial(_kernel, operation, cast))


def find_cast(name: str) -> Callable | None:
    """What is done to the arguments of the operation; the first list that has it decides."""
    if name in _lower:
        return _cast_first if name in FIRST_ONLY else _cast_lower
    if name in _float32:
        return _cast_to_float32
    return _promote if name in PROMOTE else None


def _kernel(operation: torch._ops.OpOverload, cast: Callable | None, native: Any) -> Callable:
    def kernel(keys, *args, **kwargs):
        if _state.enabled["cpu"] and native is not None and not any(map(placement.on_card, placement.tensors_in(args))):
            return native.call_boxed(keys, *args, **kwargs)
        with torch._C._ExcludeDispatchKeyGuard(KEYS):
            if cast is not None and _state.enabled["hpu"]:
                args, kwargs = cast(args, kwargs)
            return operation(*args, **kwargs)

    return kernel


def _is_eligible(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dtype is not torch.float64
        and placement.on_card(value)
    )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """No cast is kept for the next time, as on a card."""
    if isinstance(value, (list, tuple)):
        return [_cast(each, dtype) for each in value]
    if _is_eligible(value) and value.dtype != dtype:
        return torch.ops.aten.to.dtype(value, dtype)
    return value


def _cast_all(args: tuple, kwargs: dict, dtype: torch.dtype) -> tuple[list, dict]:
    return _cast(args, dtype), {name: _cast(value, dtype) for name, value in kwargs.items()}


def _cast_lower(args: tuple, kwargs: dict) -> tuple[list, dict]:
    return _cast_all(args, kwargs, _state.dtype)


def _cast_to_float32(args: tuple, kwargs: dict) -> tuple[list, dict]:
    return _cast_all(args, kwargs, torch.float32)


def _cast_first(args: tuple, kwargs: dict) -> tuple[list, dict]:
    return [_cast(args[0], _state.dtype), *args[1:]], kwargs


def _promote(args: tuple, kwargs: dict) -> tuple[list, dict]:
    """To the widest type, at least the lower precision (torch's `prioritize`)."""
    dtype = _state.dtype
    for value in filter(_is_eligible, placement.tensors_in((*args, *kwargs.values()))):
        if torch.float32 in (dtype, value.dtype):
            dtype = torch.float32
        elif value.dtype != dtype:
            raise RuntimeError("Unexpected floating ScalarType in at::autocast::prioritize")
    return _cast_all(args, kwargs, dtype)
