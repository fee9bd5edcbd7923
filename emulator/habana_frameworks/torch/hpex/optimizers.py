import math
from collections.abc import Callable

import torch


class FusedAdamW(torch.optim.Optimizer):
    """AdamW, all parameters of a group in one call of the device."""

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
    ):
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": bias_correction},
        )

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict) -> None:
        weights = [parameter for parameter in group["params"] if parameter.grad is not None]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight].update(exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
        group["step"] = group.get("step", 0) + 1
        beta1, beta2 = group["betas"]
        step_size = group["lr"]
        if group["bias_correction"]:
            step_size *= math.sqrt(1 - beta2 ** group["step"]) / (1 - beta1 ** group["step"])
        torch.ops.hpu.optimizer_adamw(
            [weight.grad for weight in weights],
            weights,
            [self.state[weight]["exp_avg"] for weight in weights],
            [self.state[weight]["exp_avg_sq"] for weight in weights],
            torch.tensor(-step_size),
            beta1,
            beta2,
            group["eps"],
            1 - group["lr"] * group["weight_decay"],
        )
