"""Supervised fine-tuning of a causal language model on Gaudi: LoRA by default, all weights with --use_peft False.

One card:     python sft.py --model_name_or_path MODEL --dataset_name DATA --output_dir sft --do_train --bf16
Eight cards:  python gaudi_spawn.py --world_size 8 --use_deepspeed sft.py \\
                  --deepspeed configs/llama2_ds_zero3_config.json ... (the same flags)
"""

from dataclasses import dataclass, field
from functools import partial

from align.cli import given_flags, parse_arguments, run_script, start_logging
from align.errors import InputError
from align.quiet import quiet_imports

with quiet_imports():
    from optimum.habana.trl import GaudiSFTConfig
    from optimum.habana.utils import set_seed

    from align.data.examples import show_examples
    from align.data.loading import DataArguments
    from align.data.preparing import prepare_data
    from align.data.tokenization import SampleTokenizer, tokenize_samples
    from align.models import loading as modeling
    from align.models.attention import check_context, may_skip_probe, probe_rows
    from align.training import checkpoints, folders
    from align.training.flags import FLAGS
    from align.training.ranks import agree, first_of_node_first
    from align.training.supervised import SupervisedTrainer, find_longest, make_all_batches
    from align.training.unused import tell_unused
    from align.upstream_fixes import attention_inputs, computes_in_autocast, gaudi_config

RECIPE = {"pad_max": False, "remove_unused_columns": False}
FOLDER = "data/finetune"  # of a data set, where it is there
CURVES = {"Loss": ["loss"], "Learning rate": ["learning_rate"]}


@dataclass
class BatchArguments:
    """How samples become batches. --packing and --max_seq_length are optimum-habana's."""

    _argument_group_name = "Batches"

    num_buckets: int = field(
        default=8, metadata={"help": "Without packing, samples are padded to at most this many lengths."}
    )
    train_on_prompt: bool = field(default=False, metadata={"help": "Learn the prompts too, not just the answers."})
    skip_probe: bool = field(
        default=False,
        metadata={"help": "Do not test whether the loaded model is causal and keeps packed samples apart."},
    )


ARGUMENTS = (
    modeling.ModelArguments,
    modeling.LoraArguments,
    DataArguments,
    BatchArguments,
    checkpoints.RunArguments,
    GaudiSFTConfig,
)


def check_batch_arguments(args: GaudiSFTConfig) -> None:
    """Flags that contradict each other."""
    folders.check_batches(args, args.max_seq_length, "--max_seq_length")
    if args.flash_attention_causal_mask and args.packing:
        raise InputError("--flash_attention_causal_mask drops the mask that packing needs: add --packing False")


def main() -> None:
    parsed = parse_arguments(ARGUMENTS, __doc__, RECIPE, FLAGS)
    model_args, lora_args, data_args, batch_args, run_args, args = parsed
    start_logging(args)
    checkpoint = folders.check_training_arguments(args, run_args, model_args.model_name_or_path)
    tell_unused(parsed, given_flags())
    modeling.check_attention_flags(model_args, args)
    check_batch_arguments(args)
    set_seed(args.seed)

    # Model, as far as it can be checked without its weights
    config = modeling.load_config(model_args)
    tokenizer = modeling.load_tokenizer(model_args, data_args.chat_template)
    modeling.check_tokenizer(tokenizer, config)
    peft_config = modeling.lora_config(lora_args, config, model_args.trust_remote_code) if args.do_train else None
    if not data_args.show_examples:
        folders.check_foreign(args)
        modeling.check_weights(model_args, args, config, "--model_name_or_path")

    # Data
    samples = SampleTokenizer(tokenizer, batch_args.train_on_prompt)
    tokenize = partial(
        tokenize_samples, tokenizer=samples, max_length=args.max_seq_length, truncation=data_args.truncation
    )
    key = f"sft {samples.fingerprint} {args.max_seq_length} {data_args.truncation}"
    has_template = bool(tokenizer.chat_template)
    with first_of_node_first(args, "data"):
        prepared = prepare_data(data_args, args, FOLDER, tokenize, key, has_template, model_args.token)
    if data_args.show_examples:
        show_examples(prepared, tokenizer, data_args.show_examples, folders.page_of(args, "examples.html"))
        return

    models = {"--model_name_or_path": checkpoints.identify_model(model_args.model_name_or_path, config._commit_hash)}
    this_run = checkpoints.Run.of("sft.py", parsed, prepared, FOLDER, models, samples)
    this_run.check(checkpoint)
    check_context(config, find_longest(prepared, args.max_seq_length))

    # Model
    folders.prepare_output(args)
    frozen = peft_config is not None or not args.do_train
    model = modeling.load_model(model_args, args, config, frozen, longest=args.max_seq_length)

    # Batches: packed where the loaded model keeps the samples of a row apart
    batch = partial(make_all_batches, prepared, args, batch_args.num_buckets, modeling.find_padding(tokenizer))
    batches, autocast = batch(packing=args.packing), computes_in_autocast(args)
    for _ in range(0 if may_skip_probe(model, batch_args.skip_probe) else 2):
        row = next(iter(batches.values())).take_row()
        if agree(partial(probe_rows, model, row, args.device, autocast, **attention_inputs(model))):
            break
        batches = batch(packing=False)

    # Trainer
    trainer = SupervisedTrainer(
        model=model,
        args=args,
        gaudi_config=gaudi_config(args),
        train=batches.get("train"),
        validation=batches.get("validation"),
        tokenizer=tokenizer,
        peft_config=peft_config,
    )
    trainer.watch(this_run, run_args, prepared)
    trainer.train_and_evaluate(checkpoint, CURVES)


if __name__ == "__main__":
    run_script(main)
