"""What a program calls to prepare inference: on a card weights become constants of its graphs, and nothing here."""

import torch


def hpu_set_inference_env(model: torch.nn.Module | None = None) -> torch.nn.Module | None:
    """Before the model moves to the card. Returns it; a card's has convolutions with their batch norms folded in."""
    return model


def hpu_inference_initialize(
    model: torch.nn.Module | None = None, mark_only_scales_as_const: bool = False, optimizer=None, args=None
) -> None:
    """After the model has moved to the card."""


def hpu_teardown_inference_env() -> None:
    """After the last forward pass."""


hpu_set_env, hpu_initialize, hpu_reset_env = hpu_set_inference_env, hpu_inference_initialize, hpu_teardown_inference_env
