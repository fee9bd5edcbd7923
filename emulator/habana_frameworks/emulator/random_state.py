"""The card's own random numbers: what is drawn there does not advance the host's generator, nor the other way round."""

import contextlib
import weakref
from collections.abc import Iterator

import torch

_of_the_card: set[int] = set()  # torch hands an operation another object for the same generator


class CardGenerator(torch._C.Generator):
    """A generator of numbers on the card: the host's, by another name."""

    device = property(lambda self: torch.device("hpu", 0))

    def __new__(cls):
        made = super().__new__(cls, "cpu")
        _of_the_card.add(made._cdata)
        weakref.finalize(made, _of_the_card.discard, made._cdata)
        return made


card_generator = CardGenerator()


def is_of_the_card(generator: torch.Generator) -> bool:
    return generator._cdata in _of_the_card


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
