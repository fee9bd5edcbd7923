"""The table of ranges: which numbers each flag takes. Nothing else is ever a number."""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from align.errors import InputError

LARGEST = 2**31 - 1  # more is a slip of the keyboard, and overflows somewhere


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, both included unless `above` or `below` says otherwise; `special` is allowed as well."""

    low: float
    high: float = LARGEST
    above: bool = False  # more than `low`
    below: bool = False  # less than `high`
    special: float | None = None

    def __contains__(self, value: float) -> bool:
        if value == self.special:
            return True
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        return math.isfinite(value) and over and under

    def __str__(self) -> str:
        if not (self.above or self.below or self.special is not None) and self.high != LARGEST:
            return f"{self.low:g} to {self.high:.10g}"
        over = f"more than {self.low:g}" if self.above else f"{self.low:g} or more"
        under = "" if self.high == LARGEST else f", {'less than' if self.below else 'at most'} {self.high:.10g}"
        return over + under + ("" if self.special is None else f", or {self.special:g}")


COUNT = Range(1)
SECONDS = Range(0, 1e7)
COUNT_OR_NONE = Range(0)
PROCESSES = 1024  # more than any host has cores: as many would take it down
POSITIVE = Range(0, above=True)
SHARE = Range(0, 1)
SHARE_BELOW_1 = Range(0, 1, below=True)
SEED = Range(0, 2**32 - 1)  # what numpy can be seeded with

RANGES = {
    # LoRA
    "lora_r": Range(1, 65536),  # the largest of models are not as wide
    "lora_alpha": Range(1e-3, 1e6),
    "lora_dropout": SHARE_BELOW_1,
    # Data
    "shuffle_buffer": COUNT,
    "size_valid_set": COUNT,
    "validation_split_percentage": Range(0, 100, above=True, below=True),
    "max_train_samples": COUNT,
    "max_eval_samples": COUNT,
    "num_workers": Range(1, PROCESSES),
    "max_bad_rows": SHARE,
    "dataset_mix": Range(0, 1, above=True, below=True),
    "show_examples": COUNT_OR_NONE,
    "max_seq_length": Range(2),  # a first token, and one that is learnt
    "max_length": Range(2),
    "max_prompt_length": COUNT,
    # Batches
    "num_buckets": COUNT,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "eval_accumulation_steps": COUNT,
    "dataloader_num_workers": Range(0, PROCESSES),
    "dataloader_prefetch_factor": COUNT,
    # Optimisation
    "learning_rate": Range(1e-12, 1000),  # float32 rounds less to nothing
    "weight_decay": SHARE,
    "adam_beta1": SHARE_BELOW_1,
    "adam_beta2": SHARE_BELOW_1,
    "adam_epsilon": Range(1e-30, 1),
    "max_grad_norm": COUNT_OR_NONE,
    "num_train_epochs": COUNT_OR_NONE,
    "max_steps": Range(1, special=-1),
    "warmup_ratio": SHARE,
    "warmup_steps": COUNT_OR_NONE,
    "label_smoothing_factor": SHARE_BELOW_1,
    "neftune_noise_alpha": POSITIVE,
    "seed": SEED,
    "data_seed": SEED,
    # Preferences
    "beta": Range(1e-6, 1e6),
    "label_smoothing": Range(0, 0.5, below=True),
    "f_alpha_divergence_coef": POSITIVE,
    "ref_model_mixup_alpha": SHARE,
    "ref_model_sync_steps": COUNT,
    "rpo_alpha": COUNT_OR_NONE,
    "sample_prompts": COUNT_OR_NONE,
    # Logs, evaluation, checkpoints: below 1 is a share of all steps
    "logging_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "eval_delay": COUNT_OR_NONE,
    "save_steps": POSITIVE,
    "save_total_limit": COUNT,
    "save_seconds": SECONDS,
    "max_nonfinite_steps": COUNT,
    # Gaudi
    "torch_empty_cache_steps": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": COUNT,
    "cache_size_limit": COUNT,
    "max_hpu_graphs": COUNT,
    "context_parallel_size": COUNT,
    "throughput_warmup_steps": COUNT_OR_NONE,
    "profiling_warmup_steps": COUNT_OR_NONE,
    "profiling_steps": COUNT_OR_NONE,
    "profiling_warmup_steps_eval": COUNT_OR_NONE,
    "profiling_steps_eval": COUNT_OR_NONE,
    # Generation
    "max_new_tokens": COUNT,
    "num_beams": COUNT,
    "num_return_sequences": COUNT,
    "temperature": Range(1e-4, 1e4, special=0),  # greedy
    "top_k": COUNT_OR_NONE,
    "top_p": Range(1e-6, 1),
    "repetition_penalty": Range(1e-2, 100),
    "batch_size": COUNT,
    "bucket_size": Range(1, special=-1),
    "attn_batch_split": COUNT,
    "warmup": COUNT_OR_NONE,
    "n_iterations": COUNT,
    "max_input_tokens": Range(0, special=-1),
    "dataset_max_samples": Range(1, special=-1),
    # Launches
    "world_size": Range(1, 65536),
    "master_port": Range(1, 65535),
    "grace_period": SECONDS,
    "stall_timeout": SECONDS,
    "card_memory": Range(0, 1e5, above=True),  # GB
}


# The words that a flag takes, where its library takes any text and stops at it later
WORDS = {
    "distribution_strategy": ("ddp", "fast_ddp"),
    "torch_compile_backend": ("hpu_backend", "eager", "aot_eager"),
    "torch_compile_mode": ("default",),  # the others are inductor's
}


# The names of what is read or written: an empty one is that of a variable that was not set, and not what is meant
NAMES = set(
    """model_name_or_path tokenizer_name_or_path ref_model peft_model compare base_model_name adapter_model_name
    dataset_name prompt_file chat_template ref_log_probs_dir output_dir output_name gaudi_config_name
    accelerator_config token hub_token push_to_hub_token hub_model_id hub_revision model_revision push_to_hub
    resume_from_checkpoint logging_dir hostfile graph_report rehearsal_dir folder""".split()
)


def limit(parser: argparse.ArgumentParser, own: Mapping[str, Range] | None = None) -> None:
    """Lets the parser refuse what `RANGES`, `WORDS` and `NAMES` do not hold, before anything else reads it.

    `own` are ranges of flags that only this parser has.
    """
    ranges = {**RANGES, **(own or {})}
    for action in parser._actions:
        if action.dest in ranges and callable(action.type):
            action.type = _limited(action.dest, action.type, ranges[action.dest])
        if action.dest in WORDS:
            action.choices = WORDS[action.dest]
        if action.dest in NAMES and action.const is not True:  # one that is a switch elsewhere
            action.type = _named(action.dest, action.type if callable(action.type) else str)


def _named(name: str, read: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if not text.strip():
            kind = "token" if name.endswith("token") else "name"
            raise InputError(f"--{name}: is empty; give a {kind}, or leave it out")
        return read(text)

    parse.__dict__["reads"] = read  # for --help
    return parse


def shorten(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def _limited(name: str, read: Callable[[str], Any], allowed: Range) -> Callable[[str], Any]:
    def parse(text: str) -> float:
        try:
            value = read(text)
        except ValueError:
            kind = "a whole number" if read is int else "a number"
            raise InputError(f"--{name}: got {shorten(repr(text))}; give {kind}, {allowed}") from None
        if value not in allowed:
            wanted = f"at most {LARGEST}" if value > allowed.high == LARGEST else allowed
            raise InputError(f"--{name}: got {shorten(text)}; give {wanted}")
        return value

    parse.__dict__["reads"] = read  # for --help
    return parse
