"""Rotary position embedding, in the three forms of the real plugin."""

import torch


def _rotate_halves(p: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = p.chunk(2, dim=-1)
    return (p * cos + torch.cat((-second, first), dim=-1) * sin).to(p.dtype)


class RotaryPosEmbeddingHelperV1:
    @staticmethod
    def apply(p: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, offset: int = 0) -> torch.Tensor:
        """Rotates p [batch, heads, length, dim] by rows offset.. of cos and sin [..., length, dim]."""
        rows = slice(offset, offset + p.shape[-2])
        return _rotate_halves(p, cos[..., rows, :], sin[..., rows, :])


class RotaryPosEmbeddingHelperV2:
    @staticmethod
    def apply(
        p: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rotates p [batch, heads, length, dim] by rows `position_ids` [batch, length] of cos and sin [1, 1, n, dim].

        Without position_ids cos and sin hold a row for each position already.
        """
        if position_ids is not None:
            cos, sin = (table.reshape(-1, table.shape[-1])[position_ids].unsqueeze(1) for table in (cos, sin))
        return _rotate_halves(p, cos, sin)


class RotaryPosEmbeddingHelperV3:
    @staticmethod
    def apply(p: torch.Tensor, rope_cache: torch.Tensor) -> torch.Tensor:
        """Rotates neighbouring pairs of the first features of p [length, batch, heads, dim], ChatGLM's way.

        rope_cache [n, batch or 1, pairs, 2] holds cos and sin; features behind the pairs pass unchanged.
        """
        length, rotated = p.shape[0], 2 * rope_cache.shape[-2]
        cos, sin = rope_cache[:length].reshape(length, -1, 1, rotated // 2, 2).unbind(-1)
        even, odd = p[..., 0:rotated:2], p[..., 1:rotated:2]
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
        return torch.cat((turned, p[..., rotated:]), dim=-1)


apply_rotary_pos_emb = RotaryPosEmbeddingHelperV1.apply
