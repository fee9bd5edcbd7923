"""How devices are named (hpu/_utils.py)."""

import os

import torch


def _get_device_index(device: torch.device | str | int | None, optional: bool = False, allow_cpu: bool = False) -> int:
    """The index that a device names, -1 for cpu; the current one, 0, if it names none and that is `optional`."""
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
    return 0


def device_count() -> int:
    """Cards of this host: HABANA_EMULATOR_DEVICES, or 8 as in a Gaudi node."""
    cards = os.environ.get("HABANA_EMULATOR_DEVICES", "8")
    if not cards.isdecimal():
        raise ValueError(f"HABANA_EMULATOR_DEVICES: got {cards!r}; give the number of cards of this host, as 8")
    return int(cards)


def require_device(device: torch.device | str | int | None) -> None:
    """A process has one card, which answers to the number of each."""
    if not 0 <= _get_device_index(device, optional=True) < device_count():
        raise AssertionError("Invalid device id")
