"""`torch.hpu`: devices, streams, random numbers, memory and graphs of the emulated card."""

import contextlib
import os
import warnings
from collections.abc import Iterator

import torch

from habana_frameworks.emulator import device_alias
from habana_frameworks.torch.hpu import _utils, random  # noqa: F401
from habana_frameworks.torch.hpu._utils import _get_device_index, device_count, require_device
from habana_frameworks.torch.hpu.memory import *  # noqa: F403
from habana_frameworks.torch.hpu.metrics import *  # noqa: F403
from habana_frameworks.torch.hpu.random import *  # noqa: F403
from habana_frameworks.torch.hpu.streams import *  # noqa: F403
from habana_frameworks.torch.utils.internal import is_lazy

if is_lazy():
    from habana_frameworks.torch.hpu.graphs import *  # noqa: F403


def is_available() -> bool:
    return device_count() > 0


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
    require_device(device)
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


class device:
    """A context in which `device` is the current one, as it is anyway: 0, or the module that HLS_MODULE_ID names."""

    def __init__(self, device: torch.device | str | int):
        index, module = _get_device_index(device, optional=True), int(os.environ.get("HLS_MODULE_ID") or -1)
        if index not in (0, module):
            raise AssertionError(f"Requested device_id={index} is different from env_device_id={module}")

    def __enter__(self) -> None:
        """It is."""

    def __exit__(self, *exception) -> None:
        """It stays so."""


class device_of(device):
    """A context in which the device of a tensor is the current one."""

    def __init__(self, obj: torch.Tensor):
        super().__init__(obj.get_device() if obj.is_hpu else -1)


def get_device_capability(device: torch.device | str | int | None = None) -> str:
    require_device(device)
    return "1.24.0"


def get_device_properties(device: torch.device | str | int | None = None) -> str:
    require_device(device)
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


def memory_usage(device: torch.device | str | int | None = None) -> int:
    return memory_allocated(device)  # noqa: F405


def set_sync_debug_mode(debug_mode: bool) -> None:
    """Told to the plugin by a variable. Here operations have ended anyway."""
    os.environ["PT_ENABLE_HABANA_STREAMASYNC"] = str(debug_mode)


def get_sync_debug_mode() -> int:
    return int(os.environ["PT_ENABLE_HABANA_STREAMASYNC"])


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


def enable_optim_output_sif() -> None:
    """Lets a card infer the shapes of outputs faster."""


def disable_optim_output_sif() -> None:
    """Ends it."""


def enable_const_section_serialization(path: str, clear_path: bool, use_compression: bool) -> None:
    """Lets a card write its constants to files."""


def disable_const_section_serialization() -> None:
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


def _tensor_type(name: str, dtype: torch.dtype) -> type:
    """The old constructor of tensors of this type on the card."""

    def new(cls, *args, **kwargs):
        for option, only in (("device", "hpu"), ("dtype", dtype)):
            if kwargs.get(option) not in (None, only):
                raise RuntimeError(f"legacy constructor expects {option}: {only}, not {kwargs[option]}")
        return torch.Tensor._make_subclass(cls, torch.tensor(*args, **kwargs | {"device": "hpu", "dtype": dtype}))

    return type(name, (torch.Tensor,), {"__new__": staticmethod(new), "__module__": __name__})


BFloat16Tensor = _tensor_type("BFloat16Tensor", torch.bfloat16)
BoolTensor = _tensor_type("BoolTensor", torch.bool)
ByteTensor = _tensor_type("ByteTensor", torch.uint8)
CharTensor = _tensor_type("CharTensor", torch.int8)
DoubleTensor = _tensor_type("DoubleTensor", torch.float64)
FloatTensor = _tensor_type("FloatTensor", torch.float32)
HalfTensor = _tensor_type("HalfTensor", torch.float16)
IntTensor = _tensor_type("IntTensor", torch.int32)
LongTensor = _tensor_type("LongTensor", torch.int64)
ShortTensor = _tensor_type("ShortTensor", torch.int16)
