"""The flags of optimum-habana's examples (1.21.2), and what each of them does here.

    python -m align.upstream_flags > docs/upstream.md

Commands that were written for its sft.py, dpo.py, merge_peft_adapter.py, gaudi_spawn.py and run_generation.py run as
they are, or stop with the reason. The scripts' parsers know only their own flags; `translate` puts these in place of
upstream's.
"""

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from align.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Same:
    """A flag of this script too; `note` says where its default or its meaning differs, `spelt` a value for another."""

    note: str = ""
    spelt: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Instead:
    """`by` takes its place, with the value for `{}`; a switch that is off leaves nothing.

    One that `is_boolean` puts `true` or `false` there.
    """

    by: str
    note: str = ""
    is_switch: bool = False
    is_boolean: bool = False


@dataclass(frozen=True)
class Always:
    """Accepted, as what it asks for is so in any case. Where `values` are given, others are refused."""

    note: str
    values: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Unused:
    """Accepted, with a warning that it has no effect."""

    note: str


@dataclass(frozen=True)
class Refused:
    """Not here: why, and which way works. A value in `neutral` asks for nothing and passes."""

    why: str
    way: str
    neutral: tuple[str, ...] = ()


Flag = Same | Instead | Always | Unused | Refused

MORE_CARDS = "give --bf16, and more cards where one is too small"
EAGER_GRAPHS = "--use_hpu_graphs is the fast way here"
FP8 = "FP8 needs Intel's neural_compressor and a calibration, which are not part of this project"

LORA_AND_BATCHES: dict[str, Flag] = {
    "model_name_or_path": Same(),
    "lora_alpha": Same(),
    "lora_dropout": Same(),
    "lora_r": Same(),
    "lora_target_modules": Same("names that match no module are refused"),
}

FLAGS: dict[str, dict[str, Flag]] = {
    "sft.py": LORA_AND_BATCHES
    | {
        "dataset_name": Same("a file or a folder as well"),
        "use_peft": Same(),
        "subset": Same("by default `data/finetune` where the data set has it; `None` is the whole data set"),
        "split": Same(),
        "size_valid_set": Same(),
        "streaming": Same("by default only hub data sets whose run ends at `--max_steps`"),
        "shuffle_buffer": Same(),
        "num_workers": Same(),
        "num_buckets": Same("by default 8; `-1` pads all samples to one length", (("-1", "1"),)),
        "validation_split_percentage": Same(),
        "use_flash_attention": Same("by default where it is exact, and with `--flash_attention_recompute`"),
        "token": Same(),
    },
    "dpo.py": LORA_AND_BATCHES
    | {
        "tokenizer_name_or_path": Same("by default the model's"),
        "beta": Same(),
        "learning_rate": Same(),
        "lr_scheduler_type": Same(),
        "warmup_steps": Same(),
        "weight_decay": Same("upstream never uses it"),
        "optimizer_type": Instead("--optim {}"),
        "per_device_train_batch_size": Same(),
        "per_device_eval_batch_size": Same(),
        "gradient_accumulation_steps": Same(),
        "gradient_checkpointing": Same(),
        "gradient_checkpointing_use_reentrant": Instead(
            '--gradient_checkpointing_kwargs {{"use_reentrant":{}}}', is_boolean=True
        ),
        "max_prompt_length": Same("in tokens; upstream measures pairs in characters"),
        "max_length": Same("in tokens; upstream measures pairs in characters"),
        "max_steps": Same(),
        "logging_steps": Same(),
        "save_steps": Same(),
        "eval_steps": Same(),
        "output_dir": Same(),
        "log_freq": Unused("upstream never uses it either; `--logging_steps` says how often to log"),
        "sanity_check": Instead("--max_train_samples 1000", is_switch=True),
        "report_to": Same("by default `none`"),
        "ignore_bias_buffers": Instead(
            "--ddp_broadcast_buffers False", "all buffers, not only the boolean ones", is_switch=True
        ),
        "seed": Same(),
        "deepspeed": Same(),
        "num_workers": Same(),
    },
    "merge_peft_adapter.py": {
        "adapter_model_name": Same(),
        "base_model_name": Same("by default the base that the adapter names"),
        "output_name": Same(),
    },
    "gaudi_spawn.py": {
        "world_size": Same(),
        "hostfile": Same(),
        "use_mpi": Same(),
        "use_deepspeed": Same(),
        "master_port": Same("by default a free one"),
    },
    "run_generation.py": {
        # Model
        "model_name_or_path": Same(),
        "peft_model": Same(),
        "token": Same(),
        "model_revision": Same(),
        "trust_remote_code": Same(),
        "trust_remote_code_tokenizer": Same(),
        "bf16": Same("several cards compute in bfloat16 unless `--bf16 False` is given"),
        "attn_implementation": Always("it is the one that is right for every model here", ("eager",)),
        "device": Always("there is no other", ("hpu",)),
        "local_rank": Always("the launcher's `LOCAL_RANK` counts"),
        "parallel_strategy": Refused(
            "several cards share a model through DeepSpeed's tensor parallelism alone",
            "leave it out, and start with `gaudi_spawn.py --use_deepspeed`",
            ("none",),
        ),
        "disk_offload": Refused("weights that come from the disk at each step are slower than any use", MORE_CARDS),
        "const_serialization_path": Refused(
            "the ranks of a host map one copy of the weights, which need no file of their own", "leave it out"
        ),
        "csp": Refused(
            "the ranks of a host map one copy of the weights, which need no file of their own", "leave it out"
        ),
        # Prompts
        "prompt": Same(),
        "dataset_name": Same(
            "whole prompts of the `train` split, in order (`--dataset_split`, `--max_input_tokens`); upstream takes "
            "`test`, shuffled, and 16 tokens of each; `openorca` and `mlcommons` have no special meaning"
        ),
        "column_name": Same(),
        "dataset_max_samples": Same("the first ones, unshuffled"),
        "max_input_tokens": Same("0, as -1, cuts nothing; the eight prompts of ours are made that long"),
        "use_chat_template": Same(),
        "batch_size": Same("any number of prompts runs, in batches of that many; a benchmark's batch is filled up"),
        "book_source": Refused(
            "it downloads a book", '`--prompt "$(cat book.txt)" --max_input_tokens N` takes a book of yours'
        ),
        "mlcommons_dataset": Refused(
            "it is a pickle, which runs code when it is read", "`--dataset_name FILE.jsonl` takes the same prompts"
        ),
        "run_partial_dataset": Refused("a benchmark is over whole data sets", "give --dataset_max_samples"),
        "input_embeds": Refused("embeddings say what their tokens say", "leave it out"),
        "simulate_dyn_prompt": Refused(
            "lengths are those of the prompts", "give --benchmark and a --prompt_file with prompts of these lengths"
        ),
        # Decoding
        "max_new_tokens": Same(),
        "do_sample": Same(),
        "temperature": Same("0 is greedy"),
        "top_k": Same(),
        "top_p": Same(),
        "num_beams": Same(),
        "num_return_sequences": Same("with `--do_sample` or beams"),
        "bad_words": Same(),
        "seed": Same("by default 42"),
        "ignore_eos": Same("by default only in a benchmark: other texts end where the model ends them"),
        "no-ignore_eos": Instead("--ignore_eos False"),
        "penalty_alpha": Refused(
            "contrastive search runs every step on top_k copies of the text",
            "for fewer repetitions give --repetition_penalty 1.1, or --do_sample --top_p 0.9",
        ),
        "force_words": Refused(
            "optimum-habana has no constrained beam search on static shapes", "name them in a prompt"
        ),
        "assistant_model": Refused(
            "a draft model makes steps of all lengths, and each new one is a graph to compile", EAGER_GRAPHS
        ),
        # Speed
        "use_kv_cache": Same("by default True"),
        "use_hpu_graphs": Same(),
        "limit_hpu_graphs": Same(),
        "limit_hpu_graph": Instead("--limit_hpu_graphs", is_switch=True),
        "reuse_cache": Same(),
        "bucket_size": Same(),
        "bucket_internal": Same(),
        "trim_logits": Always("the head sees the last position of a prompt alone"),
        "reduce_recompile": Always("prompts are padded on the host, to few lengths"),
        "attn_softmax_bf16": Same(),
        "attn_batch_split": Same(),
        "decode_attn_batch_split": Refused("it takes a cache apart that the other flags use", "leave it out", ("1",)),
        "use_flash_attention": Same(),
        "flash_attention_recompute": Same(),
        "flash_attention_causal_mask": Same("where prompts of a batch are equally long: it forgets padding"),
        "flash_attention_fast_softmax": Same("by default False"),
        "use_flex_attention": Refused("it must be compiled, in eager mode", "give --use_flash_attention"),
        "sdp_on_bf16": Same(),
        "clear_hpu_graphs_cache": Refused("every graph is replayed by the next batch", "leave it out"),
        "torch_compile": Refused("it needs eager mode, and this script runs in lazy mode", EAGER_GRAPHS),
        "regional_compile": Refused("it belongs to `--torch_compile`", EAGER_GRAPHS),
        "force_static_compile": Refused("it belongs to `--torch_compile`", EAGER_GRAPHS),
        "cache_size_limit": Refused("it belongs to `--torch_compile`", EAGER_GRAPHS),
        "dynamo_specialize_float": Refused("it belongs to `--torch_compile`", EAGER_GRAPHS),
        "dynamo_allow_unspec_int_on_nn_module": Refused("it belongs to `--torch_compile`", EAGER_GRAPHS),
        # Results
        "output_dir": Same("refused where it holds results, without `--overwrite_output_dir`"),
        "warmup": Same("makes the run a benchmark, which prints answers to prompts of yours, as upstream"),
        "n_iterations": Same("makes the run a benchmark, which prints answers to prompts of yours, as upstream"),
        "show_graphs_count": Same(),
        "verbose_workers": Same(),
        "profiling_warmup_steps": Refused(
            "Intel's profiler needs no flag", "set HABANA_PROFILE=1 in front of the command", ("0",)
        ),
        "profiling_steps": Refused(
            "Intel's profiler needs no flag", "set HABANA_PROFILE=1 in front of the command", ("0",)
        ),
        "profiling_record_shapes": Refused(
            "Intel's profiler needs no flag", "set HABANA_PROFILE=1 in front of the command"
        ),
        "profile_whole_sequences": Refused(
            "Intel's profiler needs no flag", "set HABANA_PROFILE=1 in front of the command"
        ),
        # Quantised models
        "quantize_with_bnb": Refused("bitsandbytes has no NF4 kernels for Gaudi on the package index", MORE_CARDS),
        "fp8": Refused(FP8, MORE_CARDS),  # this one and the next two: of releases before 1.14
        "kv_cache_fp8": Refused(FP8, MORE_CARDS),
        "load_quantized_model": Refused(FP8, MORE_CARDS),
        "load_quantized_model_with_autogptq": Refused("AutoGPTQ's kernels for Gaudi are no longer made", MORE_CARDS),
        "load_quantized_model_with_autoawq": Refused("AutoAWQ's kernels for Gaudi are no longer made", MORE_CARDS),
        "load_quantized_model_with_inc": Refused(FP8, MORE_CARDS),
        "local_quantized_inc_model_path": Refused(FP8, MORE_CARDS),
        "save_quantized_model_with_inc": Refused(FP8, MORE_CARDS),
        "saved_model_path": Refused(FP8, MORE_CARDS),
        "pt2e_save": Refused("its quantisation needs eager mode", MORE_CARDS),
        "pt2e_path": Refused("its quantisation needs eager mode", MORE_CARDS),
        "pt2e_quant_dtype": Refused("its quantisation needs eager mode", MORE_CARDS),
    },
}
SHORT = {"-d": "--device"}
TRUE, FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")  # as transformers reads them


def translate(script: str, arguments: list[str]) -> list[str]:
    """A command line for `script` in this project's own flags; those of upstream that cannot work are refused."""
    known = FLAGS.get(script, {})
    translated: list[str] = []
    for name, values, as_given in split_flags(arguments):
        flag = known.get(name) or known.get(name.replace("-", "_"))
        if isinstance(flag, Refused):
            if not values or any(value not in flag.neutral for value in values):
                raise InputError(f"--{name}: not here, as {flag.why}; {flag.way}".replace("`", ""))
        elif isinstance(flag, Always):
            if flag.values and (wrong := [value for value in values if value not in flag.values]):
                raise InputError(f"--{name}: got {wrong[0]}; only {' or '.join(flag.values)} works here")
        elif isinstance(flag, Unused):
            if os.environ.get("RANK", "0") == "0":
                logger.warning(f"--{name} has no effect; {flag.note}".replace("`", ""))
        elif isinstance(flag, Instead):
            value = values[0] if values else "true"
            if flag.is_switch or flag.is_boolean:
                if value.lower() not in TRUE + FALSE:
                    raise InputError(f"--{name}: got {value}; give True or False")
                value = "true" if value.lower() in TRUE else "false"
            elif values and "{}" not in flag.by:
                raise InputError(f"--{name}: got {value}; it takes no value")
            if not (flag.is_switch and value == "false"):
                translated += [part.format(value) for part in flag.by.split(" ")]
        else:
            spelt = dict(flag.spelt) if flag else {}
            is_spelt = any(value in spelt for value in values)
            translated += [f"--{name}", *(spelt.get(value, value) for value in values)] if is_spelt else as_given
    return translated


def name_as_given(script: str, arguments: list[str], message: str) -> str:
    """An error about one of this project's flags, with the name of upstream's that the command line has instead."""
    given = {name.replace("-", "_") for name, _, _ in split_flags(arguments)}
    for name, flag in FLAGS.get(script, {}).items():
        own = flag.by.split(" ")[0] if isinstance(flag, Instead) else ""
        if own and name.replace("-", "_") in given and own[2:] not in given:
            message = re.sub(rf"{own}\b", f"--{name} ({own} here)", message, count=1)
    return message


def split_flags(arguments: list[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Name, values and words of each flag, in their order; words before the first one have the name ``."""
    name, values, as_given = "", [], []
    for word in arguments:
        flag, _, value = word.partition("=")
        flag = SHORT.get(flag, flag)
        if flag.startswith("--"):
            yield name, values, as_given
            name, values, as_given = flag[2:], [value] if "=" in word else [], [word]
        else:
            values.append(word)
            as_given.append(word)
    yield name, values, as_given


def describe() -> str:
    """docs/upstream.md."""
    lines = [
        "# The flags of optimum-habana's examples",
        "",
        "Commands for the examples of optimum-habana 1.21.2 run as they are, or stop with the reason and the way that",
        "works here. This page is made by `python -m align.upstream_flags > docs/upstream.md`. Of sft.py and dpo.py it",
        "names the examples' own flags; those of `GaudiSFTConfig` and `GaudiDPOConfig` are flags of both as well.",
        "",
        "The variable `QUANT_CONFIG`, upstream's switch to FP8, is refused: " + FP8 + ".",
    ]
    for script, flags in FLAGS.items():
        lines += ["", f"## {script}", "", "| flag | here |", "|---|---|"]
        lines += [f"| `--{name}` | {_describe(flag)} |" for name, flag in flags.items()]
    return "\n".join(lines) + "\n"


def _describe(flag: Flag) -> str:
    if isinstance(flag, Same):
        return "the same" + (f"; {flag.note}" if flag.note else "")
    if isinstance(flag, Instead):
        by = flag.by.format("VALUE") + (f"`; {flag.note}" if flag.note else "`")
        return f"becomes `{by}"
    if isinstance(flag, Always):
        values = f"only `{'`, `'.join(flag.values)}`: " if flag.values else "always so: "
        return values + flag.note
    if isinstance(flag, Unused):
        return f"no effect; {flag.note}"
    neutral = f" (`{'`, `'.join(flag.neutral)}` passes)" if flag.neutral else ""
    return f"refused: {flag.why}; {flag.way}{neutral}"


if __name__ == "__main__":
    print(describe(), end="")
