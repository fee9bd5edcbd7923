"""Generates text on one Gaudi card, or on several with the model split over them (DeepSpeed tensor parallelism).

    python run_generation.py --model_name_or_path stack-llama-2/ --use_hpu_graphs --use_kv_cache --bf16 \\
        --batch_size 1 --max_new_tokens 100 --prompt "Here is my prompt"

    python run_generation.py --model_name_or_path stack-llama-2/ --chat --compare sft/final_merged_checkpoint

    python gaudi_spawn.py --world_size 8 --use_deepspeed run_generation.py --model_name_or_path stack-llama-2/ ...
"""

import gc
import logging
import os
from functools import partial
from itertools import cycle, islice

from align import __version__, cli
from align.cli import run_script
from align.errors import InputError
from align.quiet import quiet_imports
from align.upstream_flags import FP8

with quiet_imports():
    from align.generation.answers import (
        OutputArguments,
        answer_all,
        choose_display,
        count_graphs,
        describe_speed,
        find_unanswered,
        measure,
        prepare_output_dir,
        print_table,
        tell_speed,
    )
    from align.generation.chat import ChatArguments, chat, check_chat
    from align.generation.config import DecodingArguments, GaudiArguments
    from align.generation.decoding import as_shown
    from align.generation.keeping import KeptAnswers, describe_settings, write_json
    from align.generation.model import ModelArguments, find_source
    from align.generation.prompts import PromptArguments, encode_prompts, load_prompts, own_prompts, plan_batches

logger = logging.getLogger("run_generation")


ARGUMENTS = (ModelArguments, PromptArguments, DecodingArguments, GaudiArguments, OutputArguments, ChatArguments)


def parse_arguments(argv: list[str] | None) -> tuple:
    return cli.parse_arguments(ARGUMENTS, __doc__, argv=argv and list(map(str, argv)), script="run_generation.py")


def check_arguments(
    model: ModelArguments, decoding: DecodingArguments, gaudi: GaudiArguments, output: OutputArguments
) -> None:
    """Refuses values and pairs of flags that cannot work."""
    if model.model_name_or_path is None and model.peft_model is None:
        raise InputError("--model_name_or_path: missing; give a model folder or hub name")
    if os.environ.get("QUANT_CONFIG"):
        raise InputError(f"the variable QUANT_CONFIG: not here, as {FP8}; unset it, and give --bf16")
    for flag, neutral in {"temperature": (0, 1), "top_k": (0,), "top_p": (1,)}.items():
        if getattr(decoding, flag) not in (None, *neutral) and not decoding.do_sample:
            raise InputError(f"--{flag}: has an effect only with --do_sample; add it, or leave --{flag} out")
    if gaudi.limit_hpu_graphs and not gaudi.use_hpu_graphs:
        logger.warning("--limit_hpu_graphs has no effect: there are no graphs to limit without --use_hpu_graphs.")
    samples = decoding.do_sample and decoding.temperature != 0
    if decoding.num_return_sequences > 1 and not samples and decoding.num_beams == 1:
        raise InputError("--num_return_sequences: greedy answers are all the same; add --do_sample or --num_beams")
    if not all(word.strip() for word in decoding.bad_words):
        raise InputError("--bad_words: got a word without letters; leave it out")
    if 1 < decoding.num_beams < decoding.num_return_sequences:
        raise InputError(f"--num_return_sequences: got {decoding.num_return_sequences}; --num_beams must be as many")
    if gaudi.reuse_cache and not gaudi.use_kv_cache:
        raise InputError("--reuse_cache: contradicts --use_kv_cache False; leave one of them out")
    if gaudi.reuse_cache and gaudi.bucket_size > 0 and not gaudi.bucket_internal:
        raise InputError("--reuse_cache: allocates the whole cache; with --bucket_size add --bucket_internal")
    for flag in ("flash_attention_recompute", "flash_attention_causal_mask", "flash_attention_fast_softmax"):
        if getattr(gaudi, flag) and not gaudi.use_flash_attention:
            raise InputError(f"--{flag}: is a mode of flash attention; add --use_flash_attention")
    if gaudi.bucket_internal and gaudi.bucket_size < 1:
        raise InputError("--bucket_internal: needs the size of the buckets; add --bucket_size 128")
    if output.resume and (output.measures or output.output_dir is None or output.overwrite_output_dir):
        other = (
            "a benchmark" if output.measures else "--overwrite_output_dir" if output.output_dir else "no --output_dir"
        )
        raise InputError(f"--resume: goes on behind the answers in --output_dir, but there is {other}")
    if output.measures and decoding.ignore_eos is False:
        raise InputError("--ignore_eos False: a benchmark has texts of one length; leave it out")


def start_logging(level: str) -> None:
    """Sets the level of this script and its parts; libraries only warn, unless everything is wanted."""
    logging.basicConfig(level="WARNING" if level == "info" else level.upper(), format="%(message)s")
    for name in (logger.name, "align.generation"):
        logging.getLogger(name).setLevel(level.upper())


def main(argv: list[str] | None = None) -> None:
    # Read when torch loads the plugin: newer ones are eager unless told, and HPU graphs of several cards need both.
    os.environ.setdefault("PT_HPU_LAZY_MODE", "1")
    os.environ.setdefault("PT_HPU_ENABLE_LAZY_COLLECTIVES", "true")
    model_args, prompt_args, decoding_args, gaudi_args, output_args, chat_args = parse_arguments(argv)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    speaks = rank == 0 or output_args.verbose_workers
    start_logging(output_args.log_level if speaks else "error")
    check_chat(chat_args, prompt_args, decoding_args, gaudi_args, output_args, world_size)
    check_arguments(model_args, decoding_args, gaudi_args, output_args)
    if chat_args.chat:
        chat(chat_args, model_args, decoding_args, gaudi_args)
        return

    # Prompts
    prompts = load_prompts(prompt_args, world_size, model_args.token)
    given = 0 if prompts == own_prompts(prompt_args.max_input_tokens) else len(prompts)
    if output_args.measures:  # as upstream's example: no part of a batch is empty
        prompts = list(islice(cycle(prompts), max(gaudi_args.batch_size, len(prompts))))
    output_dir = prepare_output_dir(output_args, rank)
    source = find_source(model_args, world_size)
    room = source.context - decoding_args.max_new_tokens
    width = prompt_args.max_input_tokens if prompt_args.max_input_tokens > 0 else None
    encoded = encode_prompts(
        prompts, source.tokenizer, prompt_args.use_chat_template, source.vocabulary_size, room, width
    )
    lengths, ignores_padding = list(map(len, encoded)), source.ignores_padding(gaudi_args.batch_size)
    if width and ignores_padding:
        kind = f"{source.config.model_type} models"
        logger.warning(f"--max_input_tokens cuts prompts here, and pads none: {kind} would take the padding for text")
    batches = plan_batches(
        lengths,
        gaudi_args.batch_size,
        gaudi_args.bucket_size,
        room,
        width=width,
        pads=not gaudi_args.flash_attention_causal_mask,
        ignores_padding=ignores_padding,
    )
    kept = None
    if rank == 0 and output_dir is not None and not output_args.measures:
        flags = (model_args, prompt_args, decoding_args, gaudi_args)
        settings = describe_settings(flags, source.folders, encoded, world_size)
        number = len(prompts) * decoding_args.num_return_sequences
        kept = KeptAnswers(output_dir, settings, number, bool(output_args.resume), output_args.overwrite_output_dir)
        if kept.is_finished and world_size == 1:
            logger.info(f"All {number} answers are in {output_dir} already.")
            return

    # Model
    from align.generation.probing import load_generator  # torch with it, once all else is known to be right

    goes_on = output_args.measures if decoding_args.ignore_eos is None else decoding_args.ignore_eos
    cards: dict[str, int] = {"world_size": world_size, "rank": rank}
    generator = load_generator(source, decoding_args, gaudi_args, encoded, batches, goes_on=goes_on, **cards)
    gc.freeze()
    gc.enable()
    results = {
        "version": __version__,
        "model": str(source.folder),
        "cards": world_size,
        "parameters": sum(parameter.numel() for parameter in generator.model.parameters()),  # of one card
        "prompts": len(prompts),
        "shapes": len({batch.width for batch in batches}),
    }

    # Answer
    answer = partial(answer_all, generator, prompts, encoded, seed=decoding_args.seed)
    show = choose_display(generator) if speaks and output_dir is None else None
    if output_args.measures:
        each = generator.answers_per_prompt
        measured, as_upstream = measure(partial(answer, batches), output_args, len(batches), each)
        if speaks:
            for (text,) in as_upstream["output"][: given * each] if output_dir is None else ():
                print(f"{as_shown(text)}\n")
            print_table(results | measured)
        if rank == 0 and output_dir is not None:
            write_json(output_dir / "benchmark.json", results | measured)
            write_json(output_dir / "results.json", as_upstream)
        return
    if output_dir is not None:
        batches = find_unanswered(batches, kept, generator.answers_per_prompt, world_size)
        if kept is not None and not kept.is_finished:
            kept.open()
            results["answered_before"] = len(kept.answers)
    between = "\n" if prompt_args.use_chat_template else ""
    with count_graphs(output_args.show_graphs_count) as graphs:
        _, timings = answer(batches, show, between, kept=kept)
    if graphs:
        logger.info(f"{graphs['compiled']} graphs were compiled.")

    # Save
    speed = describe_speed(timings)
    tell_speed(speed)
    if kept is not None and not kept.is_finished:
        kept.finish()
        write_json(kept.folder / "generation_results.json", results | speed)


if __name__ == "__main__":
    gc.disable()  # until the model is there: searching a million lasting objects for garbage is a fifth of the start
    run_script(main)
