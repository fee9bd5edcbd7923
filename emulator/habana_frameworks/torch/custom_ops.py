"""`torch.ops.hpu`: the operators that callers reach without going through `hpex`."""

import torch
from torch import library
from torch.nn import functional

LIBRARY = library.Library("hpu", "DEF")

ADAMW_INPUTS = (
    "Tensor[] gradients, Tensor(a!)[] weights, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor neg_step"
)
LIBRARY.define(f"optimizer_adamw({ADAMW_INPUTS}, float beta1, float beta2, float epsilon, float modified_wd) -> ()")
LIBRARY.define(
    f"optimizer_adamw.eager({ADAMW_INPUTS}, float beta1, float beta2, float epsilon, Tensor modified_wd, "
    "bool is_wd_modified) -> ()"
)
LIBRARY.define(
    "mixture_of_experts(Tensor hidden_states, Tensor expert_routing_table, Tensor router_weights, Tensor[] w1, "
    "Tensor[] w2, Tensor[] w3, bool permuted_weights, str activation, int experts_min, int experts_max) -> Tensor"
)


@torch.no_grad()
def optimizer_adamw(
    gradients, weights, exp_avgs, exp_avg_sqs, neg_step, beta1, beta2, epsilon, modified_wd, is_wd_modified=True
) -> None:
    """One step of AdamW in place, tensor by tensor.

    `neg_step` is minus the bias-corrected learning rate, `modified_wd` the factor `1 - lr * weight_decay`.
    """
    for gradient, weight, exp_avg, exp_avg_sq in zip(gradients, weights, exp_avgs, exp_avg_sqs, strict=True):
        exp_avg.lerp_(gradient.to(exp_avg.dtype), 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        weight.mul_(modified_wd).add_(neg_step * exp_avg / (exp_avg_sq.sqrt() + epsilon))


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
    routing and every expert gets a gradient.
    """
    activate = getattr(functional, activation)
    result = torch.zeros_like(hidden_states)
    for expert, weights in zip(range(experts_min, experts_max + 1), zip(w1, w2, w3, strict=True), strict=True):
        gate, up, down = (weight if permuted_weights else weight.t() for weight in weights)
        output = functional.linear(
            activate(functional.linear(hidden_states, gate)) * functional.linear(hidden_states, up), down
        )
        share = (router_weights * (expert_routing_table == expert)).sum(dim=-1, keepdim=True)
        result = result + (output * share).to(result.dtype)
    return result


for overload in ("optimizer_adamw", "optimizer_adamw.eager"):
    LIBRARY.impl(overload, optimizer_adamw, "CompositeExplicitAutograd")
LIBRARY.impl("mixture_of_experts", mixture_of_experts, "CompositeImplicitAutograd")
