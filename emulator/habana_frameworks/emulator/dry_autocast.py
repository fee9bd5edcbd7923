"""Autocast for dry tensors, which torch itself leaves as they are. Its lists are those of the emulator's autocast."""

import torch
from torch.overrides import TorchFunctionMode

from habana_frameworks.emulator.autocast import FIRST_ONLY, LISTS, load_list
from habana_frameworks.emulator.dry import is_dry

# Python's names of what the lists name
OPERATIONS = {"__matmul__": "matmul", "__rmatmul__": "matmul", "__mul__": "mul", "__rmul__": "mul", "multiply": "mul"}
OPERATIONS |= {"__truediv__": "div", "__rtruediv__": "div", "__pow__": "pow", "__rpow__": "pow"}
OPERATIONS |= {"cross_entropy": "cross_entropy_loss"}


class _Casting(TorchFunctionMode):
    """Casts what functions of the lists are called with. As on a card, no cast is kept for the next call."""

    def __init__(self, dtype: torch.dtype, lower: frozenset[str], wide: frozenset[str]):
        super().__init__()
        self.dtype, self.lower, self.wide = dtype, lower, wide

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        name = OPERATIONS.get(name, name)
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
        return value.to(dtype)


def install() -> None:
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__
    lower, wide = map(load_list, LISTS)

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
