from collections.abc import Iterable
from enum import Enum

import torch

from habana_frameworks.emulator.autocast import as_one_kernel
from habana_frameworks.emulator.placement import caller, require_card
from habana_frameworks.torch.core.step_closure import _mark_step_if_lazy


class RmsNormBwdMode(Enum):
    """How a card cuts the backward pass into parts."""

    DEFAULT = 0
    STATIC_CASE_WIDTH_PARTITIONING = 1


class FusedRMSNorm:
    @staticmethod
    @as_one_kernel
    def apply(
        data: torch.Tensor,
        gamma: torch.Tensor,
        eps: float,
        use_stages: bool = True,
        bwd_mode: int = 0,
        fast_math: bool = False,
        /,
    ) -> torch.Tensor:
        """`data / rms(data) * gamma` over the last dimension, reduced in float32.

        The result has the type of both, or float32 where they differ (rms_norm_gen.cpp). The last three say how a card
        computes it. Raises RuntimeError for whole numbers, for which there is no kernel.
        """
        require_card("FusedRMSNorm", data, gamma)
        for tensor in (data, gamma):
            if not tensor.is_floating_point():
                raise RuntimeError(f"FusedRMSNorm: there is no kernel for {tensor.dtype} (called at {caller()})")
        wide = data.float()
        normalised = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
        if data.dtype != gamma.dtype:
            return gamma.float() * normalised
        return gamma * normalised.to(data.dtype)


class FusedClipNorm:
    def __init__(self, parameters: Iterable[torch.nn.Parameter], max_norm: float):
        """`max_norm` is kept in the type of the first parameter."""
        first = next(iter(parameters), None)
        dtype = torch.float32 if first is None else first.dtype
        self.max_norm_t = torch.full((1,), max_norm, dtype=dtype, device="hpu")
        self.norm_type = 2.0

    @torch.no_grad()
    def clip_norm(self, parameters: torch.Tensor | Iterable[torch.Tensor]) -> torch.Tensor:
        """Scales the gradients in place to a global L2 norm of at most `max_norm`; returns the norm they had."""
        _mark_step_if_lazy()
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else parameters
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return torch.tensor(0.0)
        norm = torch.nn.utils.get_total_norm(gradients)
        factor = (self.max_norm_t[0] / (norm + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.dtype))
        _mark_step_if_lazy()
        return norm
