"""Fused kernels for dry tensors: they keep for the backward pass what a card's kernels keep, and nothing else.

What they keep was read in gaudi-pytorch-bridge 1.19.0: FusedSDPA saves query, key, value, its output and the softmax,
or with recompute the mask and two numbers a row of it; FusedRMSNorm saves its input, gamma and the inverse of the root
mean square.
"""

import math

import torch
from torch.nn import functional

from habana_frameworks.emulator.dry import is_dry

_before: dict = {}


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, recompute):
        rows = query.shape[:-1]
        if recompute:
            kept = [mask, *(query.new_empty(rows, dtype=torch.float32) for _ in range(2))]
        else:
            kept = [query.new_empty((*rows, key.shape[-2]))]
        result = query.new_empty((*rows, value.shape[-1]))
        ctx.save_for_backward(query, key, value, result, *kept)
        return result

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, *_ = ctx.saved_tensors
        return *(torch.empty_like(tensor) for tensor in (query, key, value)), None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, data, gamma):
        ctx.save_for_backward(data, gamma, data.new_empty((*data.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(data, dtype=data.dtype if data.dtype == gamma.dtype else torch.float32)

    @staticmethod
    def backward(ctx, gradient):
        data, gamma, _ = ctx.saved_tensors
        return torch.empty_like(data), torch.empty_like(gamma) if ctx.needs_input_grad[1] else None


def mixture_of_experts(
    hidden_states,
    expert_routing_table,
    router_weights,
    w1,
    w2,
    w3,
    permuted_weights,
    activation,
    experts_min,
    experts_max,
):
    """A token is computed by the experts that it takes: each expert has an even share of tokens x top_k rows."""
    activate = getattr(functional, activation)
    rows = math.ceil(expert_routing_table.numel() / len(w1))
    result = torch.zeros_like(hidden_states)
    for gate, up, down in zip(w1, w2, w3, strict=True):
        if not permuted_weights:
            gate, up, down = gate.t(), up.t(), down.t()
        share = hidden_states[: min(rows, len(hidden_states))].clone()
        output = functional.linear(activate(functional.linear(share, gate)) * functional.linear(share, up), down)
        weights = router_weights.flatten()[: len(share), None].to(output.dtype)
        result = result.index_add(0, expert_routing_table.flatten()[: len(share)], (output * weights).to(result.dtype))
    return result


class _Experts:
    """The operator, but for its calls."""

    def __init__(self, operator):
        self.operator = operator

    def __call__(self, *args, **kwargs):
        return mixture_of_experts(*args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self.operator, name)


def install() -> None:
    from habana_frameworks.torch import hpu
    from habana_frameworks.torch.hpex import normalization
    from habana_frameworks.torch.hpex.kernels import attention

    attend, norm = attention.FusedSDPA.apply, normalization.FusedRMSNorm.apply

    def apply_attention(
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        softmax_mode="None",
        recompute=None,
        *args,
    ):
        if not is_dry(query):
            return attend(query, key, value, attn_mask, dropout_p, is_causal, scale, softmax_mode, recompute, *args)
        recompute = hpu.recompute_sdp_enabled() if recompute is None else recompute
        return _Attention.apply(query, key, value, attn_mask, recompute)

    def apply_norm(data, gamma, eps, *args, **kwargs):
        return _RMSNorm.apply(data, gamma) if is_dry(data) else norm(data, gamma, eps, *args, **kwargs)

    attention.FusedSDPA.apply = staticmethod(apply_attention)
    normalization.FusedRMSNorm.apply = staticmethod(apply_norm)
    experts = torch.ops.hpu.mixture_of_experts
    torch.ops.hpu.mixture_of_experts = _Experts(experts)
    _before.update(attend=attend, norm=norm, experts=experts)


def uninstall() -> None:
    """The emulator's composed kernels again, which keep more than a card's: to compare with real computation."""
    from habana_frameworks.torch.hpex import normalization
    from habana_frameworks.torch.hpex.kernels import attention

    if _before:
        attention.FusedSDPA.apply = staticmethod(_before["attend"])
        normalization.FusedRMSNorm.apply = staticmethod(_before["norm"])
        torch.ops.hpu.mixture_of_experts = _before["experts"]
        _before.clear()
