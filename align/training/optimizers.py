"""Checks what the flags of optimizer, schedule and loggers need, before a model is loaded."""

import importlib.util
import logging
import math

from align.errors import InputError

logger = logging.getLogger(__name__)

# Implementations of the update that Gaudi's FusedAdamW computes in one kernel. The others are CUDA's, or keep its
# moments in fewer bits to save memory.
SAME_AS_FUSED_ADAMW = {
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused"),
    *("adamw_torch_8bit", "adamw_torch_4bit", "adamw_bnb_8bit", "adamw_8bit"),
    *("paged_adamw_32bit", "paged_adamw_8bit"),
}
OF_TORCH = {"adafactor", "adagrad", "rmsprop", "sgd"}
WITHOUT_SETTINGS = ("constant", "constant_with_warmup", "inverse_sqrt")  # schedules: upstream drops what they are given
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau")
TRANSFORMER_ENGINE = "habana_frameworks.torch.hpex.experimental.transformer_engine"


def check_optimizer(args) -> None:
    """Refuses what would become another update, or fail for a missing package once the model is there."""
    name = args.optim.value
    if name not in SAME_AS_FUSED_ADAMW | OF_TORCH:
        raise InputError(
            f"--optim {name}: computes another update than FusedAdamW, with a package that is not for Gaudi; choose "
            f"from {', '.join(sorted(OF_TORCH))}, or adamw_torch, which runs as FusedAdamW"
        )
    if name in SAME_AS_FUSED_ADAMW - {"adamw_torch", "adamw_torch_fused"}:
        logger.info(f"--optim {name} runs as FusedAdamW, Gaudi's implementation of the same update")
    if args.optim_args:
        raise InputError(f"--optim_args {args.optim_args}: --optim {name} takes none")
    if args.optim_target_modules:
        raise InputError("--optim_target_modules: belongs to GaLore and APOLLO, which do not run here; leave it out")
    if args.fp8 and importlib.util.find_spec("habana_frameworks.torch.hpex.experimental") is None:
        raise InputError(f"--fp8: needs Gaudi's {TRANSFORMER_ENGINE}, which this plugin does not have; use --bf16")
    if args.do_train:
        _check_schedule(args)
    _check_loggers(args)


def _check_schedule(args) -> None:
    """Tries to make the schedule, for a parameter of its own and as many steps as are known."""
    import torch
    from transformers import get_scheduler

    name = args.lr_scheduler_type.value
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate or 1.0)
    kwargs = args.lr_scheduler_kwargs or {}
    steps = args.max_steps if args.max_steps > 0 else max(100, 2 * args.warmup_steps + 2)
    looked_at = (*range(0, steps, max(1, steps // 100)), steps)
    try:
        if kwargs and name in WITHOUT_SETTINGS:
            raise ValueError("it takes none")
        if any(isinstance(value, int | float) and not 0 <= value < math.inf for value in kwargs.values()):
            raise ValueError("its numbers are 0 or more")
        if "last_epoch" in kwargs:
            raise ValueError("last_epoch follows from the checkpoint alone")
        warmup = args.get_warmup_steps(steps)
        if args.max_steps > 0 and warmup + float(kwargs.get("num_decay_steps", -warmup)) > steps:
            raise ValueError(f"warm-up and num_decay_steps are more than the {steps} steps of the run")
        made = get_scheduler(name, optimizer, warmup, steps, scheduler_specific_kwargs=dict(kwargs))
        factors = [factor(step) for factor in getattr(made, "lr_lambdas", ()) for step in looked_at]
        if not all(0 <= factor < 1.001 for factor in factors) or (factors and not any(factors)):
            raise ValueError("it gives learning rates below 0 or above --learning_rate, or none above 0")
    except (ValueError, TypeError, ArithmeticError) as error:
        raise InputError(f"--lr_scheduler_type {name}: --lr_scheduler_kwargs {kwargs}: {error}") from error


def _check_loggers(args) -> None:
    """Tries to make each logger's callback, which looks for its package."""
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise InputError(f"--report_to {name}: is none of {known}; none keeps the log of this run alone")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError, AssertionError) as error:
            reason = " ".join(str(error).split())
            command = "" if "pip install" in reason else f" (`pip install {name}`)"
            raise InputError(
                f"--report_to {name}: {reason or 'no package'}{command}; install it, or leave it out"
            ) from error
