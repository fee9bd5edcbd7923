"""Serves the device `hpu` from host memory.

Whoever asks torch for `hpu` gets a CPU tensor, and from then on every CPU tensor of the process answers `hpu:0` when
asked for its device, since optimum-habana takes its fused kernels only there. Functions are replaced once, for all
threads. Storages stay CPU storages, so saved files load in a torch that has never heard of hpu.
"""

import functools
import os
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.jit._builtins import _find_builtin, _register_builtin
from torch.utils._device import DeviceContext, _device_constructors

from habana_frameworks.emulator import metrics_file

HPU = torch.device("hpu", 0)
LIKE_FACTORIES = ("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like")
NEW_METHODS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
AUTOCAST_FUNCTIONS = ("is_autocast_enabled", "set_autocast_enabled", "get_autocast_dtype", "set_autocast_dtype")

in_use = False


def use() -> None:
    """The first touch of the device: says so, once, on rank 0."""
    global in_use
    if not in_use:
        in_use = True
        metrics_file.start()
        if os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == "0":
            print("Emulating Gaudi on the CPU: speed and memory say nothing about a real card.", file=sys.stderr)


def host(device: Any) -> Any:
    """`cpu` for any hpu device, anything else unchanged."""
    if isinstance(device, torch.device):
        is_hpu = device.type == "hpu"
    elif isinstance(device, str):
        is_hpu = device.partition(":")[0] == "hpu"
    else:
        is_hpu = type(device) is int  # a bare index means the accelerator; safetensors asks so
    if not is_hpu:
        return device
    use()
    return "cpu"


def with_host_device(function: Callable) -> Callable:
    """`function`, whose keyword `device` may name an hpu."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if kwargs.get("device") is not None:
            kwargs["device"] = host(kwargs["device"])
        return function(*args, **kwargs)

    return wrapper


def with_cpu_autocast(function: Callable) -> Callable:
    """`function`, whose first argument is a device type: asking about hpu's autocast is no use of the device."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*("cpu" if argument == "hpu" else argument for argument in args), **kwargs)

    return wrapper


def install() -> None:
    # Looking the set up fills torch's cache with the originals, which is what `with torch.device(...)` compares.
    for factory in _device_constructors() | {getattr(torch, name) for name in LIKE_FACTORIES}:
        for module in (torch, torch.fft, torch.nested):
            if getattr(module, factory.__name__, None) is factory:
                _replace(module, factory.__name__, with_host_device)
    for name in AUTOCAST_FUNCTIONS:
        _replace(torch, name, with_cpu_autocast)
    DeviceContext.__init__ = _with_host_context(DeviceContext.__init__)
    torch.Generator = _generator_type(torch.Generator)
    _alias_tensor_methods()
    os.register_at_fork(after_in_child=_leave)
    warnings.filterwarnings("ignore", "'pin_memory' argument is set")  # on a card it is, and right
    # Files that were written on a Gaudi name hpu as the place of their storages.
    torch.serialization.register_package(0, lambda storage: None, _restore)


def _leave() -> None:
    """A forked process, such as a DataLoader's worker, is on the CPU: it could not share a card either."""
    global in_use
    in_use = False


def _replace(module: ModuleType, name: str, wrap: Callable[[Callable], Callable]) -> None:
    """Puts a wrapper in a function's place, also for TorchScript, which knows torch's functions by identity."""
    native = getattr(module, name)
    # A partial does not become a method where it is an attribute of a class, as torch.empty is in deepspeed.OnDevice.
    alias = functools.update_wrapper(functools.partial(wrap(native)), native)
    if builtin := _find_builtin(native):
        _register_builtin(alias, builtin)
    setattr(module, name, alias)


def _with_host_context(enter: Callable) -> Callable:
    return lambda context, device: enter(context, host(device))


def _generator_type(native: type) -> type:
    class GeneratorType(type):
        def __call__(cls, device="cpu"):
            return native(host(device))

        def __instancecheck__(cls, instance):
            return isinstance(instance, native)

    return GeneratorType("Generator", (), {"__doc__": native.__doc__})


def _alias_tensor_methods() -> None:
    tensor = torch.Tensor
    native_to, native_device, native_get_device = tensor.to, tensor.device, tensor.get_device
    native_type = tensor.type

    @functools.wraps(native_to)
    def to(self, *args, **kwargs):
        if kwargs.get("device") is not None:
            kwargs["device"] = host(kwargs["device"])
        elif args:
            args = (host(args[0]), *args[1:])
        return native_to(self, *args, **kwargs)

    def device(self) -> torch.device:
        native = native_device.__get__(self)
        return HPU if in_use and native.type == "cpu" else native

    @functools.wraps(native_type)
    def type_(self, dtype=None, *args, **kwargs):
        if dtype is not None:
            return native_type(self, dtype.replace(".hpu.", ".") if isinstance(dtype, str) else dtype, *args, **kwargs)
        name = native_type(self)
        return name.replace("torch.", "torch.hpu.") if self.is_hpu else name

    tensor.to = to
    tensor.type = type_
    tensor.device = property(device)
    tensor.is_hpu = property(lambda self: self.device.type == "hpu")
    tensor.get_device = lambda self: 0 if self.is_hpu else native_get_device(self)
    tensor.hpu = lambda self, device=None, non_blocking=False: self.to("hpu", non_blocking=non_blocking)
    torch.nn.Module.hpu = lambda self, device=None: self.to("hpu")
    tensor.pin_memory = lambda self, device=None: self
    tensor.record_stream = lambda self, stream: None
    for name in NEW_METHODS:
        setattr(tensor, name, with_host_device(getattr(tensor, name)))


def _restore(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    return storage if host(location) != location else None
