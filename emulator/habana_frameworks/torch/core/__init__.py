"""Lazy mode's calls, and what inference is prepared with (core/quantization.py)."""

from habana_frameworks.torch import hpu
from habana_frameworks.torch.core import step_closure
from habana_frameworks.torch.core.quantization import (
    hpu_inference_initialize,
    hpu_initialize,
    hpu_reset_env,
    hpu_set_env,
    hpu_set_inference_env,
    hpu_teardown_inference_env,
)
from habana_frameworks.torch.core.step_closure import add_step_closure, iter_mark_step, mark_step

__all__ = [
    "add_step_closure",
    "hpu",
    "hpu_inference_initialize",
    "hpu_initialize",
    "hpu_reset_env",
    "hpu_set_env",
    "hpu_set_inference_env",
    "hpu_teardown_inference_env",
    "iter_mark_step",
    "mark_step",
    "step_closure",
]
