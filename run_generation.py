"""Generates text on one Gaudi card, or on several with the model split over them (DeepSpeed tensor parallelism).

    python run_generation.py --model_name_or_path stack-llama-2/ --use_hpu_graphs --use_kv_cache --bf16 \
        --batch_size 1 --max_new_tokens 100 --prompt "Here is my prompt"

    python gaudi_spawn.py --world_size 8 --use_deepspeed run_generation.py --model_name_or_path stack-llama-2/ ...
"""

import copy
import gc
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from align.cli import run_script
from align.errors import InputError, check_seed
from align.generation.decoding import (
    Batch,
    TerminalStreamer,
    TextGenerator,
    Timing,
    decode_new,
    encode_prompts,
    find_folders,
    find_stop_tokens,
    load_config_and_tokenizer,
    load_model,
    plan_batches,
    read_prompts,
)
from align.upstream_fixes import adapt_transformers

if TYPE_CHECKING:
    from optimum.habana.transformers.generation import GaudiGenerationConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("run_generation")


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model folder or hub name (default: the base that --peft_model names)."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer: a folder or hub name (default: the adapter's, else the model's)."}
    )
    peft_model: str | None = field(
        default=None, metadata={"help": "Adapter folder or hub name, folded into the model in memory."}
    )
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16 instead of float32."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


@dataclass
class PromptArguments:
    prompt: list[str] | None = field(default=None, metadata={"help": "One or more prompts."})
    prompt_file: str | None = field(
        default=None, metadata={"help": "File of prompts: .jsonl with --column_name, else one prompt a line."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Data set of prompts: hub name, folder or file."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the data set."})
    column_name: str = field(default="prompt", metadata={"help": "Column of the prompts in a .jsonl file or data set."})
    use_chat_template: bool = field(
        default=False, metadata={"help": "Wrap each prompt as a user's turn of the tokenizer's chat template."}
    )


@dataclass
class DecodingArguments:
    max_new_tokens: int = field(default=100, metadata={"help": "Longest answer in tokens."})
    stop_tokens: list[str] = field(
        default_factory=list, metadata={"help": "Tokens that end a text besides the model's own end tokens."}
    )
    do_sample: bool = field(default=False, metadata={"help": "Sample instead of taking the likeliest token."})
    temperature: float | None = field(default=None, metadata={"help": "Temperature of --do_sample, above 0."})
    top_k: int | None = field(default=None, metadata={"help": "Sample among this many likeliest tokens."})
    top_p: float | None = field(default=None, metadata={"help": "Sample among the likeliest tokens of this mass."})
    num_beams: int = field(default=1, metadata={"help": "Beams of a beam search; 1 is none."})
    repetition_penalty: float | None = field(
        default=None, metadata={"help": "Divides the logits of tokens that were said before; 1 is none."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of --do_sample."})


@dataclass
class GaudiArguments:
    batch_size: int = field(default=1, metadata={"help": "Prompts generated together."})
    use_kv_cache: bool = field(default=True, metadata={"help": "Keep keys and values of earlier tokens."})
    use_hpu_graphs: bool = field(default=False, metadata={"help": "Record the model's forward as HPU graphs."})
    limit_hpu_graphs: bool = field(
        default=False, metadata={"help": "Leave the prompt's forward out of the HPU graphs, to save memory."}
    )
    reuse_cache: bool = field(
        default=False, metadata={"help": "Allocate the key/value cache once, inside the attention layers."}
    )
    bucket_size: int = field(
        default=-1, metadata={"help": "Grow the sequence by this many tokens at a time; -1 allocates all at once."}
    )
    use_flash_attention: bool = field(default=False, metadata={"help": "Use flash attention for the prompt."})
    flash_attention_recompute: bool = field(
        default=False, metadata={"help": "Use flash attention's recompute mode, to save memory on long prompts."}
    )


@dataclass
class OutputArguments:
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for generations.jsonl and generation_results.json."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the results of an earlier run."})
    benchmark: bool = field(
        default=False, metadata={"help": "Measure speed at exactly --max_new_tokens, into benchmark.json."}
    )
    warmup: int = field(default=3, metadata={"help": "Untimed runs over all prompts before a benchmark."})
    n_iterations: int = field(default=5, metadata={"help": "Timed runs over all prompts of a benchmark."})


Arguments = tuple[ModelArguments, PromptArguments, DecodingArguments, GaudiArguments, OutputArguments]


def parse_arguments(argv: list[str] | None) -> Arguments:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        (ModelArguments, PromptArguments, DecodingArguments, GaudiArguments, OutputArguments),
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


def load_prompts(arguments: PromptArguments, world_size: int) -> list[str]:
    if world_size > 1 and (arguments.prompt, arguments.prompt_file, arguments.dataset_name) == (None, None, None):
        raise InputError("no prompt: give --prompt, --prompt_file or --dataset_name; stdin does not reach all ranks")
    return read_prompts(
        arguments.prompt,
        arguments.prompt_file,
        arguments.dataset_name,
        arguments.dataset_split,
        arguments.column_name,
    )


def prepare_output_dir(arguments: OutputArguments) -> Path | None:
    if arguments.output_dir is None:
        return None
    folder = Path(arguments.output_dir)
    result = folder / ("benchmark.json" if arguments.benchmark else "generations.jsonl")
    if result.exists() and not arguments.overwrite_output_dir:
        raise InputError(f"--output_dir: {folder} holds another run; choose another, or add --overwrite_output_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir: {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output_dir: {folder} is not writable")
    return folder


def has_static_shapes(model: "PreTrainedModel") -> bool:
    """Whether the model takes the place of the next token as a tensor, in sequences padded to their final length."""
    return "token_idx" in inspect.signature(type(model).forward).parameters


def check_support(model: "PreTrainedModel", gaudi: GaudiArguments) -> None:
    """What optimum-habana can do with some models only."""
    kind = model.config.model_type
    if gaudi.reuse_cache and not hasattr(model, "allocate_kv_cache"):
        raise InputError(f"--reuse_cache: optimum-habana has none for {kind} models; leave it out")
    if gaudi.bucket_size > 0 and not has_static_shapes(model):
        raise InputError(f"--bucket_size: optimum-habana has no static shapes for {kind} models; leave it out")


def make_generation_config(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    decoding: DecodingArguments,
    gaudi: GaudiArguments,
    end_tokens: list[int],
) -> "GaudiGenerationConfig":
    """The model's own generation config, with what the user asked for on top; `model` gets it as its own."""
    config = copy.deepcopy(model.generation_config)
    beams = decoding.num_beams > 1
    # Its beam search on static shapes knows one end token and puts any finished beam first (utils.py:3175).
    static_shapes = not beams and has_static_shapes(model)
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, *end_tokens)  # masked, so any token will do
    sampling = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
    if decoding.do_sample:
        sampling = {key: value for key in sampling if (value := getattr(decoding, key)) is not None}
    config.update(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.num_beams,
        do_sample=decoding.do_sample,
        **sampling,
        repetition_penalty=1.0,  # RepetitionPenalty does it
        pad_token_id=next((pad for pad in pads if pad is not None and pad < model.config.vocab_size), 0),
        eos_token_id=(end_tokens or None) if beams else None,  # EndWatch looks for them
        ignore_eos=True,
        static_shapes=static_shapes,
        use_cache=gaudi.use_kv_cache,
        trim_logits=gaudi.use_kv_cache and static_shapes,  # the head sees the last position of a prompt alone
        reuse_cache=gaudi.reuse_cache,
        bucket_size=gaudi.bucket_size,
        limit_hpu_graphs=gaudi.limit_hpu_graphs,
        use_flash_attention=gaudi.use_flash_attention,
        flash_attention_recompute=gaudi.flash_attention_recompute,
    )
    model.generation_config = config  # where generate() looks for tokens that its own config leaves out
    return config


def find_end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", stop_tokens: set[int]) -> list[int]:
    """All tokens that end a text: the model's, the tokenizer's and the user's."""
    own = model.generation_config.eos_token_id
    return sorted(stop_tokens.union(own if isinstance(own, list) else [own], [tokenizer.eos_token_id]) - {None})


def answer_all(
    generator: TextGenerator,
    prompts: list[str],
    encoded: list[list[int]],
    batches: list[Batch],
    show: str | None = None,
    between: str = "",
) -> tuple[list[dict[str, Any]], list[Timing]]:
    """One answer a prompt, in the order of the prompts, and one timing a batch.

    `show`: `stream` prints each text as it appears, `print` as soon as those before it are there; `between` prompt and
    text.
    """
    answers: list[dict[str, Any] | None] = [None] * len(prompts)
    timings, shown = [], 0
    for batch in batches:
        ids = [encoded[place] for place in batch.places]
        streamer = None
        if show == "stream":
            print(prompts[batch.places[0]], end=between, flush=True)
            streamer = TerminalStreamer(generator.tokenizer, ids[0], generator.end_tokens)
        new, timing = generator.generate(ids, batch.width, streamer)
        timings.append(timing)
        for place, tokens in zip(batch.places, new, strict=True):
            stopped = tokens[-1] in generator.end_tokens
            text = decode_new(generator.tokenizer, encoded[place], tokens[:-1] if stopped else tokens)
            answers[place] = {"prompt": prompts[place], "text": text, "tokens": len(tokens), "stopped": stopped}
        while show == "print" and shown < len(prompts) and answers[shown] is not None:
            print(answers[shown]["prompt"] + between + answers[shown]["text"] + "\n", flush=True)
            shown += 1
    return answers, timings


def describe_speed(timings: list[Timing]) -> dict[str, float]:
    """Means over batches in seconds, and tokens per second: of the answers alone, and of prompts and answers."""
    seconds = sum(timing.total for timing in timings)
    new_tokens = sum(timing.new_tokens for timing in timings)
    prompt_tokens = sum(timing.prompt_tokens for timing in timings)
    timed = [timing for timing in timings if timing.first_token is not None]
    later = [(timing.total - timing.first_token) / (timing.steps - 1) for timing in timed if timing.steps > 1]
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "seconds": round(seconds, 4),
        "first_token_seconds": round(mean(timing.first_token for timing in timed), 5) if timed else None,
        "later_token_seconds": round(mean(later), 5) if later else None,
        "tokens_per_second": round(new_tokens / seconds, 2),
        "tokens_per_second_with_prompt": round((new_tokens + prompt_tokens) / seconds, 2),
    }


def measure(run: Callable[[], list[Timing]], warmup: int, n_iterations: int) -> dict[str, Any]:
    """Speed of the timed runs, and what the warm-up needed: graphs that were compiled, memory."""
    from optimum.habana.utils import get_hpu_memory_stats

    from habana_frameworks.torch.hpu.metrics import metric_localcontext

    with metric_localcontext("graph_compilation") as compilation:
        for _ in range(warmup):
            run()
    timings = [timing for _ in range(n_iterations) for timing in run()]
    memory = get_hpu_memory_stats()
    return describe_speed(timings) | {
        "graphs": dict(compilation.stats())["TotalNumber"] if warmup else None,
        "memory_gb": memory["memory_allocated (GB)"],
        "max_memory_gb": memory["max_memory_allocated (GB)"],
    }


def print_table(results: dict[str, Any]) -> None:
    for name, value in results.items():
        print(f"{name:30} {value}")


def write_json(path: Path, content: dict | list[dict]) -> None:
    """Writes an object as JSON, or a list as JSON lines; the file appears whole or not at all."""
    lines = [json.dumps(content, indent=2)] if isinstance(content, dict) else map(json.dumps, content)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    partial.replace(path)


def main(argv: list[str] | None = None) -> None:
    # Read when torch loads the plugin: newer ones are eager unless told, and HPU graphs of several cards need both.
    os.environ.setdefault("PT_HPU_LAZY_MODE", "1")
    os.environ.setdefault("PT_HPU_ENABLE_LAZY_COLLECTIVES", "true")
    model_args, prompt_args, decoding_args, gaudi_args, output_args = parse_arguments(argv)
    check_arguments(model_args, decoding_args, gaudi_args, output_args)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logging.basicConfig(level=logging.WARNING if rank == 0 else logging.ERROR, format="%(message)s")
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)

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
