"""`torch.ops.hpu`: the operators that callers reach without going through `hpex`. Tensors of the host are refused."""

import functools
from collections.abc import Callable

import torch
from torch import library
from torch.nn import functional

from habana_frameworks.emulator.autocast import as_one_kernel
from habana_frameworks.emulator.placement import require_card, tensors_in
from habana_frameworks.torch.hpex.kernels.rotary import rotary_pos_embedding

LIBRARY = library.Library("hpu", "DEF")

ADAMW_INPUTS = (
    "Tensor[] gradients, Tensor(a!)[] weights, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor neg_step"
)
LIBRARY.define(
    f"optimizer_adamw({ADAMW_INPUTS}, float beta1, float beta2, float epsilon, float modified_wd, "
    "Tensor(d!)[]? exp_avg_scales=None, Tensor(e!)[]? exp_avg_sq_scales=None) -> ()"
)
LIBRARY.define(
    f"optimizer_adamw.eager({ADAMW_INPUTS}, float beta1, float beta2, float epsilon, Tensor modified_wd, "
    "bool is_wd_modified, Tensor(d!)[]? exp_avg_scales=None, Tensor(e!)[]? exp_avg_sq_scales=None) -> ()"
)
TOKENS = "Tensor hidden_states, Tensor expert_routing_table, Tensor router_weights"
EXPERTS = "bool permuted_weights, str activation, int experts_min, int experts_max"
LIBRARY.define(f"mixture_of_experts({TOKENS}, Tensor[] w1, Tensor[] w2, Tensor[] w3, {EXPERTS}) -> Tensor")
LIBRARY.define(f"mixture_of_experts.fused_weights({TOKENS}, Tensor[] w12, Tensor[] w3, {EXPERTS}) -> Tensor")
LIBRARY.define(
    "rotary_pos_embedding(Tensor input, Tensor sin, Tensor cos, Tensor? position_ids, int offset, int mode) -> Tensor"
)
LIBRARY.define("kv_reorder(Tensor self, Tensor start, Tensor end, Tensor beam_idx) -> Tensor")
LIBRARY.define("kv_reorder_(Tensor(a!) self, Tensor start, Tensor end, Tensor beam_idx) -> Tensor(a!)")
ACTIVATIONS = {"gelu": functional.gelu, "relu": functional.relu, "silu": functional.silu}


@torch.no_grad()
def optimizer_adamw(
    gradients,
    weights,
    exp_avgs,
    exp_avg_sqs,
    neg_step,
    beta1,
    beta2,
    epsilon,
    modified_wd,
    is_wd_modified=True,
    exp_avg_scales=None,
    exp_avg_sq_scales=None,
) -> None:
    """One step of AdamW in place, tensor by tensor.

    `neg_step` is minus the bias-corrected learning rate, `modified_wd` the factor `1 - lr * weight_decay`.
    """
    if exp_avg_scales is not None or exp_avg_sq_scales is not None:
        raise NotImplementedError("the emulator has no moments in 8 bits")
    for gradient, weight, exp_avg, exp_avg_sq in zip(gradients, weights, exp_avgs, exp_avg_sqs, strict=True):
        exp_avg.lerp_(gradient.to(exp_avg.dtype), 1 - beta1)
        squared = gradient.to(exp_avg_sq.dtype)
        exp_avg_sq.mul_(beta2).addcmul_(squared, squared, value=1 - beta2)
        update = neg_step * exp_avg / (exp_avg_sq.sqrt() + epsilon)
        weight.mul_(modified_wd).add_(update.view_as(weight))


def mixture_of_experts(
    hidden_states: torch.Tensor,
    expert_routing_table: torch.Tensor,
    router_weights: torch.Tensor,
    w1: list[torch.Tensor],
    w2: list[torch.Tensor],
    w3: list[torch.Tensor],
    permuted_weights: bool,
    activation: str,
    experts_min: int,
    experts_max: int,
) -> torch.Tensor:
    """Sum over the routed experts of `weight * w3(act(w1(x)) * w2(x))`.

    Shapes: hidden_states [tokens, hidden]; routing table and weights [tokens, top_k]; w1 and w2 [ffn, hidden] and w3
    [hidden, ffn] if `permuted_weights`, else transposed; one of each for the experts experts_min..experts_max.

    Every expert sees every token, with weight 0 where it was not chosen: as on the card, shapes do not depend on the
    routing and every expert gets a gradient. The result has the tokens' type; weights of another are turned to it, as
    nobody has seen a card do.
    """
    if activation not in ACTIVATIONS:
        raise RuntimeError(f'Activation "{activation}" not found among {", ".join(ACTIVATIONS)}')
    activate = ACTIVATIONS[activation]
    result = torch.zeros_like(hidden_states)
    for expert, weights in zip(range(experts_min, experts_max + 1), zip(w1, w2, w3, strict=True), strict=True):
        gate, up, down = (weight.to(hidden_states.dtype) for weight in weights)
        if not permuted_weights:
            gate, up, down = gate.t(), up.t(), down.t()
        output = functional.linear(
            activate(functional.linear(hidden_states, gate)) * functional.linear(hidden_states, up), down
        )
        share = (router_weights * (expert_routing_table == expert)).sum(dim=-1, keepdim=True)
        result = result + (output * share).to(result.dtype)
    return result


def mixture_of_experts_with_fused_weights(
    hidden_states, expert_routing_table, router_weights, w12, w3, permuted_weights, *experts
) -> torch.Tensor:
    """The same with w1 and w2 of each expert in one tensor, w1's outputs first."""
    halves = [weight.chunk(2, dim=0 if permuted_weights else 1) for weight in w12]
    w1, w2 = ([pair[number] for pair in halves] for number in (0, 1))
    return mixture_of_experts(
        hidden_states, expert_routing_table, router_weights, w1, w2, w3, permuted_weights, *experts
    )


def kv_reorder_(self: torch.Tensor, start: torch.Tensor, end: torch.Tensor, beam_idx: torch.Tensor) -> torch.Tensor:
    """Beams of a cache [batch, 4, ..., columns, dim] change places between the columns start and end [batch].

    `beam_idx` [batch] holds four numbers of two bits, the first beam's in the highest.
    """
    for row, first, last, packed in zip(self, start.tolist(), end.tolist(), beam_idx.tolist(), strict=True):
        columns = row.narrow(-2, first, last - first)
        columns.copy_(columns[[packed >> shift & 3 for shift in (6, 4, 2, 0)]])
    return self


def _implement(overload: str, kernel: Callable, key: str = "CompositeExplicitAutograd") -> None:
    @as_one_kernel
    @functools.wraps(kernel)
    def on_card(*args):
        require_card(overload, *tensors_in(args))
        return kernel(*args)

    LIBRARY.impl(overload, on_card, key)


for overload in ("optimizer_adamw", "optimizer_adamw.eager"):
    _implement(overload, optimizer_adamw)
_implement("mixture_of_experts", mixture_of_experts, "CompositeImplicitAutograd")
_implement("mixture_of_experts.fused_weights", mixture_of_experts_with_fused_weights, "CompositeImplicitAutograd")
_implement("rotary_pos_embedding", rotary_pos_embedding, "CompositeImplicitAutograd")
_implement("kv_reorder_", kv_reorder_)
_implement("kv_reorder", lambda self, *columns: kv_reorder_(self.clone(), *columns))
