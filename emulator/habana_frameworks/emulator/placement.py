"""Where each tensor is: on the card or on the host. Both are host memory here, so a mark on its storage says which.

A storage without a mark is on the host. Views share their storage, so they share its mark; results of operations on
card tensors take theirs from a `Placement` mode, which also refuses to mix the two as a card does, in torch's words.

HABANA_EMULATOR_STRICT=0 turns this off: then every CPU tensor of a process is on the card once one was asked for.
"""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from habana_frameworks.emulator import random_state

strict = os.environ.get("HABANA_EMULATOR_STRICT", "1") != "0"
in_use = False  # whether this process has touched the card; `device_alias.use` sets it

CARD, HOST = True, False
# Made by C++ code within a composite operation, nobody knows for whom: it goes where its company is.
OPEN = None

MARK = "_emulated_place"
OWN_FILES = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
CROSSING = {"copy_", "copy", "_foreach_copy_", "fill_", "set_", "_pack_padded_sequence"}  # both places may meet in them
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}

_Tensor = torch.Tensor
_storage_of = torch.Tensor.untyped_storage
_is_meta = torch.Tensor.is_meta.__get__  # there are no other devices; is_cpu is replaced, and torch's modes look it up


def place_of(tensor: torch.Tensor) -> bool | None:
    """CARD, HOST or OPEN."""
    try:
        return getattr(_storage_of(tensor), MARK, HOST)
    except (RuntimeError, NotImplementedError):  # it has no storage of its own
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return place_of(torch._C._functorch.get_unwrapped(tensor))
        parts = tensor._values() if tensor.is_sparse else None
        return HOST if parts is None else place_of(parts)


def on_card(tensor: torch.Tensor) -> bool:
    if not in_use or _is_meta(tensor):
        return False
    return not strict or place_of(tensor) is CARD


def is_on_card(storage: torch.UntypedStorage) -> bool:
    return in_use and (not strict or getattr(storage, MARK, HOST) is CARD)


def put(tensor: Any, place: bool) -> Any:
    """Says that this memory is there. Whoever calls it knows that nobody else holds the memory for the other place."""
    if strict and isinstance(tensor, _Tensor):
        try:
            setattr(_storage_of(tensor), MARK, place)
        except (RuntimeError, NotImplementedError):
            if tensor.is_sparse:
                put(tensor._values(), place)
                put(tensor._indices(), place)
    return tensor


def settle(tensor: Any) -> Any:
    """What a factory made that was not asked for a place is on the host, unless its company has decided."""
    if strict and in_use and isinstance(tensor, _Tensor) and place_of(tensor) is OPEN:
        put(tensor, HOST)
    return tensor


class Asked(threading.local):
    """The place that the factory which is running was asked for; None: none."""

    place: bool | None = None


asked = Asked()


class _Traits:
    """What the mode must know of an operation; looked up once."""

    __slots__ = ("name", "checked", "from_host", "mutable", "random")

    def __init__(self, operation: torch._ops.OpOverload):
        schema = operation._schema
        namespace, _, self.name = schema.name.partition("::")
        self.checked = namespace not in ("c10d", "_c10d_functional", "profiler") and self.name not in CROSSING
        # The argument that torch takes from the host: indices, and numbers for each tensor of a list.
        packed = (place for place, argument in enumerate(schema.arguments) if argument.name == "scalars")
        self.from_host = 1 if self.name in INDEXING else next(packed, None)
        self.mutable = schema.is_mutable
        self.random = torch.Tag.nondeterministic_seeded in operation.tags


class Placement(TorchDispatchMode):
    """Marks what operations on the card make, and refuses those that mix the two places. One for each thread."""

    traits: dict[Any, _Traits] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # else torch wraps __torch_dispatch__ in what costs as much as all else here
        return False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not in_use:  # a forked process
            return operation(*args, **kwargs)
        traits = self.traits.get(operation)
        if traits is None:
            traits = self.traits[operation] = _Traits(operation)
        tensors = list(tensors_in(args))
        if kwargs:
            tensors.extend(tensors_in(kwargs.values()))
        if not tensors:
            place = asked.place
        else:
            places = [OPEN if _is_meta(tensor) else place_of(tensor) for tensor in tensors]
            if CARD in places:
                if traits.checked and HOST in places:
                    _check(traits, args, tensors, places)
                if OPEN in places:
                    self._adopt(traits, tensors, places)
                place = CARD
            else:
                place = HOST if HOST in places else OPEN
        if traits.random and CARD in (place, asked.place) and kwargs.get("generator") is None:
            with random_state.of_the_card():
                result = operation(*args, **kwargs)
        else:
            result = operation(*args, **kwargs)
        if place is not HOST:
            given = {id(tensor) for tensor in tensors} if traits.mutable else ()
            for tensor in tensors_in((result,)):
                if id(tensor) in given:
                    continue
                try:
                    storage = _storage_of(tensor)
                    if MARK not in storage.__dict__:
                        setattr(storage, MARK, place)
                except (RuntimeError, NotImplementedError):
                    put(tensor, place)
        return result

    @staticmethod
    def _adopt(traits: _Traits, tensors: list, places: list) -> None:
        for tensor, place in zip(tensors, places, strict=True):
            if place is OPEN and not _is_meta(tensor):
                put(tensor, CARD)


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors of nested lists and tuples."""
    for value in values:
        if isinstance(value, _Tensor):
            yield value
        elif type(value) in (list, tuple):
            yield from tensors_in(value)


def _check(traits: _Traits, args: tuple, tensors: list, places: list) -> None:
    """Raises unless all that is on the host are numbers, which an operation takes along, or its `from_host`."""
    from_host = () if traits.from_host is None else args[traits.from_host : traits.from_host + 1]
    taken = {id(tensor) for tensor in tensors_in(from_host)}
    for tensor, place in zip(tensors, places, strict=True):
        is_target = traits.mutable and tensor is tensors[0]
        if place is HOST and (tensor.dim() or is_target) and id(tensor) not in taken:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, hpu:0 and cpu! "
                f"(when checking an argument of shape {list(tensor.shape)} on the host in method {traits.name}, "
                f"called at {caller()})"
            )


def caller() -> str:
    """`file:line` of the innermost frame that is neither torch's nor the emulator's, and of the user's own code."""
    frames, frame = [], sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(OWN_FILES) and (not frames or "site-packages" not in name):
            frames.append(f"{name}:{frame.f_lineno}")
            if "site-packages" not in name:
                break
        frame = frame.f_back
    return " from ".join(frames)


def require_card(name: str, *tensors: torch.Tensor | None) -> None:
    """For what has an implementation on the card alone."""
    if not strict:
        return
    with torch._C.DisableTorchFunction():  # a dry card's autocast would answer that no tensor is meta
        on_host = [each for each in tensors if isinstance(each, _Tensor) and not _is_meta(each) and not on_card(each)]
    if on_host:
        raise RuntimeError(
            f"{name}: expected all tensors on hpu, got one of shape {list(on_host[0].shape)} on cpu "
            f"(called at {caller()})"
        )


def start() -> None:
    """Enters the mode in this thread, below those that are active, and from now on in every thread that starts."""
    if not strict:
        return
    above = []
    while torch._C._len_torch_dispatch_stack() > len(_infra_modes()):
        above.append(_pop_mode())
    Placement().__enter__()
    for mode in reversed(above):
        _push_mode(mode)
    native_start = threading.Thread.start

    def start_in_mode(thread: threading.Thread) -> None:
        run = thread.run

        def run_in_mode() -> None:
            with Placement():
                run()

        thread.run = run_in_mode
        native_start(thread)

    threading.Thread.start = start_in_mode


def _infra_modes() -> list:
    keys = torch._C._TorchDispatchModeKey
    return [mode for key in keys.__members__.values() if (mode := torch._C._get_dispatch_mode(key)) is not None]
