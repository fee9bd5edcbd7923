"""`torch.hpu`: devices, streams, random numbers, memory and graphs of the emulated card."""

import contextlib
import os
import warnings
from collections.abc import Iterator

import torch

from habana_frameworks.emulator import device_alias
from habana_frameworks.torch.hpu import random  # noqa: F401
from habana_frameworks.torch.hpu.memory import *  # noqa: F403
from habana_frameworks.torch.hpu.metrics import *  # noqa: F403
from habana_frameworks.torch.hpu.random import *  # noqa: F403
from habana_frameworks.torch.hpu.streams import *  # noqa: F403
from habana_frameworks.torch.utils.internal import is_lazy

if is_lazy():
    from habana_frameworks.torch.hpu.graphs import *  # noqa: F403


def is_available() -> bool:
    return device_count() > 0


def device_count() -> int:
    """Cards of this host: HABANA_EMULATOR_DEVICES, or 8 as in a Gaudi node."""
    return int(os.environ.get("HABANA_EMULATOR_DEVICES", "8"))


def current_device() -> int:
    """Always 0: a process holds one card, whichever it is."""
    return 0


def set_device(device: torch.device | str | int) -> None:
    """Which of the host's modules this process takes; it has one card anyway."""
    index = _get_device_index(device, optional=True)
    modules = list(map(int, os.environ.get("HABANA_VISIBLE_MODULES", "0,1,2,3,4,5,6,7").split(",")))
    if index not in modules and index > len(modules):
        raise AssertionError(f"Trying to open device with idx={index} when only {modules} are avaliable)")
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


def _get_device_index(device: torch.device | str | int | None, optional: bool = False, allow_cpu: bool = False) -> int:
    """The index that a device names, -1 for cpu; the current one if it names none and that is `optional`."""
    if isinstance(device, int):
        return device
    device = None if device is None else torch.device(device)
    if device is not None and device.type not in (("hpu", "cpu") if allow_cpu else ("hpu",)):
        raise ValueError(f"Expected a hpu device, but got: {device}")
    if device is not None and device.type == "cpu":
        return -1
    if device is not None and device.index is not None:
        return device.index
    if not optional:
        raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
    return current_device()


def device(device: torch.device | str | int) -> contextlib.AbstractContextManager:
    """A context in which `device` is the current one, as it is anyway: 0, or the module that HLS_MODULE_ID names."""
    index, module = _get_device_index(device, optional=True), int(os.environ.get("HLS_MODULE_ID") or -1)
    if index not in (0, module):
        raise AssertionError(f"Requested device_id={index} is different from env_device_id={module}")
    return contextlib.nullcontext()


def get_device_capability(device: torch.device | str | int | None = None) -> str:
    return "1.24.0"


def get_device_properties(device: torch.device | str | int | None = None) -> str:
    return f"(name={get_device_name(device)!r}, emulated on the CPU)"


def can_device_access_peer(device: torch.device | str | int, peer_device: torch.device | str | int) -> bool:
    first, second = (_get_device_index(each, optional=True) for each in (device, peer_device))
    for index in (first, second):
        if not 0 <= index < device_count():
            raise AssertionError(f"Invalid device id : {index}")
    if first == second:
        raise AssertionError("Both the ids are same.")
    return True


def get_gencode_flags() -> str:
    return ""


def get_arch_list() -> list[str]:
    return [get_device_name()]


def set_autocast_hpu_enabled(enabled: bool) -> None:
    torch.set_autocast_enabled("hpu", enabled)


def set_autocast_hpu_dtype(dtype: torch.dtype) -> None:
    torch.set_autocast_dtype("hpu", dtype)


# What a card is told about how it shall compute. Here it is remembered and changes nothing, unless a line says so.

_told = {"dynamic_shape": True, "recompute": False, "deterministic": False}


def enable_dynamic_shape() -> None:
    _told["dynamic_shape"] = True


def disable_dynamic_shape() -> None:
    _told["dynamic_shape"] = False


def get_dynamic_shape_status() -> bool:
    return _told["dynamic_shape"]


def setDeterministic(val: bool) -> None:
    warnings.warn(
        "torch.hpu.setDeterministic is deprecated; use torch.use_deterministic_algorithms instead", stacklevel=2
    )
    _told["deterministic"] = bool(val)


def getDeterministic() -> bool:
    warnings.warn(
        "torch.hpu.getDeterministic is deprecated; use torch.are_deterministic_algorithms_enabled instead", stacklevel=2
    )
    return _told["deterministic"]


def enable_recompute_sdp(enabled: bool) -> None:
    """Whether FusedSDPA computes its softmax again in the backward pass, where a call does not say: what it refuses."""
    _told["recompute"] = bool(enabled)


def recompute_sdp_enabled() -> bool:
    return _told["recompute"]


@contextlib.contextmanager
def sdp_kernel(enable_recompute: bool = True) -> Iterator[dict]:
    """`enable_recompute_sdp` within the context."""
    before = recompute_sdp_enabled()
    enable_recompute_sdp(enable_recompute)
    try:
        yield {}
    finally:
        enable_recompute_sdp(before)


def enable_inference_mode() -> None:
    """Lets a card take weights for constants."""


def disable_inference_mode() -> None:
    """Ends it."""


def enable_quantization() -> None:
    """Lets a card's compiler quantize."""


def disable_quantization() -> None:
    """Ends it."""


def enable_matmul3d_2d_reshape() -> None:
    """Lets a card's compiler flatten matrices."""


def disable_matmul3d_2d_reshape() -> None:
    """Ends it."""


def is_bf16_supported() -> bool:
    return True


def is_autocast_hpu_enabled() -> bool:
    return torch.is_autocast_enabled("hpu")


def get_autocast_hpu_dtype() -> torch.dtype:
    return torch.get_autocast_dtype("hpu")
