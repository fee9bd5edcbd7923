"""The card's own random numbers: what is drawn there does not advance the host's generator, nor the other way round."""

import contextlib
from collections.abc import Iterator

import torch

card_generator = torch.Generator("cpu")


@contextlib.contextmanager
def of_the_card() -> Iterator[None]:
    """The default generator draws the card's numbers in here."""
    host = torch.default_generator
    before = host.get_state()
    host.set_state(card_generator.get_state())
    try:
        yield
    finally:
        card_generator.set_state(host.get_state())
        host.set_state(before)
