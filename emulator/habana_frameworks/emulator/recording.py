"""Operations that are recorded while they run, and run again: what an HPU graph holds.

A replay computes what the card computed. What the host did meanwhile is not repeated: Python's branches, numbers that
it read, tensors that it brought to the card are those of the recorded run, for ever.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from habana_frameworks.emulator import placement
from habana_frameworks.emulator.placement import CARD, asked, caller, on_card

HOST_READS = {"_local_scalar_dense", "masked_select", "nonzero", "_unique2", "unique_dim", "unique_consecutive"}


class Slot(int):
    """Stands for a tensor in the arguments of a recorded operation."""


class Recording:
    """A sequence of operations over numbered tensors.

    Tensors that the operations made are rewritten by a replay as long as somebody holds them; `keep_all` holds them
    all, as autograd needs it.
    """

    def __init__(self, keep_all: bool = False):
        self.keep_all = keep_all
        self.steps: list[tuple[Callable, tuple, dict, list[tuple[int, Slot]]]] = []
        self.given: dict[Slot, torch.Tensor] = {}  # tensors that were there before
        self._made: list[tuple[Slot, weakref.ref]] = []
        self._held: list[torch.Tensor] = []
        self._slots = WeakIdKeyDictionary()  # of the tensors that somebody holds
        self._storages: dict[int, Slot | None] = {}  # by who made them; None: they were there before
        self._addresses: list[StorageWeakRef] = []  # while it records, no other storage gets one of these
        self._number = 0  # of slots
        self._last_use: dict[int, list[Slot]] | None = None

    # Recording

    def note(self, operation: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        results = _leaves(result)
        if placement.strict and not any(map(on_card, filter(_is_tensor, [*tensors, *results]))):
            return  # it ran on the host
        if operation._schema.name.rpartition("::")[2] in HOST_READS:
            warn_of_host_read()
            if not any(map(_is_tensor, results)):
                return
        filled = self._name(args), self._name(kwargs)
        made = [(place, self._slot_of_result(leaf)) for place, leaf in enumerate(results) if _is_tensor(leaf)]
        self.steps.append((operation, *filled, made))

    def _name(self, value: Any) -> Any:
        """`value` with slots in place of tensors."""
        if isinstance(value, torch.Tensor):
            return self._slot_of(value)
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._name, value))
        return {key: self._name(item) for key, item in value.items()} if isinstance(value, dict) else value

    def _slot_of(self, tensor: torch.Tensor) -> Slot:
        slot = self._slots.get(tensor)
        if slot is None:
            base = None if tensor.is_sparse else self._storages.get(tensor.untyped_storage()._cdata)
            slot = self._add(tensor)
            if base is not None:  # another name of what was made here, as `tensor.data` is
                view = (Slot(base), tensor.size(), tensor.stride(), tensor.storage_offset())
                self.steps.append((torch.ops.aten.as_strided.default, view, {}, [(0, slot)]))
            else:  # the content of a host's tensor was sent with the operation, and is not asked for again
                is_host = placement.strict and not on_card(tensor)
                self.given[slot] = tensor.detach().clone() if is_host else tensor
                self._note_storage(tensor, None)
        return slot

    def _slot_of_result(self, tensor: torch.Tensor) -> Slot:
        slot = self._slots.get(tensor)
        if slot is None:
            slot = self._add(tensor)
            self._made.append((slot, weakref.ref(tensor)))
            self._note_storage(tensor, slot)
        return slot

    def _add(self, tensor: torch.Tensor) -> Slot:
        slot = self._slots[tensor] = Slot(self._number)
        self._number += 1
        if self.keep_all:
            self._held.append(tensor)
        return slot

    def _note_storage(self, tensor: torch.Tensor, slot: Slot | None) -> None:
        if not tensor.is_sparse:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                self._storages[storage._cdata] = slot
                self._addresses.append(StorageWeakRef(storage))

    def forget(self, tensor: torch.Tensor) -> None:
        """What was made last went to the host: it keeps the content it had."""
        if self.steps and self.steps[-1][3] == [(0, self._slots.get(tensor))]:
            self.steps.pop()
            slot, _ = self._made.pop()
            self.given[slot] = tensor

    def end(self) -> None:
        self._slots, self._storages, self._addresses = WeakIdKeyDictionary(), {}, []

    # Replaying

    @torch.no_grad()
    def replay(self, given: dict[Slot, torch.Tensor] | None = None) -> None:
        """Runs the operations again; `given` takes the place of tensors that were there before."""
        self._made = [(slot, tensor) for slot, tensor in self._made if tensor() is not None]
        if self._last_use is None:
            self._last_use = self._find_last_uses({slot for slot, _ in self._made} | self.given.keys())
        values: dict[int, torch.Tensor] = self.given | (given or {})
        before, asked.place = asked.place, CARD
        try:
            with torch._C._DisableAutocast():
                for step, (operation, args, kwargs, made) in enumerate(self.steps):
                    results = _leaves(operation(*_fill(args, values), **_fill(kwargs, values)))
                    if operation.namespace == "c10d":
                        for work in (each for each in results if isinstance(each, torch.ScriptObject)):
                            work.wait()
                    for place, slot in made:
                        values[slot] = results[place]
                    del results
                    for slot in self._last_use.get(step, ()):
                        del values[slot]
                for slot, reference in self._made:
                    tensor, new = reference(), values[slot]
                    # Views and operations in place have written to the recorded memory already.
                    if tensor is not None and tensor.data_ptr() != new.data_ptr():
                        _without_repeats(tensor).copy_(_without_repeats(new))
        finally:
            asked.place = before

    def _find_last_uses(self, lasting: set[Slot]) -> dict[int, list[Slot]]:
        last = {}
        for step, (_, args, kwargs, made) in enumerate(self.steps):
            used = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Slot)]
            last |= dict.fromkeys([*used, *(slot for _, slot in made)], step)
        by_step: dict[int, list[Slot]] = {}
        for slot, step in last.items():
            if slot not in lasting:
                by_step.setdefault(step, []).append(slot)
        return by_step

    def slots_of(self, tensors: Iterable[torch.Tensor]) -> list[Slot | None]:
        """The slots of tensors that were there before."""
        by_id = {id(tensor): slot for slot, tensor in self.given.items()}
        return [by_id.get(id(tensor)) for tensor in tensors]


class Recorder(TorchDispatchMode):
    """Notes every operation of the context in a recording, and lets it run."""

    def __init__(self, recording: Recording):
        super().__init__()
        self.recording = recording

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __enter__(self):
        active.append(self.recording)
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        active.pop().end()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        self.recording.note(operation, args, kwargs, result)
        return result


active: list[Recording] = []  # what is recording now


def went_to_host(tensor: torch.Tensor) -> None:
    """`tensor` is what the host got of the card; called where the device alias copies it."""
    if active:
        warn_of_host_read()
        for recording in active:
            recording.forget(tensor)


def warn_of_host_read() -> None:
    warnings.warn(
        f"{caller()} reads from the card while an HPU graph is recorded: replays go on with what was read now",
        stacklevel=2,
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _without_repeats(tensor: torch.Tensor) -> torch.Tensor:
    """An expanded tensor as it was."""
    for dim, stride in enumerate(tensor.stride()):
        tensor = tensor.narrow(dim, 0, 1) if stride == 0 and tensor.shape[dim] > 1 else tensor
    return tensor


def _leaves(result: Any) -> list:
    return [result] if isinstance(result, torch.Tensor) else tree_leaves(result)


def _fill(value: Any, values: dict[int, torch.Tensor]) -> Any:
    if type(value) is Slot:
        return values[value]
    if type(value) in (list, tuple):
        return type(value)([_fill(item, values) for item in value])
    return {key: _fill(item, values) for key, item in value.items()} if type(value) is dict else value
