"""Serves the device `hpu` from host memory.

Whoever asks torch for `hpu` gets a CPU tensor that answers `hpu:0` when asked for its device, since optimum-habana
takes its fused kernels only there; `placement` knows which ones do. Functions are replaced once, for all threads.
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
from torch.utils.data.dataloader import _SingleProcessDataLoaderIter

from habana_frameworks.emulator import autocast, files, metrics_file, placement, products, random_state, recording
from habana_frameworks.emulator.placement import CARD, HOST, asked, on_card, put, settle

HPU = torch.device("hpu", 0)
was_forked = False  # from a process that had touched the card
LIKE_FACTORIES = ("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like")
SHARING = ("as_tensor", "asarray")  # they may return what they got, or its memory
PINNED = "_emulated_pinned"  # mark of a storage
NEW_METHODS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")


def use() -> None:
    """The first touch of the device: says so, once, on rank 0."""
    if was_forked:
        raise RuntimeError("Cannot use the card in a forked process: the one that it was forked from holds it")
    if not placement.in_use:
        from torch.utils.checkpoint import DefaultDeviceType  # half a second that only some processes need

        placement.in_use = True
        placement.start()
        products.install(products.slow_dtypes())
        metrics_file.start()
        DefaultDeviceType.set_device_type("hpu")  # whose autocast checkpoints keep (hpu/__init__.py)
        if os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == "0":
            print("Emulating Gaudi on the CPU: speed and memory say nothing about a real card.", file=sys.stderr)


def in_use() -> bool:
    return placement.in_use


def names_hpu(device: Any) -> bool:
    if isinstance(device, torch.device):
        is_hpu = device.type == "hpu"
    elif isinstance(device, str):
        is_hpu = device.partition(":")[0] == "hpu"
    else:
        is_hpu = type(device) is int  # a bare index means the accelerator; safetensors asks so
    if is_hpu:
        use()
    return is_hpu


def place_named(device: Any) -> bool | None:
    """The place that a device means; None for any that is neither, such as meta."""
    if names_hpu(device):
        return CARD
    return HOST if str(device).partition(":")[0] == "cpu" else None


def host(device: Any) -> Any:
    """`cpu` for any hpu device, anything else unchanged."""
    return "cpu" if names_hpu(device) else device


def with_host_device(function: Callable) -> Callable:
    """`function`, a factory whose keyword `device` may name an hpu."""
    shares = function.__name__ in SHARING

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        device = kwargs.get("device")
        if kwargs.pop("pin_memory", False):
            return wrapper(*args, **kwargs).pin_memory()
        if device is None:
            return settle(function(*args, **kwargs))
        place = place_named(device)
        if place is None:
            return function(*args, **kwargs)
        kwargs["device"] = "cpu"
        if shares and isinstance(args[0], torch.Tensor):
            kwargs["device"] = HPU if place is CARD else "cpu"
            return args[0].to(**{name: value for name, value in kwargs.items() if name in ("device", "dtype", "copy")})
        return _ask(place, function, args, kwargs, copy=shares and place is CARD)

    return wrapper


def _ask(place: bool, factory: Callable, args: tuple, kwargs: dict, copy: bool = False) -> torch.Tensor:
    """What `factory` makes at that place; `copy`: in memory of its own."""
    before, asked.place = asked.place, place
    try:
        made = factory(*args, **kwargs)
        return put(made.clone() if copy else made, place)
    finally:
        asked.place = before


def install() -> None:
    metrics_file.read_settings()
    # Looking the set up fills torch's cache with the originals, which is what `with torch.device(...)` compares.
    for factory in _device_constructors() | {getattr(torch, name) for name in LIKE_FACTORIES}:
        for module in (torch, torch.fft, torch.nested):
            if getattr(module, factory.__name__, None) is factory:
                _replace(module, factory.__name__, with_host_device)
    for function in autocast.FUNCTIONS:
        _replace(torch, function.__name__, lambda native, function=function: functools.partial(function, native))
    _alias_device_context()
    torch.Generator = _generator_type(torch.Generator)
    _alias_tensor_methods()
    _alias_storage_copies()
    _alias_random()
    _pin_batches()
    _check_gradients()
    os.register_at_fork(after_in_child=_leave)
    warnings.filterwarnings("ignore", "'pin_memory' argument is set")  # on a card it is, and right
    torch.serialization.register_package(0, files.location_of, _restore)
    files.install()


def _leave() -> None:
    """A forked process, such as a DataLoader's worker, is on the CPU: it could not share a card either."""
    global was_forked
    was_forked, placement.in_use = was_forked or placement.in_use, False


def _replace(module: ModuleType, name: str, wrap: Callable[[Callable], Callable]) -> None:
    """Puts a wrapper in a function's place, also for TorchScript, which knows torch's functions by identity."""
    native = getattr(module, name)
    # A partial does not become a method where it is an attribute of a class, as torch.empty is in deepspeed.OnDevice.
    alias = functools.update_wrapper(functools.partial(wrap(native)), native)
    if builtin := _find_builtin(native):
        _register_builtin(alias, builtin)
    setattr(module, name, alias)


def _alias_device_context() -> None:
    """`with torch.device("hpu")`: factories that name no device make their tensors on the card."""
    enter, call = DeviceContext.__init__, DeviceContext.__torch_function__

    def __init__(context, device):
        context.on_card = names_hpu(device)
        enter(context, "cpu" if context.on_card else device)

    def __torch_function__(context, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if context.on_card and function in _device_constructors() and kwargs.get("device") is None:
            return _ask(CARD, function, args, {**kwargs, "device": "cpu"})
        return call(context, function, types, args, kwargs)

    DeviceContext.__init__, DeviceContext.__torch_function__ = __init__, __torch_function__


def _generator_type(native: type) -> type:
    class GeneratorType(type):
        def __call__(cls, device="cpu"):
            return native(host(device))

        def __instancecheck__(cls, instance):
            return isinstance(instance, native)

    return GeneratorType("Generator", (), {"__doc__": native.__doc__})


def _alias_tensor_methods() -> None:
    tensor = torch.Tensor
    native_to, native_type = _natively(tensor.to), _natively(tensor.type)
    native_device, native_get_device = tensor.device, tensor.get_device
    native_numpy, native_is_cpu = tensor.numpy, tensor.is_cpu

    @functools.wraps(native_to)
    def to(self, *args, **kwargs):
        given = kwargs.get("device")
        other = args[0] if args else kwargs.get("other")
        if given is not None:
            place = place_named(given)
            if place is CARD:
                kwargs["device"] = "cpu"
        elif isinstance(other, torch.Tensor):
            place = None if other.is_meta else on_card(other)
        elif args and not isinstance(other, torch.dtype) and other is not None:
            place = place_named(other)
            if place is CARD:
                args = ("cpu", *args[1:])
        else:
            place = None
        return _move(self, native_to(self, *args, **kwargs), place)

    def device(self) -> torch.device:
        return HPU if on_card(self) else native_device.__get__(self)

    @functools.wraps(native_type)
    def type_(self, dtype=None, *args, **kwargs):
        if dtype is None:
            name = native_type(self)
            return name.replace("torch.", "torch.hpu.") if self.is_hpu else name
        if isinstance(dtype, torch.dtype):
            return native_type(self, dtype, *args, **kwargs)
        name = dtype if isinstance(dtype, str) else f"{dtype.__module__}.{dtype.__name__}"
        result = native_type(self, name.replace(".hpu.", "."), *args, **kwargs)
        return _move(self, result, names_hpu("hpu") if ".hpu." in name else HOST)

    @functools.wraps(native_numpy)
    def numpy(self, *, force=False):
        if placement.strict and on_card(self):
            if not force:
                raise TypeError(
                    "can't convert hpu:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
                    "memory first."
                )
            self = self.detach().cpu()
        return native_numpy(self, force=force)

    def pin_memory(self, device=None):
        if placement.strict and on_card(self):
            raise RuntimeError(
                f"cannot pin '{self.type()}' only dense CPU tensors can be pinned (called at {placement.caller()})"
            )
        if self.is_pinned():
            return self
        pinned = self.clone()
        setattr(pinned.untyped_storage(), PINNED, True)
        return pinned

    tensor.to = to
    tensor.type = type_
    tensor.numpy = numpy
    tensor.device = property(device)
    tensor.is_hpu = property(lambda self: self.device.type == "hpu")
    tensor.get_device = lambda self: 0 if self.is_hpu else native_get_device(self)
    tensor.hpu = lambda self, device=None, non_blocking=False: self.to("hpu", non_blocking=non_blocking)
    torch.nn.Module.hpu = lambda self, device=None: self.to("hpu")
    tensor.pin_memory = pin_memory
    tensor.__dlpack__ = _of_the_host(tensor.__dlpack__)
    tensor.is_pinned = lambda self, device=None: getattr(self.untyped_storage(), PINNED, False)
    tensor.record_stream = lambda self, stream: None
    for name in NEW_METHODS:
        setattr(tensor, name, _following(_natively(getattr(tensor, name))))
    if placement.strict:
        tensor.is_cpu = property(lambda self: native_is_cpu.__get__(self) and not on_card(self))
        tensor.tolist = _reading(tensor.tolist)
        tensor.cpu = lambda self, memory_format=torch.preserve_format: self.to("cpu", memory_format=memory_format)


def _natively(method: Callable) -> Callable:
    """torch's own method, also within a mode such as `with torch.device(...)`, which would look up its replacement."""

    @functools.wraps(method)
    def native(*args, **kwargs):
        with torch._C.DisableTorchFunction():
            return method(*args, **kwargs)

    return native


def _move(source: torch.Tensor, result: torch.Tensor, place: bool | None) -> torch.Tensor:
    """`result`, made of `source`, at `place`: in memory of its own where that is another place."""
    if place is None or not placement.strict or result.is_meta:
        return result
    was_on_card = on_card(source)
    if was_on_card is place:
        return result
    if result is source:
        result = source.clone()
    if place is HOST:
        recording.went_to_host(result)
    put(result, place)
    if result.grad_fn is not None:  # the gradient goes the way back
        result.register_hook(lambda gradient: put(gradient.clone(), CARD if was_on_card else HOST))
    return result


def _of_the_host(method: Callable) -> Callable:
    """A method that would hand a card's memory to a library that takes it for the host's."""

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        if placement.strict and on_card(self):
            raise BufferError(f"DLPack has no device hpu (called at {placement.caller()})")
        return method(self, *args, **kwargs)

    return wrapper


def _reading(method: Callable) -> Callable:
    """A method that reads a card's tensor without an operation."""

    @functools.wraps(method)
    def wrapper(self):
        if recording.active and on_card(self):
            recording.warn_of_host_read()
        return method(self)

    return wrapper


def _following(method: Callable) -> Callable:
    """A method that makes a tensor beside its own one, unless its keyword `device` names another place."""

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        device = kwargs.get("device")
        place = (on_card(self) or HOST) if device is None else place_named(device)
        if place is None or not placement.in_use:
            return method(self, *args, **kwargs)
        if device is not None:
            kwargs["device"] = "cpu"
        return _ask(place, functools.partial(method, self), args, kwargs)

    return wrapper


def _alias_storage_copies() -> None:
    """copy.deepcopy of a tensor copies its storage, and with it where it is."""
    native = torch.UntypedStorage.clone

    @functools.wraps(native)
    def clone(self):
        copied = native(self)
        if placement.MARK in self.__dict__:
            setattr(copied, placement.MARK, self.__dict__[placement.MARK])
        return copied

    torch.UntypedStorage.clone = clone


def _alias_random() -> None:
    """torch.manual_seed and torch.seed seed the card too, and fork_rng forks it (core/torch_overwrites.py)."""
    native, native_seed, native_fork = torch.manual_seed, torch.seed, torch.random.fork_rng

    @functools.wraps(native)
    def manual_seed(seed):
        random_state.card_generator.manual_seed(int(seed))
        return native(seed)

    @functools.wraps(native_seed)
    def seed() -> int:
        chosen = native_seed()
        random_state.card_generator.manual_seed(chosen)
        return chosen

    @functools.wraps(native_fork)
    def fork_rng(*args, device_type=None, **kwargs):
        return native_fork(*args, device_type=device_type or "hpu", **kwargs)

    torch.manual_seed = torch.random.manual_seed = manual_seed
    torch.seed = torch.random.seed = seed
    torch.random.fork_rng = fork_rng


def _check_gradients() -> None:
    """A backward pass starts where its result is: torch's engine compares devices, and these are both the CPU's."""
    native, native_grad = torch.autograd._make_grads, torch.Tensor.grad

    def set_grad(self, gradient):
        if isinstance(gradient, torch.Tensor) and not gradient.is_meta and on_card(self) != on_card(gradient):
            raise RuntimeError(
                f"assigned grad has data located on a different device: {gradient.device}, not {self.device} "
                f"(called at {placement.caller()})"
            )
        native_grad.__set__(self, gradient)

    @functools.wraps(native)
    def make_gradients(outputs, gradients, *args, **kwargs):
        for output, gradient in zip(outputs, gradients, strict=False):
            both = isinstance(output, torch.Tensor) and isinstance(gradient, torch.Tensor)
            if both and on_card(output) != on_card(gradient):
                raise RuntimeError(
                    f"invalid gradient: expected device {output.device} but got {gradient.device} "
                    f"(called at {placement.caller()})"
                )
        return native(outputs, gradients, *args, **kwargs)

    torch.autograd._make_grads = make_gradients
    if placement.strict:
        torch.Tensor.grad = property(native_grad.__get__, set_grad, lambda self: native_grad.__set__(self, None))


def _pin_batches() -> None:
    """A DataLoader that is told to pin its batches does so; what its workers made is on the host anyway."""
    native = _SingleProcessDataLoaderIter.__init__

    @functools.wraps(native)
    def __init__(self, loader):
        native(self, loader)
        self._pin_memory = loader.pin_memory and placement.in_use

    _SingleProcessDataLoaderIter.__init__ = __init__


def _restore(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    if not names_hpu(location):
        return None
    if placement.strict:
        setattr(storage, placement.MARK, CARD)
    return storage
