"""Generates text on one Gaudi card, or on several with the model split over them (DeepSpeed tensor parallelism).

    python run_generation.py --model_name_or_path stack-llama-2/ --use_hpu_graphs --use_kv_cache --bf16 \
        --batch_size 1 --max_new_tokens 100 --prompt "Here is my prompt"

    python run_generation.py --model_name_or_path stack-llama-2/ --chat --compare sft/final_merged_checkpoint

    python gaudi_spawn.py --world_size 8 --use_deepspeed run_generation.py --model_name_or_path stack-llama-2/ ...
"""

import gc
import logging
import os
import sys
from functools import partial

from align.cli import run_script
from align.errors import InputError, check_seed
from align.generation.answers import (
    OutputArguments,
    answer_all,
    describe_speed,
    measure,
    prepare_output_dir,
    print_table,
    write_json,
)
from align.generation.chat import ChatArguments, chat, check_chat
from align.generation.config import (
    DecodingArguments,
    GaudiArguments,
    check_support,
    find_end_tokens,
    find_stop_tokens,
    make_generation_config,
)
from align.generation.decoding import TextGenerator
from align.generation.model import ModelArguments, find_folders, load_config_and_tokenizer, load_model
from align.generation.prompts import PromptArguments, encode_prompts, load_prompts, plan_batches
from align.upstream_fixes import adapt_transformers

logger = logging.getLogger("run_generation")


Arguments = tuple[ModelArguments, PromptArguments, DecodingArguments, GaudiArguments, OutputArguments, ChatArguments]


def parse_arguments(argv: list[str] | None) -> Arguments:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        (ModelArguments, PromptArguments, DecodingArguments, GaudiArguments, OutputArguments, ChatArguments),
        prog="run_generation.py",
        usage="run_generation.py --model_name_or_path MODEL --prompt PROMPT [flags, see --help]",
        description="Generate text with a causal language model on Gaudi.",
        allow_abbrev=False,
    )
    *arguments, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise InputError(f"unknown argument(s) {' '.join(unknown)}; --help lists the flags")
    return tuple(arguments)


def check_arguments(
    model: ModelArguments, decoding: DecodingArguments, gaudi: GaudiArguments, output: OutputArguments
) -> None:
    """The rules that values and pairs of flags must keep."""
    if model.model_name_or_path is None and model.peft_model is None:
        raise InputError("--model_name_or_path: missing; give a model folder or hub name")
    least = {
        "max_new_tokens": (decoding.max_new_tokens, 1),
        "num_beams": (decoding.num_beams, 1),
        "top_k": (decoding.top_k, 1),
        "batch_size": (gaudi.batch_size, 1),
        "warmup": (output.warmup, 0),
        "n_iterations": (output.n_iterations, 1),
    }
    for flag, (value, limit) in least.items():
        if value is not None and value < limit:
            raise InputError(f"--{flag}: got {value}; give {limit} or more")
    check_seed(decoding.seed)
    for flag in ("temperature", "repetition_penalty"):
        value = getattr(decoding, flag)
        if value is not None and value <= 0:
            raise InputError(f"--{flag}: got {value:g}; give more than 0")
    if decoding.top_p is not None and not 0 < decoding.top_p <= 1:
        raise InputError(f"--top_p: got {decoding.top_p:g}; give more than 0, at most 1")
    for flag in ("temperature", "top_k", "top_p"):
        if getattr(decoding, flag) is not None and not decoding.do_sample:
            raise InputError(f"--{flag}: has an effect only with --do_sample; add it, or leave --{flag} out")
    if gaudi.bucket_size == 0 or gaudi.bucket_size < -1:
        raise InputError(f"--bucket_size: got {gaudi.bucket_size}; give a number of tokens, or -1 for none")
    if gaudi.limit_hpu_graphs and not gaudi.use_hpu_graphs:
        raise InputError("--limit_hpu_graphs: there are no graphs to limit; add --use_hpu_graphs")
    if decoding.num_beams > 1 and (gaudi.reuse_cache or gaudi.bucket_size > 0):
        raise InputError("--num_beams: beams are searched on growing shapes, without --reuse_cache and --bucket_size")
    if gaudi.reuse_cache and not gaudi.use_kv_cache:
        raise InputError("--reuse_cache: contradicts --use_kv_cache False; leave one of them out")
    if gaudi.reuse_cache and gaudi.bucket_size > 0:
        raise InputError("--reuse_cache: allocates the whole cache, --bucket_size grows it; leave one of them out")
    if gaudi.flash_attention_recompute and not gaudi.use_flash_attention:
        raise InputError("--flash_attention_recompute: is a mode of flash attention; add --use_flash_attention")
    if output.benchmark and output.output_dir is None:
        raise InputError("--benchmark: give --output_dir, where benchmark.json shall go")


def main(argv: list[str] | None = None) -> None:
    # Read when torch loads the plugin: newer ones are eager unless told, and HPU graphs of several cards need both.
    os.environ.setdefault("PT_HPU_LAZY_MODE", "1")
    os.environ.setdefault("PT_HPU_ENABLE_LAZY_COLLECTIVES", "true")
    model_args, prompt_args, decoding_args, gaudi_args, output_args, chat_args = parse_arguments(argv)
    check_arguments(model_args, decoding_args, gaudi_args, output_args)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logging.basicConfig(level=logging.WARNING if rank == 0 else logging.ERROR, format="%(message)s")
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)

    check_chat(chat_args, prompt_args, decoding_args, gaudi_args, output_args, world_size)
    if chat_args.chat:
        chat(chat_args, model_args, decoding_args, gaudi_args)
        return

    # Prompts
    prompts = load_prompts(prompt_args, world_size)
    output_dir = prepare_output_dir(output_args)
    folder, tokenizer_folder, adapter = find_folders(
        model_args.model_name_or_path, model_args.tokenizer_name_or_path, model_args.peft_model
    )
    model_config, tokenizer = load_config_and_tokenizer(folder, tokenizer_folder, model_args.trust_remote_code)
    heads = getattr(model_config, "num_key_value_heads", None) or model_config.num_attention_heads
    if heads % world_size:
        raise InputError(f"--world_size: {world_size} cards cannot share {heads} key/value heads evenly")
    vocabulary_size = max(model_config.vocab_size, len(tokenizer) if adapter else 0)
    room = getattr(model_config, "max_position_embeddings", sys.maxsize) - decoding_args.max_new_tokens
    encoded = encode_prompts(prompts, tokenizer, prompt_args.use_chat_template, vocabulary_size, room)
    stop_tokens = find_stop_tokens(decoding_args.stop_tokens, tokenizer)
    batches = plan_batches(list(map(len, encoded)), gaudi_args.batch_size, gaudi_args.bucket_size, room)

    # Model
    adapt_transformers()
    model = load_model(
        folder,
        adapter,
        vocabulary_size,
        model_args.bf16,
        model_args.trust_remote_code,
        world_size,
        gaudi_args.use_hpu_graphs,
    )
    check_support(model, gaudi_args)
    penalty = decoding_args.repetition_penalty or model.generation_config.repetition_penalty or 1.0
    end_tokens = [] if output_args.benchmark else find_end_tokens(model, tokenizer, stop_tokens)
    config = make_generation_config(model, tokenizer, decoding_args, gaudi_args, end_tokens)
    generator = TextGenerator(
        model,
        tokenizer,
        config,
        end_tokens=end_tokens,
        repetition_penalty=penalty,
        use_hpu_graphs=gaudi_args.use_hpu_graphs,
        rows=min(gaudi_args.batch_size, len(prompts)),
    )

    # Generate
    gc.freeze()
    gc.enable()
    from optimum.habana.utils import set_seed  # quick only now

    set_seed(decoding_args.seed)
    results = {
        "model": str(folder),
        "cards": world_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),  # of one card
        "prompts": len(prompts),
        "shapes": len({batch.width for batch in batches}),
    }
    if output_args.benchmark:
        run = partial(answer_all, generator, prompts, encoded, batches)
        results |= measure(lambda: run()[1], output_args.warmup, output_args.n_iterations)
        if rank == 0:
            print_table(results)
            write_json(output_dir / "benchmark.json", results)
        return
    streams = sys.stdout.isatty() and generator.rows == 1 and config.num_beams == 1
    show = None if rank != 0 or output_dir is not None else "stream" if streams else "print"
    between = "\n" if prompt_args.use_chat_template else ""
    answers, timings = answer_all(generator, prompts, encoded, batches, show, between)

    # Save
    speed = describe_speed(timings)
    first = f", the first after {speed['first_token_seconds']:.2f} s" if speed["first_token_seconds"] else ""
    logger.info(
        f"{speed['new_tokens']} tokens in {speed['seconds']:.2f} s: {speed['tokens_per_second']:.1f} tokens/s{first}"
    )
    if rank == 0 and output_dir is not None:
        write_json(output_dir / "generations.jsonl", answers)
        write_json(output_dir / "generation_results.json", results | speed)


if __name__ == "__main__":
    gc.disable()  # until the model is there: searching a million lasting objects for garbage is a fifth of the start
    run_script(main)
