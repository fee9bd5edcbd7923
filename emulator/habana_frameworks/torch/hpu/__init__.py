"""`torch.hpu`: devices, streams, random numbers, memory and graphs of the emulated card."""

import contextlib
import os

import torch

from habana_frameworks.emulator import device_alias
from habana_frameworks.torch.hpu import random  # noqa: F401
from habana_frameworks.torch.hpu.graphs import *  # noqa: F403
from habana_frameworks.torch.hpu.memory import *  # noqa: F403
from habana_frameworks.torch.hpu.random import *  # noqa: F403
from habana_frameworks.torch.hpu.streams import *  # noqa: F403


def is_available() -> bool:
    return device_count() > 0


def device_count() -> int:
    """Cards of this host: HABANA_EMULATOR_DEVICES, or 8 as in a Gaudi node."""
    return int(os.environ.get("HABANA_EMULATOR_DEVICES", "8"))


def current_device() -> int:
    """Always 0: a process holds one card, whichever it is."""
    return 0


def set_device(device: torch.device | str | int) -> None:
    device_alias.use()


def get_device_name(device: torch.device | str | int | None = None) -> str:
    return "GAUDI2"


def init() -> None:
    device_alias.use()


_lazy_init = init


def is_initialized() -> bool:
    return device_alias.in_use()


def __getattr__(name: str) -> bool:
    if name == "_initialized":  # what torch.utils.checkpoint looks at before it keeps the device's random state
        return device_alias.in_use()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def device(device: torch.device | str | int) -> contextlib.AbstractContextManager:
    """A context in which `device` is the current one, as it is anyway."""
    return contextlib.nullcontext()


def empty_cache() -> None:
    """Host memory goes back to Python's allocator by itself."""


def enable_dynamic_shape() -> None:
    """Shapes are always dynamic here."""


def disable_dynamic_shape() -> None:
    """Shapes are always dynamic here."""


def is_bf16_supported() -> bool:
    return True


def is_autocast_hpu_enabled() -> bool:
    return torch.is_autocast_enabled("hpu")


def get_autocast_hpu_dtype() -> torch.dtype:
    return torch.get_autocast_dtype("hpu")


def sdp_kernel(enable_recompute: bool = False) -> contextlib.AbstractContextManager:
    """Whether FusedSDPA keeps its softmax for the backward pass: here it never does."""
    return contextlib.nullcontext()
