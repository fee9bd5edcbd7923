"""The dry card: `hpu` without memory, to learn what a run needs before there is a card (HABANA_EMULATOR_DRY=1).

Tensors of the device are torch's meta tensors: they have a shape, a dtype and a storage of a size, and no data. So are
tensors that come back from the device to the host, whatever their size. A program's own meta tensors are told apart:
each storage is noted with the place that it would be in, and `Tensor.device` answers with it.

Small values that the host put on the device are remembered, and what is computed from them alone is known too. Other
reads by the host get an answer: 1.0, 0 or False.
"""

import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._device import DeviceContext, _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from habana_frameworks.emulator.device_alias import LIKE_FACTORIES

HPU, CPU, META = torch.device("hpu", 0), torch.device("cpu"), torch.device("meta")
NEW_METHODS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
AUTOCAST_FUNCTIONS = ("is_autocast_enabled", "set_autocast_enabled", "get_autocast_dtype", "set_autocast_dtype")
REMEMBERED = 1 << 16  # elements of a tensor whose values are kept
HOST_LIMIT = 1 << 25  # bytes of a tensor on the host that is really allocated

_native_device = torch.Tensor.device.__get__
# Before anybody replaces them: DeepSpeed does while it constructs a model under ZeRO-3
native_empty, native_empty_like, native_ones = torch.empty, torch.empty_like, torch.ones
is_wanted = os.environ.get("HABANA_EMULATOR_DRY", "0") != "0"


class Storage(NamedTuple):
    """What is known of a storage without data."""

    place: torch.device
    alive: weakref.ref


class HostRead(NamedTuple):
    """The host waited for a value of the card."""

    file: str
    line: int
    function: str


storages: dict[int, Storage] = {}  # by address
values: dict[int, torch.UntypedStorage] = {}  # of those whose content is known
on_birth: list[Callable[[torch.UntypedStorage, torch.Tensor, torch.device], None]] = []
on_death: list[Callable[[int], None]] = []
on_host_read: list[Callable[[HostRead], None]] = []
not_the_host = ["/torch/", "/habana_frameworks/"]  # whose code does not read of its own accord
_state = threading.local()


def native_device(tensor: torch.Tensor) -> torch.device:
    """Not through modes of torch functions, such as autocast's, which would answer with the place."""
    with torch._C.DisableTorchFunction():
        return _native_device(tensor)


def is_dry(tensor: torch.Tensor) -> bool:
    return native_device(tensor).type == "meta"


def place_of(tensor: torch.Tensor) -> torch.device:
    """The device that the tensor would be on."""
    device = native_device(tensor)
    if device.type != "meta":
        return device
    known = storages.get(tensor.untyped_storage()._cdata)
    return known.place if known else META


@contextmanager
def placing(place: torch.device | None) -> Iterator[None]:
    """Meta tensors that are made in here are on `place`."""
    before = getattr(_state, "place", None)
    _state.place = place
    try:
        yield
    finally:
        _state.place = before


class _Death(weakref.ref):
    __slots__ = ("address",)


def _forget(death: _Death) -> None:
    storages.pop(death.address, None)
    values.pop(death.address, None)
    for tell in on_death:
        tell(death.address)


def _note(tensor: torch.Tensor, place: torch.device) -> None:
    """A new storage; one that is known stays where it is."""
    storage = tensor.untyped_storage()
    address = storage._cdata
    if address in storages:
        return
    death = _Death(storage, _forget)
    death.address = address
    storages[address] = Storage(place, death)
    for tell in on_birth:
        tell(storage, tensor, place)


# Known values


def known(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor with its values, a view of those that are remembered for its storage."""
    if not is_dry(tensor):
        return tensor
    storage = values.get(tensor.untyped_storage()._cdata)
    if storage is None:
        return None
    twin = native_empty(0, dtype=tensor.dtype, device=CPU)
    twin.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
    return twin


def _remember(tensor: torch.Tensor, twin: torch.Tensor) -> None:
    storage = tensor.untyped_storage()
    if twin.shape != tensor.shape or storage.nbytes() > 8 * REMEMBERED:
        return
    same = native_empty(0, dtype=tensor.dtype, device=CPU)
    same.set_(torch.UntypedStorage(storage.nbytes()), tensor.storage_offset(), tensor.shape, tensor.stride())
    same.copy_(twin)
    values[storage._cdata] = same.untyped_storage()


def answer(tensor: torch.Tensor) -> torch.Tensor:
    """What the host reads: the values that are known, else ones of a floating type and zeros of any other."""
    twin = known(tensor.detach())
    if twin is not None:
        return twin
    return (
        native_ones((), dtype=tensor.dtype, device=CPU)
        .mul(tensor.is_floating_point())
        .to(tensor.dtype)
        .expand(tensor.shape)
    )


def _tell_host_read() -> None:
    if not on_host_read:
        return
    frame = sys._getframe(1)
    while frame is not None and any(part in frame.f_code.co_filename for part in not_the_host):
        frame = frame.f_back
    if frame is not None:
        read = HostRead(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        for tell in on_host_read:
            tell(read)


# Operations

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default}
DETACHED = {aten.detach.default, aten.alias.default, aten.view.default, aten._unsafe_view.default, aten.t.default}
RANDOM = ("rand", "normal", "uniform", "dropout", "bernoulli", "multinomial", "exponential", "empty")


class DryMode(TorchDispatchMode):
    """Gives each new storage its place, answers the host's reads, and computes small values that are known."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and looking for it imports torch's compiler

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before, _state.inside = getattr(_state, "inside", False), True
        try:
            return self._run(operation, args, kwargs)
        finally:
            _state.inside = before

    def _run(self, operation, args: tuple, kwargs: dict):
        tensors = [leaf for leaf in _flat(args, kwargs) if isinstance(leaf, torch.Tensor)]
        dry = [tensor for tensor in tensors if is_dry(tensor)]
        device = kwargs.get("device")
        if not dry and (device is None or device.type == "cpu"):
            return self._run_on_host(operation, args, kwargs)
        if operation in READS:
            if place_of(dry[0]).type == "hpu":
                _tell_host_read()
            return answer(dry[0]).item()
        places = {place_of(tensor).type for tensor in dry}
        inherited = HPU if "hpu" in places else CPU if "cpu" in places else META
        asked = getattr(_state, "place", None) if device is not None else None
        place = asked or (CPU if device is not None and device.type == "cpu" else inherited)
        if device is not None and device.type == "cpu":
            if "hpu" in places:
                _tell_host_read()
            kwargs = {**kwargs, "device": META}
        if operation is aten.copy_.default and native_device(args[0]).type != "meta":
            if places == {"hpu"}:
                _tell_host_read()
            return args[0].copy_(answer(args[1]))
        if places == {"cpu"} and len(dry) < len(tensors) and operation is not aten.copy_.default:
            args, kwargs = tree_map_only(torch.Tensor, _without_data, (args, kwargs))
        if operation is aten.index.Tensor:
            args = (args[0], _as_positions(args[1]))
        twins = self._compute_known(operation, args, kwargs, tensors)
        result = operation(*args, **kwargs)
        for leaf in _flat((result,), {}):
            if isinstance(leaf, torch.Tensor) and is_dry(leaf):
                _note(leaf, place)
        if twins is not None:
            for leaf, twin in zip(_flat((result,), {}), _flat((twins,), {}), strict=True):
                if isinstance(leaf, torch.Tensor) and is_dry(leaf) and leaf.untyped_storage()._cdata not in values:
                    _remember(leaf, twin)
        return result

    def _run_on_host(self, operation, args: tuple, kwargs: dict):
        """Large tensors of the host need no memory either."""
        if kwargs.get("device") is not None and operation.overloadpacket in FACTORIES:
            size = args[0] if args and isinstance(args[0], (list, tuple, torch.Size)) else ()
            numbers = functools.reduce(lambda product, length: product * int(length), size, 1)
            if numbers * 4 > HOST_LIMIT:
                result = operation(*args, **{**kwargs, "device": META, "pin_memory": False})
                _note(result, CPU)
                return result
        return operation(*args, **kwargs)

    def _compute_known(self, operation, args: tuple, kwargs: dict, tensors: list) -> Any:
        """Runs the operation on remembered values, if all inputs are known; else forgets those that it overwrites."""
        namespace = operation.namespace
        if namespace == "c10d":  # other ranks are taken to say the same
            return None
        if all(
            tensor.numel() <= REMEMBERED and native_device(tensor).type == "cpu" or _is_known(tensor)
            for tensor in tensors
        ):
            name = operation.overloadpacket.__name__
            if namespace == "aten" and not any(word in name for word in RANDOM) and (tensors or _is_small(args)):
                known_args, known_kwargs = tree_map_only(torch.Tensor, known, (args, kwargs))
                if known_kwargs.get("device") is not None:
                    known_kwargs["device"] = CPU
                try:
                    return operation(*known_args, **known_kwargs)
                except RuntimeError:  # what the CPU does not compute in this dtype stays unknown
                    pass
        for name, argument in zip(operation._schema.arguments, args, strict=False):
            if name.alias_info is not None and name.alias_info.is_write:
                for tensor in _flat((argument,), {}):
                    if isinstance(tensor, torch.Tensor) and is_dry(tensor):
                        values.pop(tensor.untyped_storage()._cdata, None)
        return None


FACTORIES = {aten.empty, aten.zeros, aten.ones, aten.full, aten.rand, aten.randn}


def _as_positions(indices: list) -> list:
    """Masks among the indices as positions: the shape of what they choose follows from their values."""
    found: list = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            found.append(index)
            continue
        if place_of(index).type == "hpu":
            _tell_host_read()
        found.extend(_without_data(positions) for positions in answer(index).nonzero().unbind(1))
    return found


def _is_known(tensor: torch.Tensor) -> bool:
    return is_dry(tensor) and tensor.untyped_storage()._cdata in values


def _is_small(args: tuple) -> bool:
    sizes = [item for argument in args for item in (argument if isinstance(argument, (list, tuple)) else [argument])]
    return (
        functools.reduce(lambda a, b: a * (abs(int(b)) or 1), [x for x in sizes if isinstance(x, (int, float))], 1)
        <= REMEMBERED
    )


def _flat(args: tuple, kwargs: dict) -> list:
    leaves = []
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, (list, tuple)):
            leaves.extend(_flat(argument, {}))
        else:
            leaves.append(argument)
    return leaves


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor on the host, but for the data."""
    if is_dry(tensor):
        return tensor
    with placing(CPU):
        dry = native_empty_like(tensor, device=META)
    if tensor.numel() <= REMEMBERED:
        _remember(dry, tensor)
    return dry


# The device as programs see it


def host(device: Any) -> tuple[Any, torch.device | None]:
    """The device to ask torch for, and the place that is meant."""
    if isinstance(device, (torch.device, str)):
        kind = torch.device(device).type if isinstance(device, torch.device) else device.partition(":")[0]
        return (META, HPU) if kind == "hpu" else (device, META if kind == "meta" else None)
    return (META, HPU) if type(device) is int else (device, None)


def _with_place(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        device = kwargs.get("device")
        if device is None:
            return function(*args, **kwargs)
        kwargs["device"], place = host(device)
        with placing(place):
            return function(*args, **kwargs)

    return wrapper


def _on_host_first(function: Callable) -> Callable:
    """`function` makes tensors from Python's values, out of sight of the mode where it makes them on the device."""

    @functools.wraps(function)
    def wrapper(data, *args, **kwargs):
        device = kwargs.pop("device", None)
        if isinstance(data, torch.Tensor) and native_device(data).type == "meta":
            return data.to(device=device or data.device, dtype=kwargs.get("dtype") or data.dtype)
        made = function(data, *args, **kwargs)
        return made if device is None else made.to(device)

    return wrapper


def _with_cpu_autocast(function: Callable) -> Callable:
    """`function`, whose first argument is a device type: asking about hpu's autocast is no use of the device."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*("cpu" if argument == "hpu" else argument for argument in args), **kwargs)

    return wrapper


def install() -> None:
    for factory in _device_constructors() | {getattr(torch, name) for name in LIKE_FACTORIES}:
        for module in (torch, torch.fft, torch.nested):
            if getattr(module, factory.__name__, None) is factory:
                native = getattr(module, factory.__name__)
                # A partial does not become a method where it is an attribute of a class.
                alias = functools.update_wrapper(functools.partial(_with_place(native)), native)
                setattr(module, factory.__name__, alias)
    for name in AUTOCAST_FUNCTIONS:
        setattr(torch, name, _with_cpu_autocast(getattr(torch, name)))
    for name in ("tensor", "as_tensor", "asarray"):
        setattr(torch, name, _on_host_first(getattr(torch, name)))
    _install_context()
    _install_tensor_methods()
    torch.Generator = _generator_type(torch.Generator)
    native_parameter = torch.nn.Parameter.__new__

    def parameter(cls, data=None, requires_grad=True):
        """Parameters of the host have no data either: `parameter.data = ...` changes no kind of storage."""
        if data is not None and native_device(data).type == "cpu":
            data = _without_data(data.detach())
        return native_parameter(cls, data, requires_grad)

    torch.nn.Parameter.__new__ = parameter
    DryMode().__enter__()


def _generator_type(native: type) -> type:
    class GeneratorType(type):
        def __call__(cls, device="cpu"):
            return native("cpu")

        def __instancecheck__(cls, instance):
            return isinstance(instance, native)

    return GeneratorType("Generator", (), {"__doc__": native.__doc__})


def _install_context() -> None:
    native_init, native_function = DeviceContext.__init__, DeviceContext.__torch_function__

    def init(context, device):
        device, context.place = host(device)
        native_init(context, device)

    def function(context, operation, types, args=(), kwargs=None):
        with placing(context.place or getattr(_state, "place", None)):
            return native_function(context, operation, types, args, kwargs)

    DeviceContext.__init__, DeviceContext.__torch_function__ = init, function


def _install_tensor_methods() -> None:
    tensor = torch.Tensor
    native_to, native_type, native_numpy, native_tolist = tensor.to, tensor.type, tensor.numpy, tensor.tolist

    def place(self) -> torch.device:
        return native_device(self) if getattr(_state, "inside", False) else place_of(self)

    @functools.wraps(native_to)
    def to(self, *args, **kwargs):
        device = kwargs.pop("device", None)
        if device is None and args:
            if isinstance(args[0], torch.Tensor):
                device, kwargs["dtype"], args = place_of(args[0]), args[0].dtype, args[1:]
            elif not isinstance(args[0], torch.dtype):
                device, args = args[0], args[1:]
        if device is None:
            return native_to(self, *args, **kwargs)
        device, wanted = host(device)
        wanted = wanted or torch.device(device)
        now = place_of(self)
        if now.type == wanted.type:
            return native_to(self, native_device(self), *args, **kwargs)
        with placing(None if wanted.type == "cpu" else wanted):
            if is_dry(self):
                kwargs["copy"] = True
            return native_to(self, device, *args, **kwargs)

    @functools.wraps(native_type)
    def type_(self, dtype=None, *args, **kwargs):
        if dtype is not None:
            return native_type(self, dtype.replace(".hpu.", ".") if isinstance(dtype, str) else dtype, *args, **kwargs)
        if not is_dry(self):
            return native_type(self)
        name = native_type(native_empty(0, dtype=self.dtype, device=CPU))
        return name.replace("torch.", "torch.hpu.") if self.is_hpu else name

    def read(native: Callable, name: str) -> Callable:
        @functools.wraps(native)
        def wrapper(self, *args, **kwargs):
            if not is_dry(self):
                return native(self, *args, **kwargs)
            if place_of(self).type == "hpu":
                if name == "numpy":
                    raise TypeError("can't convert hpu:0 device type tensor to numpy. Use Tensor.cpu() first.")
                _tell_host_read()
            return native(answer(self), *args, **kwargs)

        return wrapper

    native_data = torch._C.TensorBase.data

    def set_data(self, value: torch.Tensor) -> None:
        native_data.__set__(self, _without_data(value) if is_dry(self) else value)

    def set_grad(self, value: torch.Tensor | None) -> None:
        native_grad.__set__(self, _without_data(value) if value is not None and is_dry(self) else value)

    native_grad = torch._C.TensorBase.grad
    tensor.data = property(native_data.__get__, set_data)
    tensor.grad = property(native_grad.__get__, set_grad, lambda self: native_grad.__set__(self, None))
    tensor.to, tensor.type, tensor.device = to, type_, property(place)
    tensor.numpy, tensor.tolist = read(native_numpy, "numpy"), read(native_tolist, "tolist")
    tensor.cpu = lambda self, memory_format=torch.preserve_format: self.to(CPU)
    tensor.hpu = lambda self, device=None, non_blocking=False: self.to(HPU)
    torch.nn.Module.hpu = lambda self, device=None: self.to(HPU)
    tensor.is_hpu = property(lambda self: place_of(self).type == "hpu")
    tensor.is_cpu = property(lambda self: place(self).type == "cpu")
    tensor.is_meta = property(lambda self: place(self).type == "meta")
    tensor.get_device = lambda self: 0 if self.is_hpu else -1
    # Storages without data would all begin at 0, and be taken for one that many tensors share.
    storage, native_pointer, native_storage_pointer = (
        torch.UntypedStorage,
        tensor.data_ptr,
        torch.UntypedStorage.data_ptr,
    )
    storage.data_ptr = lambda self: self._cdata if self.device.type == "meta" else native_storage_pointer(self)
    tensor.data_ptr = lambda self: (
        self.untyped_storage()._cdata + self.storage_offset() * self.element_size()
        if is_dry(self)
        else native_pointer(self)
    )
    native_repr = tensor.__repr__
    tensor.__repr__ = lambda self, **kwargs: native_repr(answer(self) if is_dry(self) else self, **kwargs)
    tensor.pin_memory = lambda self, device=None: self
    tensor.is_pinned = lambda self, device=None: False
    tensor.record_stream = lambda self, stream: None
    for name in NEW_METHODS:
        setattr(tensor, name, _with_place(getattr(tensor, name)))
