"""Flags of optimum-habana's training arguments that have no effect in these scripts, and what to use instead.

A flag that would change nothing is refused: whoever gives it expects something else than what would be trained. One
that changes nothing beside the others that are given is told.
"""

import logging
from collections.abc import Callable, Container, Iterable
from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import Any

from transformers.trainer_pt_utils import AcceleratorConfig

from align.errors import InputError
from align.training.optimizers import WITHOUT_WARMUP

logger = logging.getLogger(__name__)

BFLOAT16 = "Gaudi computes in bfloat16: use --bf16"
BATCHES = "batches have few fixed shapes already: see --packing and --num_buckets"
METRICS = "losses and rewards are measured without it"
OTHER_DEVICE = "it is for other devices than Gaudi"
DEPRECATED_HUB = "use --hub_model_id and --hub_token"
ONE_DATA = "use --dataset_name, and --columns where columns have other names"

WITHOUT_EFFECT = {  # of both scripts
    "do_predict": "use --do_eval, or run_generation.py for texts",
    "per_gpu_train_batch_size": "use --per_device_train_batch_size",
    "per_gpu_eval_batch_size": "use --per_device_eval_batch_size",
    "past_index": "rows of a batch do not go on in the next one",
    "label_names": "what is learnt follows from the format of the rows",
    "model_init_kwargs": "use the flags of the model",
    "dataset_num_proc": "use --num_workers",
    "data_seed": "use --seed, which orders the rows as well",
    "dataloader_drop_last": "every row is used once an epoch",
    "group_by_length": BATCHES,
    "length_column_name": BATCHES,
    "context_parallel_size": "rows are not cut over several cards: use ZeRO, or a shorter length",
    "minimize_memory": "it belongs to context parallelism, which is not used here",
    "include_inputs_for_metrics": METRICS,
    "include_for_metrics": METRICS,
    "batch_eval_metrics": METRICS,
    "eval_use_gather_object": METRICS,
    "prediction_loss_only": METRICS,
    "use_legacy_prediction_loop": METRICS,
    "eval_do_concat_batches": METRICS,
    "eval_accumulation_steps": METRICS,
    "fp16": BFLOAT16,
    "fp16_opt_level": BFLOAT16,
    "fp16_backend": BFLOAT16,
    "fp16_full_eval": BFLOAT16,
    "half_precision_backend": BFLOAT16,
    "flash_attention_fp8": "attention is trained in the number format of --bf16",
    "torch_empty_cache_steps": "Gaudi keeps its memory for the next step, there is no cache to empty",
    "tf32": OTHER_DEVICE,
    "jit_mode_eval": OTHER_DEVICE,
    "use_ipex": OTHER_DEVICE,
    "use_mps_device": OTHER_DEVICE,
    "no_cuda": OTHER_DEVICE,
    "use_cpu": "the emulator runs without a card",
    "tpu_num_cores": OTHER_DEVICE,
    "tpu_metrics_debug": OTHER_DEVICE,
    "mp_parameters": OTHER_DEVICE,
    "fsdp": "use --deepspeed with a ZeRO-3 file of configs/",
    "fsdp_min_num_params": "use --deepspeed with a ZeRO-3 file of configs/",
    "fsdp_transformer_layer_cls_to_wrap": "use --deepspeed with a ZeRO-3 file of configs/",
    "ddp_backend": "cards speak over hccl",
    "use_liger_kernel": "its kernels are Triton's, for other devices; Gaudi's own are in use already",
    "liger_kernel_config": "its kernels are Triton's, for other devices; Gaudi's own are in use already",
    "torchdynamo": "use --torch_compile",
    "ray_scope": "there is no search over hyperparameters here",
    "use_hpu_graphs": "use --use_hpu_graphs_for_training and --use_hpu_graphs_for_inference",
    "ignore_eos": "it belongs to generation: see run_generation.py --ignore_eos",
    "push_to_hub_model_id": DEPRECATED_HUB,
    "push_to_hub_organization": DEPRECATED_HUB,
    "push_to_hub_token": DEPRECATED_HUB,
    # sft.py
    "dataset_text_field": ONE_DATA,
    "dataset_kwargs": ONE_DATA,
    "dataset_batch_size": "rows are tokenized in batches of their own size",
    "eval_packing": "use --packing, which holds for both splits",
    "num_of_sequences": "rows are packed exactly, nothing is guessed",
    "chars_per_token": "rows are packed exactly, nothing is guessed",
    # dpo.py
    "truncation_mode": "use --truncation",
    "generate_during_eval": "use --sample_prompts",
    "force_use_ref_model": "--ref_model is enough",
    "ref_model_init_kwargs": "the reference is loaded as the model is",
    "model_adapter_name": "the adapter is a new one",
    "ref_adapter_name": "the reference is the model without its adapter, or --ref_model",
    "max_target_length": "use --max_length",
    "is_encoder_decoder": "only decoders are trained",
    "label_pad_token_id": "padding has no labels",
    "padding_value": "padding is never seen",
}

# Of the object of --accelerator_config: upstream would cut batches otherwise than they are made here
OF_ACCELERATOR = {
    "split_batches": "--per_device_train_batch_size counts the rows of one card",
    "dispatch_batches": "each card takes its own rows, those of a stream from the first",
    "even_batches": "all cards take equally many batches, the last ones filled up with rows that weigh nothing",
    "use_seedable_sampler": "--seed orders the rows",
    "gradient_accumulation_kwargs": "use --gradient_accumulation_steps",
}


COMPILES = (lambda flags: flags.torch_compile, "it is for --torch_compile")
ADAPTER = (lambda flags: flags.use_peft and flags.do_train, "no adapter is trained")
ADAMW = (lambda flags: "adam" in flags.optim.value, "the optimizer that --optim names has none")
SEVERAL = (
    lambda flags: flags.distributed_state.num_processes > 1 and not flags.deepspeed,
    "it is for several cards without DeepSpeed",
)
REFERENCE_MOVES = (lambda flags: flags.sync_ref_model, "it is for --sync_ref_model")
EVALUATES = (lambda flags: flags.do_eval, "nothing is evaluated")
PROFILES = (lambda flags: flags.profiling_steps > 0, "it is for --profiling_steps")
UPLOADS = (lambda flags: flags.push_to_hub, "nothing is uploaded without --push_to_hub")


def _evaluates_as_logged(flags: Any) -> bool:
    """Without --eval_steps transformers takes --logging_steps."""
    return flags.eval_strategy.value == "steps" and flags.eval_steps == flags.logging_steps


# Flags that have an effect beside others alone: when they have one, and why they have none otherwise
BESIDE_OTHERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "lora_r": ADAPTER,
    "lora_alpha": ADAPTER,
    "lora_dropout": ADAPTER,
    "lora_target_modules": ADAPTER,
    "num_train_epochs": (lambda flags: flags.max_steps <= 0, "--max_steps says how long the run is"),
    "warmup_steps": (
        lambda flags: flags.lr_scheduler_type.value not in WITHOUT_WARMUP,
        "the schedule that --lr_scheduler_type names has none",
    ),
    "warmup_ratio": (lambda flags: not flags.warmup_steps, "--warmup_steps comes before it; add --warmup_steps 0"),
    "num_buckets": (lambda flags: not getattr(flags, "packing", False), "packed rows have one length"),
    "pad_max": (lambda flags: not flags.packing, "packed rows have one length"),
    "gradient_checkpointing_kwargs": (lambda flags: flags.gradient_checkpointing, "it is for --gradient_checkpointing"),
    "adam_beta1": ADAMW,
    "adam_beta2": ADAMW,
    "adam_epsilon": ADAMW,
    "eval_steps": (lambda flags: flags.eval_strategy.value == "steps", "it is for --eval_strategy steps"),
    "eval_delay": (lambda flags: flags.eval_strategy.value != "no", "it is for --eval_strategy steps or epoch"),
    "per_device_eval_batch_size": EVALUATES,
    "max_eval_samples": EVALUATES,
    "logging_steps": (
        lambda flags: flags.logging_strategy.value == "steps" or _evaluates_as_logged(flags),
        "it is for --logging_strategy steps",
    ),
    "save_total_limit": (
        lambda flags: flags.save_strategy.value != "no" or flags.save_seconds,
        "it is for --save_strategy steps or epoch, and --save_seconds",
    ),
    "save_steps": (lambda flags: flags.save_strategy.value == "steps", "it is for --save_strategy steps"),
    "logging_dir": (lambda flags: flags.report_to, "it is for --report_to"),
    "run_name": (lambda flags: flags.report_to, "it is for --report_to"),
    "greater_is_better": (lambda flags: flags.metric_for_best_model, "it is for --metric_for_best_model"),
    "average_tokens_across_devices": (lambda flags: not hasattr(flags, "beta"), "every pair weighs the same"),
    "distribution_strategy": SEVERAL,
    "ddp_find_unused_parameters": SEVERAL,
    "ddp_bucket_cap_mb": SEVERAL,
    "ddp_broadcast_buffers": SEVERAL,
    "ddp_timeout": (lambda flags: flags.distributed_state.num_processes > 1, "it is for several cards"),
    "fsdp_config": (lambda flags: False, "use --deepspeed with a ZeRO-3 file of configs/"),
    "hub_strategy": UPLOADS,
    "hub_token": UPLOADS,
    "ref_log_probs_dir": (lambda flags: flags.precompute_ref_log_probs, "it is for --precompute_ref_log_probs"),
    "ref_model_mixup_alpha": REFERENCE_MOVES,
    "ref_model_sync_steps": REFERENCE_MOVES,
    "f_alpha_divergence_coef": (
        lambda flags: flags.f_divergence_type == "alpha_divergence",
        "it is for --f_divergence_type alpha_divergence",
    ),
    "use_compiled_autograd": COMPILES,
    "compile_from_sec_iteration": COMPILES,
    "compile_dynamic": COMPILES,
    "use_regional_compilation": COMPILES,
    "cache_size_limit": COMPILES,
    "inline_inbuilt_nn_modules": COMPILES,
    "allow_unspec_int_on_nn_module": COMPILES,
    "max_hpu_graphs": (
        lambda flags: flags.use_hpu_graphs_for_training or flags.use_hpu_graphs_for_inference,
        "it is for --use_hpu_graphs_for_training and --use_hpu_graphs_for_inference",
    ),
    "profiling_warmup_steps": PROFILES,
    "profiling_record_shapes": PROFILES,
    "profiling_with_stack": PROFILES,
}


def tell_unused(parsed: Iterable[Any], given: Container[str]) -> None:
    """One line about each flag of the command line (`given`) that changes nothing beside the others."""
    flags = SimpleNamespace(**{name: value for each in parsed for name, value in vars(each).items()})
    for name, (has_effect, reason) in BESIDE_OTHERS.items():
        if name in given and not has_effect(flags):
            logger.warning(f"--{name} has no effect here: {reason}")


def check_unused(args) -> None:
    """Refuses flags that would change nothing, where their value is not the default."""
    for each in fields(args):
        value, default = getattr(args, each.name), get_default(each)
        if each.name in WITHOUT_EFFECT and value != default and value != []:  # what transformers makes of no --fsdp
            raise InputError(f"--{each.name} has no effect here: {WITHOUT_EFFECT[each.name]}")
    for name, instead in OF_ACCELERATOR.items():
        if getattr(args.accelerator_config, name) != getattr(AcceleratorConfig, name):
            raise InputError(f"--accelerator_config: {name} cannot be changed here: {instead}")
    for name, value in (args.gradient_checkpointing_kwargs or {}).items():
        if name != "use_reentrant" or not isinstance(value, bool):
            known = '{"use_reentrant": false}'
            raise InputError(f"--gradient_checkpointing_kwargs: {name} {value!r} cannot be given here; give {known}")
    if not isinstance(args.accelerator_config.non_blocking, bool):
        raise InputError("--accelerator_config: non_blocking is true or false")


def get_default(each) -> object:
    return each.default if each.default_factory is MISSING else each.default_factory()
