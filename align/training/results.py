"""What sft.py and dpo.py do alike around their trainers: flags, folders, the scale of the loss, results."""

import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import transformers
from optimum.habana import GaudiConfig
from transformers import HfArgumentParser, PreTrainedModel, Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import get_last_checkpoint

from align.errors import InputError, check_seed

logger = logging.getLogger(__name__)

DEFAULTS = {"use_habana": True, "use_lazy_mode": True, "report_to": "none"}
RUN_FILES = ("adapter_config.json", "adapter_model.*", "model*.safetensors", "pytorch_model*", "checkpoint-*")
RESULT_FILES = ("config.json", "generation_config.json", "model*.index.json", "*_results.json", "trainer_state.json")


class ArgumentParser(HfArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(message)


def make_parser(dataclasses: Sequence[type], description: str, defaults: Mapping[str, Any]) -> ArgumentParser:
    """`defaults` replace those of the dataclasses where the script's recipe differs from optimum-habana's."""
    parser = ArgumentParser(dataclasses, description=description, allow_abbrev=False)
    parser.set_defaults(**DEFAULTS, **defaults)
    return parser


def parse_arguments(dataclasses: Sequence[type], description: str, defaults: Mapping[str, Any]) -> tuple:
    """One instance of each dataclass from the command line; an unknown flag is an error that suggests a known one."""
    parser = make_parser(dataclasses, description, defaults)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    except (ValueError, AssertionError) as error:  # rules across flags in optimum-habana's own arguments
        raise InputError(" ".join(str(error).split())) from error
    if unknown:
        flag = unknown[0].partition("=")[0]
        close = get_close_matches(flag, parser._option_string_actions, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"unknown argument {unknown[0]!r}{hint} (--help lists them)")
    return tuple(parsed)


def check_training_arguments(args, *models: str | None) -> str | None:
    """Finds what cannot work before anything is loaded; returns the checkpoint to resume from, if any.

    `models` are those that the run reads, which it must not replace.
    """
    if not (args.do_train or args.do_eval):
        raise InputError("nothing to do: give --do_train, --do_eval or both")
    check_seed(args.seed)
    if args.flash_attention_causal_mask and getattr(args, "packing", False):
        raise InputError("--flash_attention_causal_mask drops the mask that packing needs: add --packing False")
    output = Path(args.output_dir)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output_dir: {output} is a file; name a folder")
    wanted = args.resume_from_checkpoint
    if wanted in (None, "False", "false"):
        held = next((path for name in RUN_FILES for path in output.glob(name)), None)
        if args.do_train and held is not None and not args.overwrite_output_dir:
            raise InputError(
                f"--output_dir: {output} holds another run ({held.name}); add --resume_from_checkpoint True to go on "
                "with it, --overwrite_output_dir to replace it, or name another folder"
            )
        replaced = [output.resolve(), *(path.resolve() for path in output.glob("checkpoint-*"))]
        used = next((model for model in models if model and Path(model).resolve() in replaced), None)
        if args.do_train and held is not None and used is not None:
            raise InputError(f"--overwrite_output_dir would replace {used}, which this run reads; name another folder")
        return None
    if wanted in ("True", "true"):
        checkpoint, place = get_last_checkpoint(str(output)) if output.is_dir() else None, output
    else:
        checkpoint = place = wanted
    if checkpoint is None or not Path(checkpoint).is_dir():
        raise InputError(f"--resume_from_checkpoint: no checkpoint at {place}")
    return checkpoint


def clear_output(args, checkpoint: str | None) -> None:
    """Removes what an earlier run left in --output_dir, where --overwrite_output_dir asks for it (rank 0).

    Else that run's last checkpoint might be resumed from, or its adapter be loaded on top of newly trained weights.
    """
    if checkpoint is None and args.overwrite_output_dir and args.should_save:
        for path in [path for name in RUN_FILES + RESULT_FILES for path in Path(args.output_dir).glob(name)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def start_logging(args) -> None:
    """Rank 0 tells what it does, in the log level that --log_level names (default: info); the others only warn."""
    level = args.get_process_log_level()
    transformers.utils.logging.set_verbosity(max(level, logging.WARNING) if args.log_level == "passive" else level)
    if not args.should_log:
        level = logging.ERROR
    elif args.log_level == "passive":
        level = logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    root = logging.getLogger("align")
    root.handlers, root.propagate = [handler], False
    root.setLevel(level)


def attention_inputs(model: PreTrainedModel) -> dict[str, bool]:
    """What optimum-habana's trainers pass to the forward of a model whose generation config asks for it."""
    names = ("use_flash_attention", "flash_attention_recompute", "flash_attention_causal_mask")
    values = {name: getattr(model.generation_config, name, None) for name in names}
    return {name: True for name, value in values.items() if value}


def gaudi_config(args) -> GaudiConfig:
    """The fused optimizer for every flavour of AdamW that --optim can name, else the optimizer that it names.

    Paged and 8-bit AdamW are CUDA implementations of the same update, which Gaudi's FusedAdamW computes.
    """
    config = GaudiConfig()
    config.use_fused_adam = args.use_habana and "adamw" in str(args.optim.value)
    config.use_fused_clip_norm = args.use_habana
    if config.use_fused_adam and args.optim.value not in ("adamw_torch", "adamw_torch_fused"):
        logger.info(f"--optim {args.optim.value} runs as FusedAdamW, Gaudi's implementation of the same update")
    return config


class RightScale(Trainer):
    """Divides the loss by the accumulation steps where optimum-habana forgets to.

    optimum-habana 1.21.2 does it inside `if use_lazy_mode and pipelining_fwd_bwd` (transformers/trainer.py:1752), so
    that elsewhere loss and gradient are too large by that factor unless the model divides by the batch's tokens itself.
    Can go when that division stands outside.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        if not model.training or self._loss_is_scaled(num_items_in_batch):
            return result
        steps = self.current_gradient_accumulation_steps
        return (result[0] / steps, *result[1:]) if return_outputs else result / steps

    def _loss_is_scaled(self, num_items_in_batch) -> bool:
        takes_count = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        divided_later = self.args.use_lazy_mode and self.args.pipelining_fwd_bwd
        return (takes_count and num_items_in_batch is not None) or divided_later


class WholeSteps(Trainer):
    """Takes the last step of an epoch also where a run was resumed within it.

    optimum-habana 1.21.2 counts the batches of a resumed epoch from 0 and compares with those of a whole one
    (transformers/trainer.py:1005): of a last step with fewer batches the gradient would stay and join the next one's.
    It is filled up with batches that are `without_loss`. Batches asked for after it are none.
    """

    def get_batch_samples_transformers(self, epoch_iterator, num_batches, device):
        """Adds the labels up; optimum-habana 1.21.2 (:2813) concatenates them and gives up on batches of two widths."""
        batches, count = Trainer.get_batch_samples(self, epoch_iterator, num_batches, device)
        if batches:
            batches += [self.without_loss(batches[-1])] * (num_batches - len(batches))
        return batches, count

    def without_loss(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch of the same shape that has neither loss nor gradient."""
        raise NotImplementedError


class StepsInParts(Trainer):
    """Makes FusedAdamW right under ZeRO-3, which steps one part of the weights after the other.

    DeepSpeed 0.16.9 empties the groups of all other parts meanwhile (runtime/zero/stage3.py:986), but FusedAdamW counts
    the steps of its bias correction by group, empty or not: all parts but the first would be corrected for a later
    step.
    """

    def create_optimizer(self) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer()
        if is_new and is_deepspeed_zero3_enabled():
            optimizer.register_step_pre_hook(_show_one_part)
            optimizer.register_step_post_hook(_show_all_parts)
        return optimizer


def _show_one_part(optimizer: torch.optim.Optimizer, *_) -> None:
    optimizer.groups_of_all_parts = optimizer.param_groups
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    for group in optimizer.param_groups:
        group.pop("step", None)
        if "steps" in (state := optimizer.state[group["params"][0]]):
            group["step"] = state["steps"]


def _show_all_parts(optimizer: torch.optim.Optimizer, *_) -> None:
    for group in optimizer.param_groups:
        if "step" in group:
            optimizer.state[group["params"][0]]["steps"] = group["step"]
    optimizer.param_groups = optimizer.groups_of_all_parts


def save_results(trainer: Trainer, name: str, metrics: dict[str, float]) -> None:
    """Writes `{name}_results.json` and adds to `all_results.json` (rank 0)."""
    trainer.log_metrics(name, metrics)
    trainer.save_metrics(name, metrics)


def save_history(trainer: Trainer, panels: Mapping[str, Sequence[str]]) -> None:
    """Writes all that was logged to `trainer_state.json` and draws it into `curves.png` (rank 0).

    `panels` names the metrics of each panel, which shows them for training and evaluation.
    """
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name in [prefix + name for name in names for prefix in ("", "eval_")]:
            points = [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]
            if points:
                axes.plot(
                    *zip(*points, strict=True), label=name, marker="o" if len(points) < 30 else None, markersize=3
                )
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    path = os.path.join(trainer.args.output_dir, "curves.png")
    figure.savefig(path, dpi=120)
    logger.info(f"curves: {path}")
