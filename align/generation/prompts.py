"""Prompts: where they come from, their token ids, and the batches in which they are generated.

Heavy packages are imported where they are used: imports are most of the time to the first word.
"""

import json
import sys
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

MIN_WIDTH = 16  # tokens: prompts that are all shorter count as one width
WIDTH_CHOICES = 256  # the finest grid that widths are chosen from, as the choice takes its square in memory


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


def read_prompts(
    prompt: list[str] | None = None,
    prompt_file: str | None = None,
    dataset_name: str | None = None,
    dataset_split: str = "train",
    column_name: str = "prompt",
) -> list[str]:
    """The prompts in the user's order, from the one source that was given, or one a line from a pipe on stdin."""
    given = [
        flag
        for flag, value in (("--prompt", prompt), ("--prompt_file", prompt_file), ("--dataset_name", dataset_name))
        if value is not None
    ]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)}: give only one source of prompts")
    if prompt is not None:
        source, prompts = "--prompt", prompt
    elif prompt_file is not None:
        source = f"--prompt_file {prompt_file}"
        prompts = _read_prompt_file(Path(prompt_file), column_name)
    elif dataset_name is not None:
        source = f"--dataset_name {dataset_name}"
        prompts = _read_prompt_column(dataset_name, dataset_split, column_name)
    elif sys.stdin.isatty():
        raise InputError("no prompt: give --prompt, --prompt_file or --dataset_name, or pipe one prompt a line")
    else:
        source, prompts = "stdin", [line for line in sys.stdin.read().split("\n") if line.strip()]
    if not prompts:
        raise InputError(f"{source}: holds no prompt")
    return prompts


def _read_prompt_file(path: Path, column_name: str) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines, which knows ten more ends of a line
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompt_file {path}: cannot be read as UTF-8 text: {error}") from error
    if path.suffix != ".jsonl":
        return [line for line in lines if line.strip()]
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"--prompt_file {path}, row {number}: is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"--prompt_file {path}, row {number}: got {line[:40]!r}, not an object with columns")
        prompts.append(_prompt_of(row, column_name, f"--prompt_file {path}, row {number}"))
    return prompts


def _read_prompt_column(dataset_name: str, split: str, column_name: str) -> list[str]:
    from align.data.loading import DataArguments, load_splits
    from align.data.preparing import get_columns

    arguments = DataArguments(dataset_name=dataset_name, split=split, streaming=False)
    rows = load_splits(arguments, do_train=True, do_eval=False, streams=False, seed=0, folder="").train
    return [
        _prompt_of(get_columns(row, {}), column_name, f"--dataset_name {dataset_name}, row {n}")
        for n, row in enumerate(rows, 1)
    ]


def _prompt_of(row: dict[str, Any], column_name: str, where: str) -> str:
    if column_name not in row:
        found = ", ".join(row) or "none"
        raise InputError(f"{where}: has no column {column_name!r} but {found}; choose one with --column_name")
    if not isinstance(row[column_name], str):
        raise InputError(f"{where}: column {column_name!r} is {row[column_name]!r}, not text")
    return row[column_name]


def encode_prompts(
    prompts: list[str],
    tokenizer: "PreTrainedTokenizerBase",
    use_chat_template: bool,
    vocabulary_size: int,
    max_length: int,
) -> list[list[int]]:
    """Token ids of each prompt, as training puts them in front of what is learnt."""
    from align.data.tokenization import encode_prompt

    if use_chat_template and not tokenizer.chat_template:
        raise InputError("--use_chat_template: the tokenizer has no chat template; leave the flag out")
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        ids = encode_prompt(tokenizer, [{"role": "user", "content": prompt}] if use_chat_template else prompt)
        if not ids:
            raise InputError(f"prompt {number}: {prompt!r} has no tokens; write something")
        if len(ids) > max_length:
            raise InputError(
                f"prompt {number}: {len(ids)} tokens, but with --max_new_tokens the model's context leaves room for "
                f"{max_length}; shorten the prompt or lower --max_new_tokens"
            )
        if max(ids) >= vocabulary_size:
            raise InputError(
                f"prompt {number}: token {max(ids)} is beyond the model's vocabulary of {vocabulary_size}; the "
                "tokenizer belongs to another model"
            )
        encoded.append(ids)
    return encoded


@dataclass(frozen=True)
class Batch:
    """Prompts that are generated together: their places in the user's order, and their common width in tokens."""

    places: list[int]
    width: int


def plan_batches(lengths: list[int], batch_size: int, bucket_size: int, max_width: int) -> list[Batch]:
    """Batches of like lengths on few widths, since every new shape is a graph that a Gaudi has to compile.

    There are as many widths as powers of two would be, but where they pad least. With a `bucket_size` optimum-habana
    pads `width + 1` to a multiple of it.
    """
    order = range(len(lengths)) if batch_size == 1 else sorted(range(len(lengths)), key=lengths.__getitem__)
    groups = [list(order[start : start + batch_size]) for start in range(0, len(lengths), batch_size)]
    longest = [max(lengths[place] for place in group) for group in groups]
    if bucket_size > 0:
        widths = [-(-(length + 1) // bucket_size) * bucket_size - 1 for length in longest]
    else:
        from align.data.packing import choose_buckets

        number = len({max(MIN_WIDTH, 1 << (length - 1).bit_length()) for length in longest})
        buckets = choose_buckets(longest, number, max_width, multiple_of=-(-max(longest) // WIDTH_CHOICES))
        widths = [buckets[bisect_left(buckets, length)] for length in longest]
    return [
        Batch(group, max(length, min(width, max_width)))
        for group, length, width in zip(groups, longest, widths, strict=True)
    ]


def pad_batch(
    encoded: list[list[int]], width: int, rows: int, pad: int
) -> tuple["torch.LongTensor", "torch.LongTensor"]:
    """Ids and attention mask `[rows, width]`, padded on the left; missing rows repeat the first one."""
    import torch

    ids, mask = np.full((rows, width), pad), np.zeros((rows, width), dtype=np.int64)
    for row in range(rows):
        prompt = encoded[row] if row < len(encoded) else encoded[0]
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)
