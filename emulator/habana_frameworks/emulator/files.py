"""What becomes of a card's tensors in files, pickles and other processes (core/torch_overwrites.py).

In lazy mode `torch.save` writes tensors of the host, each in memory of its own, in plain dicts, lists and tuples, and
`torch.load` brings them to the host, or to where it is told. In eager mode both are torch's own: a file says of each
tensor where it was. A pickled tensor comes back where it was, and none is shared with another process.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from habana_frameworks.emulator import placement
from habana_frameworks.torch.utils.internal import is_lazy

SHARING = ("_share_fd_cpu_", "_share_filename_cpu_")


def install() -> None:
    for name in SHARING:
        setattr(torch.UntypedStorage, name, _of_the_host(getattr(torch.UntypedStorage, name)))
    if is_lazy():
        torch.save, torch.load = _save_from_the_host(torch.save), _load_on_the_host(torch.load)
        torch.Tensor._reduce_ex_internal = _reduce_by_copy(torch.Tensor._reduce_ex_internal)


def location_of(storage: torch.UntypedStorage) -> str | None:
    """What torch writes as the place of a card's storage."""
    return "hpu:0" if placement.strict and placement.is_on_card(storage) else None


def _of_the_host(share: Callable) -> Callable:
    @functools.wraps(share)
    def wrapper(self, *args, **kwargs):
        if placement.strict and placement.is_on_card(self):
            raise RuntimeError(
                "a tensor of the card cannot be shared with another process. Use Tensor.cpu() to copy it to host "
                f"memory first (called at {placement.caller()})"
            )
        return share(self, *args, **kwargs)

    return wrapper


def _save_from_the_host(save: Callable) -> Callable:
    @functools.wraps(save)
    def wrapper(obj: Any, *args, **kwargs):
        if not placement.in_use:
            return save(obj, *args, **kwargs)
        return save(_map_tensors(lambda tensor: tensor.detach().clone().cpu(), obj), *args, **kwargs)

    return wrapper


def _load_on_the_host(load: Callable) -> Callable:
    @functools.wraps(load)
    def wrapper(f: Any, map_location: Any = None, *args, **kwargs):
        loaded = load(f, "cpu", *args, **kwargs)
        place = map_location.get("cpu") if isinstance(map_location, dict) else map_location
        if place in (None, "cpu"):
            return loaded
        if callable(place):
            return _map_tensors(lambda tensor: place(tensor, tensor.device), loaded)
        return _map_tensors(lambda tensor: tensor.to(place), loaded)

    return wrapper


def _reduce_by_copy(reduce: Callable) -> Callable:
    """For pickle: a tensor of the host that goes to the card again."""

    @functools.wraps(reduce)
    def wrapper(self, protocol):
        if not placement.strict or not placement.on_card(self):
            return reduce(self, protocol)
        again = self.detach().cpu(), self.dtype, str(self.device), self.requires_grad
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, again

    return wrapper


def _map_tensors(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """`value` with its tensors changed, in plain dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _map_tensors(change, item) for name, item in value.items()}
    if isinstance(value, list):
        return [_map_tensors(change, item) for item in value]
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        return tuple(_map_tensors(change, item) for item in value)
    return value
