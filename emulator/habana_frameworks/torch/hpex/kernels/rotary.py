"""Rotary position embedding, in the forms of the real plugin (hpex/kernels/RotaryPosEmbeddingHelper.py).

The result has the wider type of its inputs, float32 if any is; cos and sin get no gradient.
"""

from enum import Enum

import torch


class RotaryPosEmbeddingMode(Enum):
    """Which features turn together: i and i + dim / 2, or neighbours."""

    BLOCKWISE = 0
    PAIRWISE = 1


def rotary_pos_embedding(
    states: torch.Tensor,
    sin: torch.Tensor,
    cos: torch.Tensor,
    position_ids: torch.Tensor | None,
    offset: int,
    mode: int,
) -> torch.Tensor:
    """Rotates states [batch, heads, length, dim] by cos and sin [..., n, dim], which lie `offset` columns further.

    `position_ids` [batch, length] are the rows of n; without them the tables broadcast to the states. A row that is not
    there is an error; a card reads past the table.
    """
    if position_ids is not None:
        cos, sin = (table.reshape(-1, table.shape[-1])[position_ids].unsqueeze(1) for table in (cos, sin))
    cos, sin = (table[..., offset : offset + states.shape[-1]] for table in (cos, sin))
    if mode == RotaryPosEmbeddingMode.BLOCKWISE.value:
        first, second = states.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-states[..., 1::2], states[..., ::2]), dim=-1).flatten(-2)
    return states * cos.detach() + turned * sin.detach()


def apply_rotary_pos_emb(p: torch.Tensor, *args) -> torch.Tensor:
    """`cos, sin, position_ids = None, offset = 0, mode = BLOCKWISE` by position, or the table of ChatGLM alone."""
    if len(args) == 1:
        return RotaryPosEmbeddingHelperV3.apply(p, *args)
    cos, sin, position_ids, offset, mode = (*args, *(None, 0, RotaryPosEmbeddingMode.BLOCKWISE)[len(args) - 2 :])
    dtype = torch.float32 if torch.float32 in (p.dtype, cos.dtype, sin.dtype) else p.dtype
    return torch.ops.hpu.rotary_pos_embedding(
        p.to(dtype), sin.to(dtype), cos.to(dtype), position_ids, offset, mode.value
    )


class RotaryPosEmbeddingHelperV1:
    @staticmethod
    def apply(p: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, offset: int, /) -> torch.Tensor:
        """Rotates p [..., length, dim] by columns offset.. of cos and sin [..., length, offset + dim]."""
        return apply_rotary_pos_emb(p, cos, sin, None, offset)


class RotaryPosEmbeddingHelperV2:
    @staticmethod
    def apply(
        p: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor | None, /
    ) -> torch.Tensor:
        """Rotates p [batch, heads, length, dim] by rows `position_ids` [batch, length] of cos and sin [1, 1, n, dim].

        Without position_ids cos and sin have a row for each position already.
        """
        return apply_rotary_pos_emb(p, cos, sin, position_ids)


class RotaryPosEmbeddingHelperV3:
    @staticmethod
    def apply(p: torch.Tensor, rope_cache: torch.Tensor, /) -> torch.Tensor:
        """Rotates neighbouring pairs of the first features of p [length, batch, heads, dim], ChatGLM's way.

        rope_cache [n, batch or 1, pairs, 2] holds cos and sin; features behind the pairs pass unchanged.
        """
        length, rotated = p.shape[0], 2 * rope_cache.shape[-2]
        table = rope_cache[:length].reshape(length, -1, 1, rotated // 2, 2).to(p.dtype)
        cos, sin = (each.repeat_interleave(2, dim=-1) for each in table.unbind(-1))
        turned = torch.ops.hpu.rotary_pos_embedding(
            p[..., :rotated], sin, cos, None, 0, RotaryPosEmbeddingMode.PAIRWISE.value
        )
        return torch.cat((turned, p[..., rotated:]), dim=-1) if rotated < p.shape[-1] else turned
