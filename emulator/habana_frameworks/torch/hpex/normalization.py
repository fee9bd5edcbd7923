from collections.abc import Iterable

import torch


class FusedRMSNorm:
    @staticmethod
    def apply(data: torch.Tensor, gamma: torch.Tensor, eps: float) -> torch.Tensor:
        """`data / rms(data) * gamma` over the last dimension, reduced in float32, in data's dtype."""
        wide = data.float()
        normalised = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
        return gamma * normalised.to(data.dtype)


class FusedClipNorm:
    def __init__(self, parameters: Iterable[torch.nn.Parameter], max_norm: float):
        self.max_norm = max_norm

    def clip_norm(self, parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
        """Scales the gradients in place to a global L2 norm of at most `max_norm`; returns the norm they had."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        factor = (self.max_norm / (norm + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.dtype))
        return norm
