"""Loads data sets from the hub or from files, and splits them."""

import hashlib
import logging
import re
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml
from datasets import Dataset, DatasetDict, IterableDataset

from align.data.files import COMPRESSED, KINDS, checksum, find_files, is_readable, is_sound, load_files, seal
from align.errors import InputError, one_line

logger = logging.getLogger(__name__)

VALIDATION_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")


@dataclass
class DataArguments:
    """What to train on. The columns say which format the rows have."""

    _argument_group_name = "Data"

    dataset_name: list[str] | None = field(
        default=None,
        metadata={"help": "Hub name, folder or file (.jsonl, .csv, .parquet …); or several."},
    )
    dataset_mix: list[float] | None = field(
        default=None,
        metadata={"help": "Share of each data set in the training rows, together 1 (default: all rows of each)."},
    )
    subset: str | None = field(
        default=None,
        metadata={
            "help": "Folder in it to train on; `None`: all (default: data/finetune, dpo.py: data/rl, if it is there)."
        },
    )
    eval_subset: str | None = field(
        default=None,
        metadata={"help": "Folder inside the data set to evaluate on (default: data/evaluation, where there is one)."},
    )
    split: str = field(default="train", metadata={"help": "Name of the split to train on."})
    data_format: str | None = field(
        default=None, metadata={"help": "Name of the row format, where the columns fit several."}
    )
    columns: list[str] | None = field(
        default=None, metadata={"help": "Renames columns, as `prompt=question,chosen=good`: new name = found name."}
    )
    text_as_chat: bool | None = field(
        default=None,
        metadata={
            "help": "Put rows of text through the chat template (default: where there is one and the rows are more "
            "than plain text)."
        },
    )
    only_true_labels: bool = field(
        default=False, metadata={"help": "Where rows have a true or false `label` (KTO), learn the true ones alone."}
    )
    streaming: bool | None = field(
        default=None,
        metadata={"help": "Read as a stream (default: hub data sets when --max_steps ends the run, else not)."},
    )
    shuffle_buffer: int = field(default=5000, metadata={"help": "Rows held in memory to shuffle a stream."})
    size_valid_set: int = field(
        default=4000, metadata={"help": "Rows at the start of a stream that are held out for validation."}
    )
    validation_split_percentage: float = field(
        default=5, metadata={"help": "Percentage of the rows held out where there is no validation split."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most this many rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most this many rows."})
    num_workers: int = field(default=4, metadata={"help": "Processes that prepare the data."})
    chat_template: str | None = field(
        default=None,
        metadata={"help": "Chat template for messages: a file, `plain` or `chatml` (default: the tokenizer's own)."},
    )
    truncation: str = field(
        default="keep_start",
        metadata={
            "help": "What happens to samples beyond the limit.",
            "choices": ["keep_start", "keep_end", "drop"],
        },
    )
    bad_rows: str = field(
        default="error",
        metadata={
            "help": "Rows that cannot be used: stop, or skip them.",
            "choices": ["error", "skip"],
        },
    )
    max_bad_rows: float = field(
        default=0.05, metadata={"help": "Largest share of rows that --bad_rows skip may leave out, 0 to 1."}
    )
    show_examples: int = field(
        default=0, metadata={"help": "Print this many samples as the model will see them, and stop."}
    )


def check_data_arguments(args: DataArguments, has_template: bool) -> None:
    """Values that cannot be, before anything is read."""
    if args.text_as_chat and not has_template:
        raise InputError("--text_as_chat: the tokenizer has no chat template; name one with --chat_template, as plain")
    names: list[Any] = args.dataset_name if isinstance(args.dataset_name, list) else [args.dataset_name]
    number = len(names)
    places = [Path(name).expanduser().resolve() for name in names if name]  # of a hub name nothing is there, or changed
    if twice := [name for name, place in zip(names, places, strict=False) if places.count(place) > 1]:
        raise InputError(f"--dataset_name: {twice[-1]} is named twice")
    shares = args.dataset_mix
    if shares is not None and (len(shares) != number or number == 1):
        raise InputError(
            f"--dataset_mix: got {len(shares)} share(s) for {number} data set(s); give one for each of several"
        )
    if shares is not None and abs(sum(shares) - 1) > 0.005:
        raise InputError(f"--dataset_mix: got {' '.join(f'{share:g}' for share in shares)}; give shares whose sum is 1")
    read_renames(args)


def read_renames(args: DataArguments) -> dict[str, str]:
    """The found name of each column that --columns names anew."""
    renames = {}
    for pair in ",".join(args.columns or []).split(",") if args.columns else ():
        new, _, old = (part.strip() for part in pair.partition("="))
        if not new or not old or new in renames:
            raise InputError(f"--columns: got {pair!r}; give new=found pairs, as prompt=question,chosen=good")
        if old in renames.values():
            raise InputError(f"--columns: takes {old!r} twice; give each column one name")
        renames[new] = old
    return renames


@dataclass(frozen=True)
class Splits:
    """Rows as they were read; either may be missing where the run does not ask for it."""

    train: Dataset | IterableDataset | None
    validation: Dataset | IterableDataset | None


def load_splits(
    args: DataArguments,
    do_train: bool,
    do_eval: bool,
    streams: bool,
    seed: int,
    folder: str,
    token: str | None = None,
) -> Splits:
    """Reads what the run asks for from one data set.

    `folder` inside it is the script's usual one, taken where it exists. `streams` says whether the data may be a
    stream, because --max_steps ends the run. Without a validation split one is cut off, the same for the same seed.
    """
    if args.dataset_name is None:
        raise InputError("--dataset_name: missing; give a hub name, a folder or a file")
    name: Any = args.dataset_name
    local = Path(name).expanduser()
    streaming = (streams and not local.exists()) if args.streaming is None else args.streaming
    load = partial(load_rows, name, streaming, token)
    rows = load(args.subset, "--subset", folder)
    train = choose_split(rows, args.split, name, "--split")
    split = next((name for name in VALIDATION_SPLITS if name in rows and name != args.split), None)
    validation = rows[split] if split else None
    if do_eval and (args.eval_subset or validation is None):
        held_out = load(args.eval_subset, "--eval_subset", "data/evaluation", optional=args.eval_subset is None)
        if held_out:
            split, validation = args.eval_subset or "data/evaluation", next(iter(held_out.values()))
    if do_eval and validation is not None:
        flag = "size_valid_set" if streaming else "validation_split_percentage"
        is_given = getattr(args, flag) != getattr(DataArguments, flag)
        unused = f"; --{flag} has no effect on it" if is_given else ""
        logger.info(f"validation: {split} of {name}{unused}")
    if do_eval and validation is None:
        train, validation = _cut_off(train, args, seed)
        if do_train and streaming and next(iter(train), None) is None:
            raise InputError(
                f"--size_valid_set: the first {args.size_valid_set} rows of the stream are held out for validation and "
                f"leave none of {args.dataset_name} to train on; give less, or --streaming False"
            )
    if streaming:
        train = train.shuffle(seed=seed, buffer_size=args.shuffle_buffer)
    train, validation = take_first(train, args.max_train_samples), take_first(validation, args.max_eval_samples)
    return Splits(train if do_train else None, validation if do_eval else None)


def load_rows(
    name: str,
    streaming: bool = False,
    token: str | None = None,
    subset: str | None = None,
    subset_flag: str = "",
    folder: str = "",
    optional: bool = False,
) -> dict[str, Any]:
    """The splits of a data set, by name.

    They are those of its folder `subset`, which `subset_flag` has named; else of its `folder`, where that is there;
    else of all of it, unless they are `optional`.
    """
    local = Path(name).expanduser()
    if subset == "None":  # upstream's word for the whole data set
        subset = folder = ""
    load = partial(datasets.load_dataset, streaming=streaming, token=token)
    try:
        if local.is_file():
            if optional:
                return {}
            if subset:
                raise InputError(f"{subset_flag}: {name} is a file, which has no folder {subset!r}")
            if not is_readable(local):
                endings = f"{', '.join(KINDS)}, also with {', '.join(COMPRESSED)} behind"
                raise InputError(
                    f"--dataset_name: {name} ends in {''.join(local.suffixes[-2:])!r}; known are {endings}"
                )
            if local.stat().st_size == 0:
                raise InputError(f"--dataset_name: {name} is empty")
            return _load_files({"train": [local]}, streaming)
        if local.is_dir():
            where = find_folder(local, subset, folder)
            if not where.is_dir():
                raise InputError(f"{subset_flag}: {name} has no folder {subset!r}")
            if optional and where == local:
                return {}
            if (where / "dataset_dict.json").is_file() or (where / "state.json").is_file():
                try:
                    stored = datasets.load_from_disk(str(where))
                except (TypeError, AttributeError, KeyError) as error:  # of a description that is none
                    raise ValueError(f"its dataset_info.json or state.json is damaged: {error!r}") from error
                stored = stored if isinstance(stored, DatasetDict) else DatasetDict({"train": stored})
                if streaming:
                    return {key: rows.to_iterable_dataset() for key, rows in stored.items()}
                return {key: _name_by_content(rows) for key, rows in stored.items()}
            card = where / "README.md"
            if card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8", errors="replace"):
                files = _read_card(where)
                return _load_files(files, streaming) if files else load(str(where))
            return _load_files(find_files(where), streaming)
        if is_readable(local) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise InputError(f"--dataset_name: no such file or folder: {name}")
        if subset is not None:
            return load(name, data_dir=subset or None)
        try:
            return load(name, data_dir=folder)
        except Exception:  # hubs differ in how they say that a folder is not there
            return {} if optional else load(name)
    except datasets.exceptions.DatasetGenerationError as error:
        raise InputError(f"--dataset_name: {name}: {one_line(error.__cause__ or error)}") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        kind = "cannot be read" if local.exists() else "is not a file or folder, and cannot be read from the hub"
        raise InputError(f"--dataset_name: {name} {kind}: {one_line(error)}") from error


def find_folder(local: Path, subset: str | None, folder: str) -> Path:
    """The folder of rows inside a local data set."""
    return local / subset if subset else local / folder if (local / folder).is_dir() else local


def find_source(name: str, subset: str | None, folder: str) -> Path:
    """Where the rows of a data set are that is a local file or folder; where they would be, of others."""
    local = Path(name).expanduser()
    return find_folder(local, *((None, "") if subset == "None" else (subset, folder)))


def check_output(name: str, subset: str | None, folder: str, output: str) -> None:
    """What a run writes must not be rows of the next one."""
    where = find_source(name, subset, folder)
    if where.is_dir() and Path(output).resolve().is_relative_to(where.resolve()):
        raise InputError(
            f"--output_dir: {output} lies in --dataset_name {name}, all files of which are read as rows; name a folder "
            "elsewhere"
        )


def choose_split(rows: dict[str, Any], split: str, name: str, flag: str) -> Any:
    """The split that `flag` has named, of the data set `name`."""
    if split not in rows:
        raise InputError(f"{flag}: {split!r} is not in {name}; found {', '.join(rows)}")
    return rows[split]


def _read_card(folder: Path) -> dict[str, list[Path]]:
    """The files of each split as the README of a data set names them; none where `datasets` alone can read them."""
    try:
        config = datasets.load_dataset_builder(str(folder)).config
    except (ValueError, yaml.YAMLError) as error:  # where it names several configurations, all of them are in the text
        reason = " ".join(str(error).split()).partition(" Example of usage")[0]
        raise InputError(f"--dataset_name: {folder}/README.md: {reason}; name a file or a folder inside") from error
    about = {name: getattr(config, name) for name in ("name", "version", "data_dir", "data_files", "description")}
    if config != type(config)(**about):  # it says how to read them, as what parts the columns
        return {}
    files = {str(split): list(map(Path, files)) for split, files in (config.data_files or {}).items()}
    return files if all(is_readable(file) for part in files.values() for file in part) else {}


def _load_files(splits: dict[str, list[Path]], streaming: bool) -> dict:
    """Parquet has types that all rows share; everything else is read row by row."""
    loaded = {}
    for split, files in splits.items():
        if {file.suffix for file in files} == {".parquet"}:
            loaded[split] = _load_parquet(files, streaming)
        else:
            loaded[split] = load_files(files, streaming)
    return loaded


def _load_parquet(files: list[Path], streaming: bool) -> Dataset | IterableDataset:
    sums = "".join(map(checksum, files))  # `datasets` itself would look at the time of a file alone
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "align" / hashlib.sha256(sums.encode()).hexdigest()[:32]
    load = partial(datasets.load_dataset, "parquet", data_files=list(map(str, files)), split="train")
    if streaming:
        return load(streaming=True)
    rows = load(cache_dir=str(folder))
    made = [Path(file["filename"]) for file in rows.cache_files]
    if made and made[0].with_suffix(".sums").exists() and not is_sound(made[0]):
        shutil.rmtree(folder)
        rows = load(cache_dir=str(folder))
    if made and not made[0].with_suffix(".sums").exists():
        seal(made[0], made)
    return _name_by_content(rows, folder.name)


def _name_by_content(rows: Dataset, content: str | None = None) -> Dataset:
    """Tokens are cached by the name that rows have, which of `datasets` follows from the time of a file alone."""
    if content is None and not rows.cache_files:  # all in memory, under a name of its own
        return rows
    content = content or "".join(checksum(Path(file["filename"])) for file in rows.cache_files)
    return Dataset(rows.data, rows.info, fingerprint=hashlib.sha256(content.encode()).hexdigest()[:32])


def _cut_off(rows: Dataset | IterableDataset, args: DataArguments, seed: int) -> tuple:
    if isinstance(rows, IterableDataset):
        if args.size_valid_set < 1:
            raise InputError(f"--size_valid_set: got {args.size_valid_set}; give 1 or more")
        return rows.skip(args.size_valid_set), rows.take(args.size_valid_set)
    if not 0 < args.validation_split_percentage < 100:
        raise InputError(
            f"--validation_split_percentage: got {args.validation_split_percentage:g}; give more than 0, less than 100"
        )
    if len(rows) < 2:
        raise InputError(f"--dataset_name: {len(rows)} row(s) are too few to cut off a validation split")
    size = min(max(1, round(len(rows) * args.validation_split_percentage / 100)), len(rows) - 1)
    # As `train_test_split`, whose indices go through a cache that nobody checks: a damaged one would give other rows
    order = np.random.default_rng(seed).permutation(len(rows))
    train, validation = (rows.select(part, keep_in_memory=True) for part in (order[size:], order[:size]))
    return train, validation


def take_first(rows: Dataset | IterableDataset | None, limit: int | None) -> Dataset | IterableDataset | None:
    if rows is None or limit is None:
        return rows
    return rows.take(limit) if isinstance(rows, IterableDataset) else rows.select(range(min(limit, len(rows))))
