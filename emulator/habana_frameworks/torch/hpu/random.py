"""Random numbers of the card: a generator of its own, which torch.manual_seed seeds as it does the host's."""

import torch

from habana_frameworks.emulator import placement
from habana_frameworks.emulator.random_state import card_generator
from habana_frameworks.torch.hpu._utils import _get_device_index

__all__ = [
    "get_rng_state",
    "get_rng_state_all",
    "initial_seed",
    "manual_seed",
    "manual_seed_all",
    "seed",
    "seed_all",
    "set_rng_state",
    "set_rng_state_all",
]

# Without strict devices nobody knows which tensors are on the card, and all draw the host's numbers.
default_generators = [card_generator if placement.strict else torch.default_generator]


def _check_device(device: int | str | torch.device, function: str) -> None:
    """A process has one card."""
    if _get_device_index(device, optional=True) != 0:
        raise RuntimeError(f"hpu {function} supports only device 0")


def get_rng_state(device: int | str | torch.device = "hpu") -> torch.Tensor:
    _check_device(device, "get_rng_state")
    return default_generators[0].get_state()


def set_rng_state(new_state: torch.Tensor, device: int | str | torch.device = "hpu") -> None:
    _check_device(device, "set_rng_state")
    default_generators[0].set_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [get_rng_state()]


def set_rng_state_all(new_states: list[torch.Tensor]) -> None:
    if len(new_states) != 1:
        raise RuntimeError("hpu set_rng_state_all supports only states len of 1")
    set_rng_state(new_states[0])


def manual_seed(seed: int) -> torch.Generator:
    return default_generators[0].manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    manual_seed(seed)


def seed() -> int:
    return default_generators[0].seed()


def seed_all() -> None:
    seed()


def initial_seed() -> int:
    return default_generators[0].initial_seed()
