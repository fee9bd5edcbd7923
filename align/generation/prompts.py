"""Prompts: where they come from, their token ids, and the batches in which they are generated.

Heavy packages are imported where they are used: imports are most of the time to the first word.
"""

import json
import logging
import os
import select
import stat
import sys
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import cycle, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.errors import InputError, one_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

OWN_PROMPTS = [  # where the user gives none
    "The shortest way from the harbour to the station",
    "When the first snow fell, the village",
    "A good teacher is someone who",
    "To bake bread you need",
    "The three most important things about the sea are",
    "My grandmother used to say that",
    "If a program is slow, first",
    "Nobody knew why the lighthouse",
]
# What --dataset_name knows by its name, and --prompt_file would take for text
OF_DATA_SETS = (".csv", ".tsv", ".parquet", ".gz", ".zst", ".bz2", ".xz")
MIN_WIDTH = 16  # tokens: prompts that are all shorter count as one width
WIDTH_CHOICES = 256  # the most widths to choose from, as the choice takes their square in memory


@dataclass
class PromptArguments:
    _argument_group_name = "Prompts"

    prompt: list[str] | None = field(default=None, metadata={"help": "One or more prompts.", "action": "extend"})
    prompt_file: str | None = field(
        default=None,
        metadata={
            "help": "File of prompts: .json or .jsonl with --column_name, else one prompt a line; - waits for stdin."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Data set of prompts: hub name, folder or file."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the data set."})
    column_name: str | None = field(
        default=None,
        metadata={
            "help": "Column of the prompts in a .json(l) file or data set (default: prompt, else the first text)."
        },
    )
    dataset_max_samples: int = field(
        default=-1, metadata={"help": "Take at most this many prompts of a data set, the first ones; -1 is all."}
    )
    max_input_tokens: int = field(
        default=0,
        metadata={"help": "Cut prompts to this many tokens, and pad all to them; 0 and -1 leave them as they are."},
    )
    use_chat_template: bool = field(
        default=False, metadata={"help": "Wrap each prompt as a user's turn of the tokenizer's chat template."}
    )


def load_prompts(arguments: PromptArguments, world_size: int, token: str | None = None) -> list[str]:
    """The prompts in the user's order, from the one source that was given, from stdin, or our own.

    `token` opens data sets of the hub.
    """
    sources = {name: getattr(arguments, name) for name in ("prompt", "prompt_file", "dataset_name")}
    given = [f"--{name}" for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)}: give only one source of prompts")
    _tell_unused(arguments)
    if arguments.prompt is not None:
        source = "--prompt"
        prompts = [_whole(prompt, f"--prompt, number {number}") for number, prompt in enumerate(arguments.prompt, 1)]
    elif arguments.prompt_file == "-" or (not given and world_size == 1 and _holds_text(sys.stdin)):
        if world_size > 1:
            raise InputError("--prompt_file -: stdin does not reach all ranks; give a file")
        source, prompts = "stdin", _read_stdin()
    elif arguments.prompt_file is not None:
        source = f"--prompt_file {arguments.prompt_file}"
        prompts = _read_prompt_file(Path(arguments.prompt_file), arguments.column_name)
    elif arguments.dataset_name is not None:
        source = f"--dataset_name {arguments.dataset_name}"
        prompts = _read_prompt_column(arguments, token)
    else:
        logger.warning(
            "No prompt was given (--prompt, --prompt_file, --dataset_name): using eight sentences of our own."
        )
        return own_prompts(arguments.max_input_tokens)
    if not prompts:
        raise InputError(f"{source}: holds no prompt")
    return prompts


def _tell_unused(arguments: PromptArguments) -> None:
    """Flags about rows, where prompts come from elsewhere."""
    holds_rows = Path(arguments.prompt_file or "").suffix.lower() in (".json", ".jsonl", ".ndjson")
    for flag in ("dataset_split", "dataset_max_samples", "column_name"):
        is_used = arguments.dataset_name is not None or (flag == "column_name" and holds_rows)
        if not is_used and getattr(arguments, flag) != getattr(PromptArguments, flag):
            logger.warning(f"--{flag} has no effect: it is for --dataset_name.")


def own_prompts(words: int) -> list[str]:
    """Our own prompts, each repeated until it has this many words, and so at least as many tokens."""
    split = [prompt.split() for prompt in OWN_PROMPTS]
    return [" ".join(islice(cycle(own), max(words, len(own)))) for own in split]


def _holds_text(stdin) -> bool:
    """Whether prompts are there to read; never waits for a pipe that stays open and empty."""
    if stdin is None or stdin.isatty():
        return False
    try:
        mode = os.fstat(stdin.fileno()).st_mode
    except (OSError, ValueError):  # no file, so nobody to wait for
        return True
    if stat.S_ISREG(mode):
        return os.fstat(stdin.fileno()).st_size > 0
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)) or not select.select([stdin], [], [], 0)[0]:
        return False
    return bool(stdin.buffer.peek(1))


def _read_stdin() -> list[str]:
    try:
        lines = sys.stdin.read().removeprefix("\ufeff").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin: cannot be read as text: {error}") from error
    return [_whole(line, f"stdin, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _read_prompt_file(path: Path, column_name: str | None) -> list[str]:
    """The prompts of a JSON list, of JSON lines, or of other text, a line each."""
    where = f"--prompt_file {path}"
    suffix = path.suffix.lower()
    if suffix in OF_DATA_SETS:
        raise InputError(f"{where}: {suffix} files are not read as prompts; give --dataset_name instead")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: cannot be read as UTF-8 text: {error}") from error
    if suffix == ".json":
        rows = _parse_json(text, where)
        if isinstance(rows, dict) and len(rows) == 1 and isinstance(next(iter(rows.values())), list):
            rows = next(iter(rows.values()))
        if not isinstance(rows, list):
            raise InputError(f"{where}: holds no list of prompts; rows on lines of their own are a .jsonl file")
        return [_prompt_of(row, column_name, f"{where}, row {number}") for number, row in enumerate(rows, 1)]
    lines = text.split("\n")  # not splitlines, which knows ten more ends of a line
    if suffix not in (".jsonl", ".ndjson"):
        return [line for line in lines if line.strip()]
    places = {number: f"{where}, row {number}" for number, line in enumerate(lines, 1) if line.strip()}
    return [_prompt_of(_parse_json(lines[n - 1], place), column_name, place) for n, place in places.items()]


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON: {one_line(error)}") from error


def _read_prompt_column(arguments: PromptArguments, token: str | None) -> list[str]:
    from align.data.loading import choose_split, load_rows, take_first
    from align.data.preparing import get_columns

    name = arguments.dataset_name or ""
    split = choose_split(load_rows(name, token=token), arguments.dataset_split, name, "--dataset_split")
    rows: Any = take_first(split, arguments.dataset_max_samples if arguments.dataset_max_samples > 0 else None)
    where = f"--dataset_name {name}"
    return [
        _prompt_of(get_columns(row, {}), arguments.column_name, f"{where}, row {n}") for n, row in enumerate(rows, 1)
    ]


def _prompt_of(row: Any, column_name: str | None, where: str) -> str:
    if isinstance(row, str) and column_name is None:
        return _whole(row, where)
    if not isinstance(row, dict):
        raise InputError(f"{where}: got {json.dumps(row)[:40]}, not an object with columns")
    if column_name is None:
        texts = [name for name, value in row.items() if isinstance(value, str)]
        column_name = "prompt" if "prompt" in row or not texts else texts[0]
    if column_name not in row:
        found = ", ".join(row) or "none"
        raise InputError(f"{where}: has no column {column_name!r} but {found}; choose one with --column_name")
    if not isinstance(row[column_name], str):
        raise InputError(f"{where}: column {column_name!r} is {repr(row[column_name])[:40]}, not text")
    return _whole(row[column_name], where)


def _whole(prompt: str, where: str) -> str:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{where}: holds half a character (a lone surrogate), which is not text; mend it") from None
    return prompt


def encode_prompts(
    prompts: list[str],
    tokenizer: "PreTrainedTokenizerBase",
    use_chat_template: bool,
    vocabulary_size: int,
    max_length: int,
    max_input_tokens: int | None = None,
) -> list[list[int]]:
    """Token ids of each prompt, as training puts them in front of what is learnt.

    Beyond `max_input_tokens` a prompt is cut.
    """
    from jinja2 import TemplateError

    from align.data.tokenization import encode_prompt

    if max_input_tokens and max_input_tokens > max_length:
        raise InputError(
            f"--max_input_tokens: got {max_input_tokens}; the model's context leaves room for {max_length}"
        )
    cut = 0
    if use_chat_template and not tokenizer.chat_template:
        raise InputError("--use_chat_template: the tokenizer has no chat template; leave the flag out")
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        try:
            ids = encode_prompt(tokenizer, [{"role": "user", "content": prompt}] if use_chat_template else prompt)
        except TemplateError as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"--use_chat_template: prompt {number}: the tokenizer's chat template refuses it: {reason}"
            ) from None
        if not ids:
            raise InputError(f"prompt {number}: {prompt!r} has no tokens; write something")
        if max_input_tokens and len(ids) > max_input_tokens:
            if use_chat_template:
                raise InputError(
                    f"--max_input_tokens: prompt {number} has {len(ids)} tokens in its chat template, whose end would "
                    f"be cut off; give at least that many"
                )
            ids, cut = ids[:max_input_tokens], cut + 1
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
    if cut:
        logger.warning(f"--max_input_tokens {max_input_tokens}: the end of {cut} of {len(prompts)} prompts is cut off.")
    return encoded


@dataclass(frozen=True)
class Batch:
    """Prompts that are generated together: their places in the user's order, and their common width in tokens."""

    places: list[int]
    width: int


def plan_batches(
    lengths: list[int],
    batch_size: int,
    bucket_size: int,
    max_width: int,
    width: int | None = None,
    pads: bool = True,
    ignores_padding: bool = False,
) -> list[Batch]:
    """Batches of like lengths on few widths, since every new shape is a graph that a Gaudi has to compile.

    There are as many widths as powers of two would be, but where they pad least. With a `bucket_size` optimum-habana
    pads `width + 1` to a multiple of it. All have the `width` that is given. Where nothing `pads`, every prompt of a
    batch must be as long as the others; a model that `ignores_padding` gets batches of one length.
    """
    order = range(len(lengths)) if batch_size == 1 else sorted(range(len(lengths)), key=lengths.__getitem__)
    if ignores_padding:
        alike = [list(places) for _, places in groupby(order, key=lengths.__getitem__)]
        members = [
            places[start : start + batch_size] for places in alike for start in range(0, len(places), batch_size)
        ]
        return [Batch(places, lengths[places[0]]) for places in members]
    members = [list(order[start : start + batch_size]) for start in range(0, len(lengths), batch_size)]
    longest = [max(lengths[place] for place in places) for places in members]
    if not pads:
        for places, length in zip(members, longest, strict=True):
            shortest = min(places, key=lengths.__getitem__)
            if lengths[shortest] < (width or length):
                raise InputError(
                    f"--flash_attention_causal_mask: forgets padding, and prompt {shortest + 1} of {lengths[shortest]} "
                    f"tokens would be padded to {width or length}; leave the flag out, or give --batch_size 1"
                    + (" without --max_input_tokens" if width else "")
                )
        return [Batch(places, length) for places, length in zip(members, longest, strict=True)]
    if width:
        widths = [width] * len(members)
    elif bucket_size > 0:
        widths = [-(-(length + 1) // bucket_size) * bucket_size - 1 for length in longest]
    else:
        from align.data.packing import choose_buckets

        number = len({max(MIN_WIDTH, 1 << (length - 1).bit_length()) for length in longest})
        buckets = choose_buckets(longest, number, max_width, multiple_of=-(-max(longest) // WIDTH_CHOICES))
        widths = [buckets[bisect_left(buckets, length)] for length in longest]
    return [
        Batch(places, max(length, min(width, max_width)))
        for places, length, width in zip(members, longest, widths, strict=True)
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
