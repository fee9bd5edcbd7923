"""Flags of optimum-habana's training arguments that have no effect in these scripts, and what to use instead.

A flag that would change nothing is refused: whoever gives it expects something else than what would be trained.
"""

from dataclasses import MISSING, fields

from align.errors import InputError

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


def check_unused(args) -> None:
    """Refuses flags that would change nothing, where their value is not the default."""
    for each in fields(args):
        value, default = getattr(args, each.name), get_default(each)
        if each.name in WITHOUT_EFFECT and value != default and value != []:  # what transformers makes of no --fsdp
            raise InputError(f"--{each.name} has no effect here: {WITHOUT_EFFECT[each.name]}")


def get_default(each) -> object:
    return each.default if each.default_factory is MISSING else each.default_factory()
