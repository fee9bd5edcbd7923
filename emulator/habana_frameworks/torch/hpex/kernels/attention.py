import torch
from torch.nn import functional

from habana_frameworks.emulator.autocast import as_one_kernel
from habana_frameworks.emulator.placement import caller, require_card
from habana_frameworks.torch import hpu


class FusedSDPA:
    @staticmethod
    @as_one_kernel
    def apply(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool | None = False,
        scale: float | None = None,
        softmax_mode: str = "None",
        recompute_mode: bool | None = None,
        valid_seq_len: torch.Tensor | None = None,
        seq_padding_type: str = "left",
        return_dropout_mask: bool = False,
        return_attn_probs: bool = False,
        /,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Attention of query [batch, heads, q, dim] over key and value [batch, kv_heads, kv, dim].

        kv_heads divides heads. `attn_mask` broadcasts to [batch, heads, q, kv], is added to the scores or, as bool,
        keeps where True. `valid_seq_len` [batch] is the number of keys that are not padding, which lies on the side
        `seq_padding_type`. Mode and recomputation change nothing but speed and memory on a card, and nothing here.

        Returns the result; behind it, if asked for, the probabilities and the dropout's mask (1 where it kept), both
        [batch, heads, q, kv]. Raises AssertionError for what a card's kernel lacks (hpex/kernels/FusedSDPA.py).
        """
        require_card("FusedSDPA", query, key, value, attn_mask, valid_seq_len)
        learns = any(tensor.requires_grad for tensor in (query, key, value))
        recomputes = hpu.recompute_sdp_enabled() if recompute_mode is None else recompute_mode
        if return_attn_probs:
            _require(not learns, "return_attn_probs: there are no probabilities where gradients are wanted")
            recomputes = False
        if recomputes:
            _require(not return_dropout_mask, "return_dropout_mask: there is none in recompute mode")
            _require(
                not learns or softmax_mode.lower() != "fast" or is_causal is True,
                "the fast softmax has gradients in recompute mode only with is_causal",
            )
        if valid_seq_len is not None:
            _require(
                bool(is_causal) and not learns and attn_mask is None,
                "valid_seq_len: needs is_causal, no mask, and inputs without gradients",
            )
            attn_mask = _valid_keys(key.shape[-2], valid_seq_len, seq_padding_type.lower())
            attn_mask = attn_mask & query.new_ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
            is_causal = False
        elif attn_mask is not None:
            if query.dim() == 4 and key.shape[1] not in (1, query.shape[1]) and attn_mask.dim() != 4:
                raise ValueError(
                    "FusedSDPA: with more heads of queries than of keys a mask has 4 dimensions, got "
                    f"{attn_mask.dim()} (called at {caller()})"
                )
            attn_mask = attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(query.dtype)
        if return_attn_probs or return_dropout_mask:
            return _written_out(
                query, key, value, attn_mask, dropout_p, is_causal, scale, return_attn_probs, return_dropout_mask
            )
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, bool(is_causal), scale=scale, enable_gqa=True
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"FusedSDPA: {message}")


def _valid_keys(length: int, valid: torch.Tensor, padding_side: str) -> torch.Tensor:
    """A mask [batch, 1, 1, length], True on what is not padding."""
    positions = torch.arange(length, device=valid.device)
    valid = valid.reshape(-1, 1, 1, 1)
    return positions >= length - valid if padding_side == "left" else positions < valid


def _written_out(query, key, value, mask, dropout_p, is_causal, scale, probabilities, dropout_mask) -> tuple:
    """The same step by step, with what is between."""
    key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], dim=-3) for each in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    shares = scores.softmax(dim=-1)
    kept = torch.rand_like(shares) >= dropout_p
    result = (shares * kept / (1 - dropout_p)) @ value
    return result, *([shares] if probabilities else []), *([kept.to(torch.int8)] if dropout_mask else [])
