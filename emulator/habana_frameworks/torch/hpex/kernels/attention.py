import torch
from torch.nn import functional

from habana_frameworks.emulator.placement import require_card


class FusedSDPA:
    @staticmethod
    def apply(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool | None = False,
        scale: float | None = None,
        softmax_mode: str = "None",
        recompute: bool | None = None,
        valid_seq_len: torch.Tensor | None = None,
        seq_padding_type: str = "left",
    ) -> torch.Tensor:
        """Attention of query [batch, heads, q, dim] over key and value [batch, kv_heads, kv, dim].

        kv_heads divides heads. `attn_mask` broadcasts to [batch, heads, q, kv], is added to the scores or, as bool,
        keeps where True. `valid_seq_len` [batch] is the number of keys that are not padding, which lies on the side
        `seq_padding_type`. Mode and recomputation change nothing but speed and memory on a card, and nothing here.
        """
        require_card("FusedSDPA", query, key, value, attn_mask, valid_seq_len)
        if valid_seq_len is not None:
            attn_mask = _valid_keys(key.shape[-2], valid_seq_len, seq_padding_type)
            if is_causal:
                attn_mask = attn_mask & query.new_ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
                is_causal = False
        elif attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(query.dtype)
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, bool(is_causal), scale=scale, enable_gqa=True
        )


def _valid_keys(length: int, valid: torch.Tensor, padding_side: str) -> torch.Tensor:
    """A mask [batch, 1, 1, length], True on what is not padding."""
    positions = torch.arange(length, device=valid.device)
    valid = valid.reshape(-1, 1, 1, 1)
    return positions >= length - valid if padding_side == "left" else positions < valid
