"""Counts the bytes that live on a card, as storages are born and die, by phase, by kind and by module.

    with Ledger().counting() as ledger, ledger.phase("forward"):
        ...
    ledger.peaks["forward"].total

On a dry card (the emulator's tensors without data) it counts what is on the card, else every tensor of the process that
has data.
"""

import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# The kind that a storage is born with; `mark` corrects it once more is known.
KIND_OF_PHASE = {
    "loading": "weights",
    "forward": "activations",
    "backward": "activations",
    "optimizer": "optimizer",
    "evaluation": "activations",
    "saving": "buffers",
    "generation": "activations",
}


@dataclass
class Peak:
    """The fullest moment of a phase, in bytes."""

    total: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    by_module: dict[str, int] = field(default_factory=dict)


class Ledger:
    """`total` and `live` count what lives now, in bytes; `peaks` the fullest moment of each phase.

    `flops` and `bytes_sent` add up matrix products and what collectives were handed.
    """

    def __init__(self):
        self.total = 0
        self.live: Counter[str] = Counter()
        self.by_module: Counter[str] = Counter()
        self.peaks: defaultdict[str, Peak] = defaultdict(Peak)
        self.flops = 0
        self.bytes_sent = 0
        self.vocabulary = 0  # the last dimension of what is taken for logits
        self.modules: list[str] = []
        self._entries: dict[int, tuple[int, str, str]] = {}  # storage -> bytes, kind, module
        self.current_phase = "loading"
        self._kind: str | None = None
        self.host_peak = 0  # bytes on the host of this rank, where they are dry as well
        self._host: dict[int, int] = {}
        self._host_total = 0
        self._storages: dict[int, weakref.ref] = {}  # of a card with real memory

    # What is under way

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self.current_phase = self.current_phase, name
        self._see_peak()
        try:
            yield
        finally:
            self.current_phase = before

    @contextmanager
    def kind(self, name: str) -> Iterator[None]:
        """Storages that are born in here are of this kind."""
        before, self._kind = self._kind, name
        try:
            yield
        finally:
            self._kind = before

    def begin(self, phase: str) -> None:
        self.current_phase = phase
        self._see_peak()

    # What is born and dies

    def born(self, storage: torch.UntypedStorage, tensor: torch.Tensor) -> None:
        module = self.modules[-1] if self.modules else ""
        kind = self._kind or KIND_OF_PHASE[self.current_phase]
        if kind == "activations" and self.vocabulary and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
            kind = "logits"
        self._add(storage._cdata, storage.nbytes(), kind, module)

    def _add(self, address: int, size: int, kind: str, module: str) -> None:
        if not size:
            return
        self._entries[address] = (size, kind, module)
        self.total += size
        self.live[kind] += size
        self.by_module[module] += size
        self._see_peak()

    def _see_peak(self) -> None:
        peak = self.peaks[self.current_phase]
        if self.total > peak.total:
            peak.total, peak.by_kind, peak.by_module = self.total, dict(self.live), dict(self.by_module)

    def died(self, address: int) -> None:
        self._host_total -= self._host.pop(address, 0)
        entry = self._entries.pop(address, None)
        if entry:
            size, kind, module = entry
            self.total -= size
            self.live[kind] -= size
            self.by_module[module] -= size

    def mark(self, tensor: torch.Tensor | None, kind: str) -> None:
        """Corrects the kind of this tensor's storage."""
        if tensor is None:
            return
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        if entry and entry[1] != kind:
            size, before, module = entry
            self._entries[tensor.untyped_storage()._cdata] = (size, kind, module)
            self.live[before] -= size
            self.live[kind] += size

    def leave_out_host(self) -> None:
        """Forgets what is on the host after all, which only a dry card knows at once. Peaks stay as they are."""
        from habana_frameworks.emulator import placement

        for address, alive in list(self._storages.items()):
            storage = alive()
            if storage is not None and not placement.is_on_card(storage):
                self.died(address)

    # Where it looks

    @contextmanager
    def counting(self) -> Iterator["Ledger"]:
        """Counts what happens in the context."""
        from habana_frameworks.emulator import dry

        hooks = [
            torch.nn.modules.module.register_module_forward_pre_hook(self._enter_module),
            torch.nn.modules.module.register_module_forward_hook(self._leave_module, always_call=True),
        ]
        if dry.is_wanted:

            def born(storage, tensor, place):
                if place.type == "hpu":
                    self.born(storage, tensor)
                elif place.type == "cpu":
                    self._host[storage._cdata] = storage.nbytes()
                    self._host_total += storage.nbytes()
                    self.host_peak = max(self.host_peak, self._host_total)

            dry.on_birth.append(born)
            dry.on_death.append(self.died)
        try:
            with _Observer(self, follows_storages=not dry.is_wanted):
                yield self
        finally:
            for hook in hooks:
                hook.remove()
            if dry.is_wanted:
                dry.on_birth.remove(born)
                dry.on_death.remove(self.died)

    def _enter_module(self, module: torch.nn.Module, _) -> None:
        self.modules.append(getattr(module, "rehearsal_name", None) or (self.modules[-1] if self.modules else ""))

    def _leave_module(self, module: torch.nn.Module, *_) -> None:
        if self.modules:
            self.modules.pop()

    def name_modules(self, model: torch.nn.Module) -> None:
        """The model's parts, alike in each layer: `self_attn`, `mlp`, `lm_head`."""
        for path, module in model.named_modules():
            parts = path.split(".")
            layer = next((number for number, part in enumerate(parts) if part.isdigit()), None)
            if layer is None:
                name = parts[-1] if not list(module.children()) else None
            else:
                name = parts[layer + 1] if len(parts) > layer + 1 else "layer"
            module.rehearsal_name = name
            for method in METHODS:  # optimum-habana's layers call these, not the modules
                if hasattr(module, method) and not isinstance(getattr(module, method), partial):
                    setattr(module, method, partial(self._run_in, name, getattr(module, method)))

    def _run_in(self, name: Any, method: Callable, *args, **kwargs):
        self.modules.append(name)
        try:
            return method(*args, **kwargs)
        finally:
            self.modules.pop()


METHODS = ("pre_attn_forward", "pre_mlp_forward")


class _Observer(TorchDispatchMode):
    """Adds up what is computed and sent, and on cards of real memory what is born."""

    def __init__(self, ledger: Ledger, follows_storages: bool):
        super().__init__()
        self.ledger, self.follows_storages = ledger, follows_storages

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket
        if name in PRODUCTS:
            first, second = args[PRODUCTS[name]], args[PRODUCTS[name] + 1]
            self.ledger.flops += 2 * first.numel() * second.shape[-1]
        elif operation.namespace == "c10d":
            self.ledger.bytes_sent += _sent(args)
        if self.follows_storages:
            for tensor in result if isinstance(result, (list, tuple)) else (result,):
                if isinstance(tensor, torch.Tensor) and not tensor.is_meta:  # DeepSpeed's ZeRO-1 and 2 keep some shapes
                    self._follow(tensor)
        return result

    def _follow(self, tensor: torch.Tensor) -> None:
        storage, followed = tensor.untyped_storage(), self.ledger._storages
        address = storage._cdata
        if address in followed:
            return

        def forget(_, address=address):
            followed.pop(address, None)
            self.ledger.died(address)

        followed[address] = weakref.ref(storage, forget)
        self.ledger.born(storage, tensor)


aten = torch.ops.aten
PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}


def _sent(args: tuple) -> int:
    """Bytes of the largest side of a collective: what passes through a card's links, but for 1 / world."""
    sizes = [0]
    for argument in args:
        tensors = argument if isinstance(argument, (list, tuple)) else [argument]
        flat = [t for item in tensors for t in (item if isinstance(item, (list, tuple)) else [item])]
        sizes.append(sum(math.prod(t.shape) * t.element_size() for t in flat if isinstance(t, torch.Tensor)))
    return max(sizes)
