"""Finds what a DeepSpeed file says against the flags, or in their place, before a model is loaded."""

import logging
import re

from align.errors import InputError

logger = logging.getLogger(__name__)

WITH_ZERO = {"adam", "adamw", "adagrad"}  # of those that a file can name (deepspeed/runtime/zero/utils.py)
NOT_ON_GAUDI = {"lion", "lamb"}  # kernels that DeepSpeed has for other cards (deepspeed/ops/op_builder/hpu)
CALCULATED = "cards x --per_device_train_batch_size x --gradient_accumulation_steps"


def check_deepspeed(args) -> None:
    """Refuses a file that contradicts the flags; logs what it decides in their place.

    optimum-habana 1.21.2 compares most of them too (transformers/integrations/deepspeed.py), but only once the model is
    loaded. It does not compare bfloat16, where the file wins in silence.
    """
    if args.deepspeed is None:
        return
    if not args.deepspeed:
        raise InputError("--deepspeed: is empty; give a file of configs/, or leave it out")
    file = f"--deepspeed {args.deepspeed}" if isinstance(args.deepspeed, str) else "--deepspeed"
    parsed = args.hf_deepspeed_config
    for mismatch in parsed.mismatches:
        raise InputError(f"{file}: {describe(mismatch)}")
    stage = parsed.get_value("zero_optimization.stage", 0)
    if stage not in (1, 2, 3):
        raise InputError(
            f"{file}: zero_optimization.stage is {stage} there, which shares nothing among cards; give 1, 2 or 3, or "
            "leave --deepspeed out"
        )
    if stage == 1 and parsed.get_value("data_types.grad_accum_dtype"):  # of which DeepSpeed makes an optimizer
        raise InputError(  # without `overflow`, see check_deepspeed_steps
            f"{file}: data_types.grad_accum_dtype goes with zero_optimization.stage 2 or 3 here; give one of them, or "
            "leave it out"
        )
    if args.bf16 and parsed.is_false("bf16.enabled"):
        raise InputError(f'{file}: --bf16 is on, but bf16.enabled is false there; set it to "auto" there')
    if parsed.is_true("fp16.enabled"):
        raise InputError(f"{file}: fp16.enabled is true there, but Gaudi computes in bfloat16; use bf16 there")
    if parsed.get_value("bf16.enabled") is True and not args.bf16:  # to `is_true` "auto" is true as well
        logger.warning(f"{file}: bf16.enabled is true there, so the run computes in bfloat16 without --bf16")
    for name, flag in (("optimizer", f"--optim {args.optim.value}"), ("scheduler", "--lr_scheduler_type")):
        if chosen := parsed.get_value(f"{name}.type"):
            logger.warning(f"{file}: its {name} {chosen} takes the place of {flag}")
    optimizer = parsed.get_value("optimizer.type")
    allowed = parsed.is_true("zero_allow_untested_optimizer")
    known = f"name one of {', '.join(sorted(WITH_ZERO))} there, or none, and --optim decides"
    if optimizer and optimizer.lower() in NOT_ON_GAUDI:
        raise InputError(f"{file}: DeepSpeed has no {optimizer} for Gaudi; {known}")
    if optimizer and optimizer.lower() not in WITH_ZERO and parsed.get_value("zero_optimization.stage") and not allowed:
        raise InputError(f"{file}: ZeRO refuses the optimizer {optimizer}; {known}")


def describe(mismatch: str) -> str:
    """Puts a line of transformers into this project's words: `- ds gradient_clipping=1.0 vs hf max_grad_norm=0.3`."""
    match = re.fullmatch(r"- ds (\S+?)=(.*) vs hf (.+?)=(.*)", mismatch)
    if match is None:
        return mismatch
    key, there, source, here = match.groups()
    flag = CALCULATED if "calculated" in source else " and ".join(f"--{name}" for name in source.split("+"))
    return f'{key} is {there} there, but {here} by {flag}; set it to "auto" there'
