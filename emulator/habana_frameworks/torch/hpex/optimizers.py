import math
from collections.abc import Callable

import torch

from habana_frameworks.torch.core.step_closure import _mark_step_if_lazy
from habana_frameworks.torch.utils.internal import is_lazy

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class FusedAdamW(torch.optim.Optimizer):
    """AdamW, all parameters of a group in one call of the device.

    `moments_dtype`: type of both moments, or a pair of types; that of the weight if there is none.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        moments_dtype: torch.dtype | tuple[torch.dtype, torch.dtype] | None = None,
    ):
        if lr < 0:
            raise ValueError(f"Invalid learning rate: {lr} - should be >= 0.0")
        for beta in betas:
            if not 0 <= beta < 1:
                raise ValueError(f"Invalid beta parameter: {beta} - should be in [0.0, 1.0[")
        if eps < 0:
            raise ValueError(f"Invalid epsilon value: {eps} - should be >= 0.0")
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": bias_correction},
        )
        self.moments_dtype = moments_dtype
        if any(dtype in FLOAT8 for dtype in self.get_moment_dtypes(torch.float32)):
            raise NotImplementedError("moments_dtype: the emulator has no moments in 8 bits")

    def get_moment_dtypes(self, param_dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        given = self.moments_dtype or param_dtype
        return given if isinstance(given, tuple) else (given, given)

    def is_bias_correction(self, group: dict) -> bool:
        """A state of torch's own AdamW names none, one of an older plugin calls it `correct_bias`."""
        return group.get("bias_correction", group.get("correct_bias", True))

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _mark_step_if_lazy()
            self._step_group(group)
        _mark_step_if_lazy()
        return loss

    def _step_group(self, group: dict) -> None:
        weights = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not weights:
            return
        if any(weight.grad.is_sparse for weight in weights):
            raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam")
        for weight in weights:
            if not self.state[weight]:
                dtypes = self.get_moment_dtypes(weight.dtype)
                moments = (torch.zeros(weight.shape, dtype=dtype, device=weight.device) for dtype in dtypes)
                self.state[weight].update(step=0, **dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True)))
        group["step"] = group.get("step", 0) + 1
        beta1, beta2 = group["betas"]
        step_size = group["lr"]
        if self.is_bias_correction(group):
            step_size *= math.sqrt(1 - beta2 ** group["step"]) / (1 - beta1 ** group["step"])

        def rounded(number: float) -> torch.Tensor:
            return torch.tensor([number]).to(weights[0].dtype).to(weights[0].device)

        decay = 1 - group["lr"] * group["weight_decay"]
        torch.ops.hpu.optimizer_adamw(
            [weight.grad for weight in weights],
            weights,
            [self.state[weight]["exp_avg"] for weight in weights],
            [self.state[weight]["exp_avg_sq"] for weight in weights],
            rounded(-step_size),
            beta1,
            beta2,
            group["eps"],
            *((decay,) if is_lazy() else (rounded(decay), decay != 1)),  # eager mode rounds it to the weights' type too
        )
