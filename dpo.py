"""Preference tuning (DPO) of a causal language model on Gaudi: LoRA by default, all weights with --use_peft False.

One card:     python dpo.py --model_name_or_path MODEL --dataset_name PAIRS --output_dir dpo
Eight cards:  python gaudi_spawn.py --world_size 8 --use_deepspeed dpo.py \\
                  --deepspeed configs/llama2_ds_zero3_config.json ... (the same flags)
"""

from dataclasses import dataclass, field, replace
from functools import partial

from align.cli import given_flags, parse_arguments, run_script, start_logging
from align.errors import InputError
from align.quiet import quiet_imports

with quiet_imports():
    from optimum.habana.trl import GaudiDPOConfig
    from optimum.habana.utils import set_seed
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    from align.data.examples import show_examples
    from align.data.loading import DataArguments
    from align.data.preparing import prepare_data
    from align.data.tokenization import SampleTokenizer, tokenize_pairs
    from align.models import loading as modeling
    from align.models.attention import check_context, may_skip_probe, probe_rows
    from align.training import checkpoints, folders, pairs, preference, reference
    from align.training.flags import FLAGS
    from align.training.ranks import agree, first_of_node_first
    from align.training.unused import tell_unused
    from align.upstream_fixes import attention_inputs, computes_in_autocast, gaudi_config

RECIPE = {
    "dataset_name": "lvwerra/stack-exchange-paired",
    "max_eval_samples": 1000,
    "truncation": "keep_end",
    "output_dir": "./results",
    "do_train": True,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "logging_steps": 10,
    "save_steps": 100,
    "max_steps": 1000,
    "num_train_epochs": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    "weight_decay": 0.05,
    "optim": "paged_adamw_32bit",
    "max_prompt_length": 512,
    "max_length": 1024,
    "bf16": True,
    "seed": 0,
    "remove_unused_columns": False,
}
FOLDER = "data/rl"  # of a data set, where it is there
CURVES = {
    "Loss": ["loss"],
    "Rewards": ["rewards/chosen", "rewards/rejected", "rewards/margins"],
    "Chosen above rejected": ["rewards/accuracies"],
    "Log-probs": ["logps/chosen", "logps/rejected"],
}


@dataclass
class PreferenceArguments:
    """How the preferences are learnt. --beta, --loss_type, --max_length and others are optimum-habana's.

    --per_device_train_batch_size counts pairs: a step takes that many x --gradient_accumulation_steps x ranks. How they
    are cut into micro-batches changes neither loss nor gradient. So a micro-batch is some rows of one length: as many
    as fit into the tokens of that many padded pairs.
    """

    _argument_group_name = "Preferences"

    ref_model: str | None = field(
        default=None,
        metadata={"help": "Reference model: a folder or a hub name (default: --model_name_or_path as it was)."},
    )
    ref_log_probs_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for what --precompute_ref_log_probs stores (default: in the data sets' cache)."},
    )
    share_prompts: bool = field(
        default=True,
        metadata={"help": "Compute the prompt of a pair once; False pads each answer."},
    )
    num_buckets: int = field(default=8, metadata={"help": "Rows are padded to at most this many lengths."})
    skip_probe: bool = field(
        default=False,
        metadata={"help": "Do not test whether the loaded model is causal and keeps shared answers apart."},
    )


ARGUMENTS = (
    modeling.ModelArguments,
    modeling.LoraArguments,
    DataArguments,
    PreferenceArguments,
    checkpoints.RunArguments,
    GaudiDPOConfig,
)


def check_preference_arguments(
    args: GaudiDPOConfig, preference_args: PreferenceArguments, lora_args: modeling.LoraArguments
) -> None:
    """Flags that contradict each other, or would have no effect."""
    if args.num_train_epochs and args.max_steps > 0:
        raise InputError(f"--num_train_epochs has no effect beside --max_steps {args.max_steps}; add --max_steps -1")
    folders.check_batches(args, 2 * args.max_length, "twice --max_length")
    if args.max_prompt_length >= args.max_length:
        raise InputError(
            f"--max_prompt_length {args.max_prompt_length}: must be from 1 to less than --max_length {args.max_length}"
        )
    if args.loss_type in preference.MIXING:
        raise InputError(
            f"--loss_type {args.loss_type} compares the pairs of one micro-batch, so that its gradient would depend on "
            f"how a step is cut; choose from {', '.join(preference.LOSSES)}"
        )
    if args.label_smoothing and args.loss_type not in preference.SMOOTHED:
        raise InputError(f"--label_smoothing has no effect on --loss_type {args.loss_type}")
    if args.label_smoothing_factor:
        raise InputError("--label_smoothing_factor has no effect on preferences: use --label_smoothing")
    if args.f_divergence_type != GaudiDPOConfig.f_divergence_type and args.loss_type not in preference.DIVERGING:
        raise InputError(f"--f_divergence_type has no effect on --loss_type {args.loss_type}")
    if args.flash_attention_causal_mask:
        raise InputError("--flash_attention_causal_mask drops the mask that keeps two answers to one prompt apart")
    if args.reference_free and (preference_args.ref_model or args.precompute_ref_log_probs or args.sync_ref_model):
        raise InputError("--reference_free: contradicts --ref_model, --precompute_ref_log_probs and --sync_ref_model")
    if args.sync_ref_model and args.precompute_ref_log_probs:
        raise InputError(
            "--sync_ref_model changes the reference, so --precompute_ref_log_probs cannot store its log-probs"
        )
    if args.sync_ref_model and (lora_args.use_peft or is_deepspeed_zero3_enabled()):
        raise InputError("--sync_ref_model moves a second whole model: add --use_peft False, and leave ZeRO-3 out")
    drops = lora_args.lora_dropout not in (0, modeling.LoraArguments.lora_dropout)
    if lora_args.use_peft and args.disable_dropout and drops:
        raise InputError(
            f"--lora_dropout {lora_args.lora_dropout:g} has no effect while --disable_dropout is on; add "
            "--disable_dropout False, or leave it out"
        )


def count_pairs(args: GaudiDPOConfig) -> int:
    """The pairs that one card computes for a step."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps


def lay_out(rows, model, ref_model, args: GaudiDPOConfig, preference_args: PreferenceArguments, pad_token_id: int):
    """Rows that two answers share where the loaded models keep the answers apart; else padded rows."""
    lengths = {name: pairs.measure(split) for name, split in rows.items()}
    models = {"--model_name_or_path": model}
    if preference_args.ref_model and ref_model is not None:
        models["--ref_model"] = ref_model
    num_buckets, cost = preference_args.num_buckets, pairs.column_cost(model.config)
    layout = pairs.separate_rows(lengths, num_buckets, args.max_length)
    if preference_args.share_prompts:
        budget = preference.token_budget(args, args.per_device_train_batch_size)
        layout = pairs.share_rows(lengths, count_pairs(args), budget, num_buckets, cost, args.seed)
    for flag, each in models.items():
        check_context(each.config, max(map(pairs.find_longest, lengths.values())), flag)
        if may_skip_probe(each, preference_args.skip_probe):
            continue
        options = {"device": args.device, "autocast": computes_in_autocast(args), "flag": flag}
        probe = partial(probe_rows, each, **options, **attention_inputs(each))
        if not agree(partial(probe, pairs.take_row(layout, rows, lengths, pad_token_id))):
            layout = pairs.separate_rows(lengths, num_buckets, args.max_length)
            agree(partial(probe, pairs.take_row(layout, rows, lengths, pad_token_id)))
    pairs.log_layout(layout, lengths)
    return layout


def main() -> None:
    parsed = parse_arguments(ARGUMENTS, __doc__, RECIPE, FLAGS)
    model_args, lora_args, data_args, preference_args, run_args, args = parsed
    start_logging(args)
    used = model_args.model_name_or_path, preference_args.ref_model
    checkpoint = folders.check_training_arguments(args, run_args, *used, measured=preference.MEASURED)
    tell_unused(parsed, given_flags())
    check_preference_arguments(args, preference_args, lora_args)
    modeling.check_attention_flags(model_args, args)
    set_seed(args.seed)

    # Model, as far as it can be checked without its weights
    config = modeling.load_config(model_args)
    tokenizer = modeling.load_tokenizer(model_args, data_args.chat_template)
    modeling.check_tokenizer(tokenizer, config)
    peft_config = modeling.lora_config(lora_args, config, model_args.trust_remote_code) if args.do_train else None
    ref_args = replace(model_args, model_name_or_path=preference_args.ref_model or model_args.model_name_or_path)
    ref_config = modeling.load_config(ref_args, "--ref_model")
    preference.check_same_vocabulary(config, ref_config, "--ref_model")
    if not data_args.show_examples:
        folders.check_foreign(args)
        modeling.check_weights(model_args, args, config, "--model_name_or_path")
        if preference_args.ref_model:
            modeling.check_weights(ref_args, args, ref_config, "--ref_model")

    # Data
    samples = SampleTokenizer(tokenizer)
    limits = {"max_prompt_length": args.max_prompt_length, "max_length": args.max_length}
    tokenize = partial(tokenize_pairs, tokenizer=samples, truncation=data_args.truncation, **limits)
    key = f"dpo {samples.fingerprint} {limits} {data_args.truncation}"
    has_template = bool(tokenizer.chat_template)
    with first_of_node_first(args, "data"):
        prepared = prepare_data(data_args, args, FOLDER, tokenize, key, has_template, model_args.token, preference=True)
    if data_args.show_examples:
        show_examples(prepared, tokenizer, data_args.show_examples, folders.page_of(args, "examples.html"))
        return
    most = count_pairs(args) * args.world_size * args.max_steps
    rows = {name: pairs.collect(part.rows, most) for name, part in prepared.items()}
    models = {
        "--model_name_or_path": checkpoints.identify_model(model_args.model_name_or_path, config._commit_hash),
        "--ref_model": checkpoints.identify_model(ref_args.model_name_or_path, ref_config._commit_hash),
    }
    this_run = checkpoints.Run.of("dpo.py", parsed, prepared, FOLDER, models, samples)
    this_run.check(checkpoint)
    stored = {}
    if args.precompute_ref_log_probs:
        is_fused = modeling.wants_flash_attention(ref_args, ref_config, args.max_length)
        about = models["--ref_model"], model_args.torch_dtype, is_fused, args.bf16
        stored = reference.find(preference_args.ref_log_probs_dir, rows, *about)

    # Model
    folders.prepare_output(args)
    frozen = peft_config is not None or not args.do_train
    model = modeling.load_model(model_args, args, config, frozen, longest=args.max_length)
    ref_model = None
    trains_adapter, resumes = peft_config is not None, checkpoint is not None
    if preference.needs_copy(args, trains_adapter, preference_args.ref_model, stored, resumes):
        # In the same precision as the model, so that both say the same before the first step
        ref_model = modeling.load_model(ref_args, args, ref_config, trains_adapter, args.max_length, "--ref_model")

    # Rows
    layout = lay_out(rows, model, ref_model, args, preference_args, modeling.find_padding(tokenizer))
    args = preference.fit_batches(args, layout)

    # Trainer
    set_seed(args.seed)  # a new adapter is the same however the model was loaded
    trainer = preference.PreferenceTrainer(
        model=model,
        ref_model=ref_model,
        args=args,
        gaudi_config=gaudi_config(args),
        layout=layout,
        pairs={name: pairs.PairDataset(split, layout.rows[name], stored.get(name)) for name, split in rows.items()},
        tokenizer=tokenizer,
        peft_config=peft_config,
    )
    trainer.watch(this_run, run_args, prepared)
    trainer.train_and_evaluate(checkpoint, CURVES)


if __name__ == "__main__":
    run_script(main)
