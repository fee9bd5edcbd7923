"""Fused kernels, with the signatures of the real ones, in differentiable torch."""

from habana_frameworks.torch.hpex.kernels.attention import FusedSDPA
from habana_frameworks.torch.hpex.kernels.rotary import (
    RotaryPosEmbeddingHelperV1,
    RotaryPosEmbeddingHelperV2,
    RotaryPosEmbeddingHelperV3,
    apply_rotary_pos_emb,
)

__all__ = [
    "FusedSDPA",
    "RotaryPosEmbeddingHelperV1",
    "RotaryPosEmbeddingHelperV2",
    "RotaryPosEmbeddingHelperV3",
    "apply_rotary_pos_emb",
]
