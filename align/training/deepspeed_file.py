"""Finds what a DeepSpeed file says against the flags, or in their place, before a model is loaded."""

import importlib.util
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

from align.errors import InputError, one_line

logger = logging.getLogger(__name__)

WITH_ZERO = {"adam", "adamw", "adagrad"}  # of those that a file can name (deepspeed/runtime/zero/utils.py)
NOT_ON_GAUDI = {"lion", "lamb"}  # kernels that DeepSpeed has for other cards (deepspeed/ops/op_builder/hpu)
OF_OPTIMIZER = ("lr", "betas", "eps", "weight_decay")  # set by flags where the file says "auto"
SETTINGS = {*OF_OPTIMIZER, "bias_correction", "adam_w_mode", "torch_adam", "lr_decay", "initial_accumulator_value"}
OF_SCHEDULE = {
    "WarmupLR": ("warmup_max_lr", "warmup_num_steps"),
    "WarmupDecayLR": ("warmup_max_lr", "warmup_num_steps"),
}
LOGS = ("tensorboard", "wandb", "csv_monitor", "comet")
OTHERS = ("curriculum_learning", "progressive_layer_drop", "data_efficiency", "amp", "elasticity", "hybrid_engine")
OF_BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
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
    if type(stage) is not int or stage not in (1, 2, 3):
        raise InputError(
            f"{file}: zero_optimization.stage is {stage} there, which shares nothing among cards; give 1, 2 or 3, or "
            "leave --deepspeed out"
        )
    if not args.do_train and stage != 3:
        raise InputError(
            f"{file}: zero_optimization.stage {stage} shares what training needs, and nothing is trained; give 3, or "
            "leave --deepspeed out"
        )
    if stage == 1 and parsed.get_value("data_types.grad_accum_dtype"):  # of which DeepSpeed makes an optimizer
        raise InputError(  # without `overflow`, see check_deepspeed_steps
            f"{file}: data_types.grad_accum_dtype goes with zero_optimization.stage 2 or 3 here; give one of them, or "
            "leave it out"
        )
    if parsed.get_value("zero_optimization.reduce_bucket_size") == 0:
        raise InputError(f"{file}: zero_optimization.reduce_bucket_size is 0 there, which holds no gradient; give more")
    if parsed.is_true("fp16.enabled"):
        raise InputError(f"{file}: fp16.enabled is true there, but Gaudi computes in bfloat16; use bf16 there")
    computes = parsed.get_value("bf16.enabled", "missing")
    if args.bf16 and "bf16" in parsed.config and computes not in (True, "auto"):
        says = str(computes).lower() if isinstance(computes, bool) else computes
        raise InputError(f'{file}: --bf16 is on, but bf16.enabled is {says} there; set it to "auto" there')
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
    for name in LOGS + OTHERS:
        if parsed.is_true(f"{name}.enabled"):
            instead = "give --report_to" if name in LOGS else "nothing here trains with it"
            raise InputError(f"{file}: {name}.enabled is true there; {instead}, and remove it there")
    _check_optimizer_and_schedule(file, parsed.config)
    _check_keys(file, parsed.config)
    if "RANK" not in os.environ and importlib.util.find_spec("mpi4py") is None:
        raise InputError(f"{file}: start the script with gaudi_spawn.py --use_deepspeed, on one card too")


def _check_optimizer_and_schedule(file: str, config: Mapping[str, Any]) -> None:
    """What the file leaves out would be DeepSpeed's own choice, whatever the flags say."""
    optimizer, schedule = config.get("optimizer", {}), config.get("scheduler", {})
    kind = schedule.get("type")
    wanted: dict[str, tuple[str, ...]] = {"optimizer": (), "scheduler": OF_SCHEDULE.get(kind, ())}
    if optimizer:
        has_betas = str(optimizer.get("type")).lower() != "adagrad"
        wanted["optimizer"] = tuple(name for name in OF_OPTIMIZER if name != "betas" or has_betas)
    for section, names in wanted.items():
        given = config.get(section, {}).get("params", {})
        if missing := [name for name in names if name not in given]:
            raise InputError(
                f'{file}: {section}.params lacks {", ".join(missing)}, so no flag would set it; add "auto" for it there'
            )
    if unknown := [name for name in optimizer.get("params", {}) if name not in SETTINGS]:
        raise InputError(f"{file}: optimizer.params.{unknown[0]} is nothing that {optimizer.get('type')} takes")
    if kind is not None:
        _try_schedule(file, kind, schedule.get("params", {}))


def _try_schedule(file: str, kind: str, params: Mapping[str, Any]) -> None:
    import torch
    from deepspeed.runtime import lr_schedules

    made = getattr(lr_schedules, str(kind), None) or getattr(torch.optim.lr_scheduler, str(kind), None)
    if made is None:
        raise InputError(f"{file}: DeepSpeed has no scheduler {kind}; name another there, or none")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    counts = {"warmup_num_steps": 1, "total_num_steps": 2}  # known later
    values = {name: counts.get(name, value) if value == "auto" else value for name, value in params.items()}
    try:
        made(optimizer, **values)
    except (TypeError, ValueError, KeyError, ArithmeticError, AttributeError) as error:
        raise InputError(f"{file}: scheduler.params {dict(params)}: {one_line(error)}") from error


class _Read(dict):
    """Keeps which keys DeepSpeed has asked for, in the set `asked`."""

    def __init__(self, values: Mapping[str, Any]):
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self  # `"amp" in config.keys()` asks as well


def _check_keys(file: str, config: Mapping[str, Any]) -> None:
    """Lets DeepSpeed read the file before a model is loaded, and tells of what it does not look at."""
    from deepspeed.runtime.config import DeepSpeedConfig

    known = {name: value for name, value in _without_auto(config).items() if name not in OF_BATCHES}
    read = _Read({**known, "train_micro_batch_size_per_gpu": 1})
    try:
        DeepSpeedConfig(read)
    except Exception as error:  # one of pydantic's, of its own, or Python's where a type is another
        found = error.errors()[0] if hasattr(error, "errors") else None
        reason = f"{'.'.join(map(str, found['loc']))}: {found['msg']}" if found else one_line(error)
        raise InputError(f"{file}: DeepSpeed cannot read it: {reason}") from error
    if unknown := sorted(known.keys() - read.asked):
        logger.warning(f"{file}: {', '.join(unknown)} has no effect: DeepSpeed knows no such setting")


def _without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    """The file without what transformers fills in once the model is there."""
    kept = {name: value for name, value in config.items() if value != "auto"}
    return {name: _without_auto(value) if isinstance(value, dict) else value for name, value in kept.items()}


def describe(mismatch: str) -> str:
    """Puts a line of transformers into this project's words: `- ds gradient_clipping=1.0 vs hf max_grad_norm=0.3`."""
    match = re.fullmatch(r"- ds (\S+?)=(.*) vs hf (.+?)=(.*)", mismatch)
    if match is None:
        return mismatch
    key, there, source, here = match.groups()
    flag = CALCULATED if "calculated" in source else " and ".join(f"--{name}" for name in source.split("+"))
    return f'{key} is {there} there, but {here} by {flag}; set it to "auto" there'
