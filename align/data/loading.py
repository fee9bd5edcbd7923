"""Loads a data set from the hub or from files, splits it, and prepares its rows once for all ranks of a host."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import PreTrainedTokenizerBase

from align.data.formats import Format, RowError, Sample, recognise
from align.data.packing import IGNORED
from align.errors import InputError

logger = logging.getLogger(__name__)

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
VALIDATION_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")
COUNTS = ("length", "trained")  # columns with a number; all others hold token ids
UNREADABLE = "_unreadable"  # column with what is wrong with a line
Tokenize = Callable[[list[Sample]], tuple[dict[str, list], list[str | None]]]


@dataclass
class DataArguments:
    """What to train on. The columns say which format the rows have."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set: a hub name, a folder, or a .jsonl, .json, .csv or .parquet file."}
    )
    subset: str | None = field(
        default=None,
        metadata={
            "help": "Folder inside the data set to train on (default: data/finetune for sft.py and data/rl for dpo.py, "
            "where the data set has such a folder)."
        },
    )
    eval_subset: str | None = field(
        default=None,
        metadata={"help": "Folder inside the data set to evaluate on (dpo.py: data/evaluation if there)."},
    )
    split: str = field(default="train", metadata={"help": "Name of the split to train on."})
    data_format: str | None = field(
        default=None, metadata={"help": "Name of the row format, where the columns fit several."}
    )
    streaming: bool | None = field(
        default=None,
        metadata={"help": "Read as a stream (default: hub data sets when --max_steps ends the run, else not)."},
    )
    shuffle_buffer: int = field(default=5000, metadata={"help": "Rows held to shuffle a stream."})
    size_valid_set: int = field(default=4000, metadata={"help": "Rows cut off a stream for validation."})
    validation_split_percentage: float = field(
        default=5, metadata={"help": "Percentage of the rows cut off for validation where no split exists for it."}
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
            "help": "Rows that cannot be used: stop with the reason, or skip them.",
            "choices": ["error", "skip"],
        },
    )
    max_bad_rows: float = field(
        default=0.05, metadata={"help": "Largest share of rows that --bad_rows skip may leave out, 0 to 1."}
    )
    show_examples: int = field(
        default=0, metadata={"help": "Print this many samples as the model will see them, and stop."}
    )


@dataclass(frozen=True)
class Splits:
    """Rows as they were read; either may be missing where the run does not ask for it."""

    train: Dataset | IterableDataset | None
    validation: Dataset | IterableDataset | None


def load_splits(
    args: DataArguments, do_train: bool, do_eval: bool, streams: bool, seed: int, folder: str, token: str | None = None
) -> Splits:
    """Reads what the run asks for.

    `folder` is the script's conventional folder inside a data set, used where it exists; `streams` says whether a
    stream can end the run (--max_steps is given). A validation split that exists is used, else one is cut off, the
    same one for the same seed.
    """
    if args.dataset_name is None:
        raise InputError("--dataset_name: missing; give a hub name, a folder or a file")
    local = Path(args.dataset_name).expanduser()
    streaming = (streams and not local.exists()) if args.streaming is None else args.streaming
    rows = _load(args, args.subset, folder, streaming, token)
    if args.split not in rows:
        raise InputError(f"--split: {args.split!r} is not in {args.dataset_name}; found {', '.join(rows)}")
    train = rows[args.split]
    validation = next((rows[name] for name in VALIDATION_SPLITS if name in rows and name != args.split), None)
    if do_eval and (args.eval_subset or validation is None):
        held_out = _load(args, args.eval_subset, "data/evaluation", streaming, token, optional=args.eval_subset is None)
        validation = next(iter(held_out.values())) if held_out else validation
    if do_eval and validation is None:
        train, validation = _cut_off(train, args, seed)
        if do_train and streaming and next(iter(train), None) is None:
            raise InputError(
                f"--size_valid_set: the first {args.size_valid_set} rows of the stream are held out for validation and "
                f"leave none of {args.dataset_name} to train on; give less, or --streaming False"
            )
    if streaming:
        train = train.shuffle(seed=seed, buffer_size=args.shuffle_buffer)
    train, validation = _first(train, args.max_train_samples), _first(validation, args.max_eval_samples)
    return Splits(train if do_train else None, validation if do_eval else None)


def _load(
    args: DataArguments, subset: str | None, folder: str, streaming: bool, token: str | None, optional: bool = False
) -> dict:
    """The data set's splits by name; `folder` is tried where no `subset` is named, and alone if `optional`."""
    name, local = args.dataset_name, Path(args.dataset_name).expanduser()
    load = partial(datasets.load_dataset, streaming=streaming, token=token)
    try:
        if local.is_file():
            if optional:
                return {}
            if local.suffix not in READERS:
                raise InputError(f"--dataset_name: {name} ends in {local.suffix!r}; known are {', '.join(READERS)}")
            if local.stat().st_size == 0:
                raise InputError(f"--dataset_name: {name} is empty")
            if args.bad_rows == "skip" and local.suffix == ".jsonl" and not streaming:
                state = local.stat()
                known = {"size": state.st_size, "modified": state.st_mtime_ns, "code": _identify_code()}
                return {"train": Dataset.from_generator(_checked_rows, gen_kwargs={"file": str(local), **known})}
            return load(READERS[local.suffix], data_files={"train": str(local)})
        if local.is_dir():
            where = local / subset if subset else local / folder if (local / folder).is_dir() else local
            if not where.is_dir():
                raise InputError(f"--subset: {name} has no folder {subset!r}")
            if optional and where == local:
                return {}
            if (where / "dataset_dict.json").is_file() or (where / "state.json").is_file():
                stored = datasets.load_from_disk(str(where))
                stored = stored if isinstance(stored, DatasetDict) else DatasetDict({"train": stored})
                return {key: rows.to_iterable_dataset() for key, rows in stored.items()} if streaming else stored
            return load(str(where))
        if local.suffix in READERS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise InputError(f"--dataset_name: no such file or folder: {name}")
        if subset is not None:
            return load(name, data_dir=subset)
        try:
            return load(name, data_dir=folder)
        except Exception:  # hubs differ in how they say that a folder is not there
            return {} if optional else load(name)
    except datasets.exceptions.DatasetGenerationError as error:
        reason = _find_bad_row(local, error.__cause__) or f"{name}: {error.__cause__ or error}"
        raise InputError(f"--dataset_name: {reason}") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        kind = "cannot be read" if local.exists() else "is neither a file, nor a folder, nor to be had from the hub"
        raise InputError(f"--dataset_name: {name} {kind}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _lines_files(local: Path) -> list[Path]:
    return [local] if local.is_file() else sorted(local.rglob("*.jsonl")) if local.is_dir() else []


def _scan(file: Path, numbers_alike: bool = True) -> Iterator[tuple[dict, str | None]]:
    """Each line of a .jsonl file as a row, empty where there is none, and what is wrong with it if anything is."""
    types: dict[str, type] = {}
    with open(file, "rb") as lines:
        for line in lines:
            row, reason = {}, None
            try:
                row = json.loads(line.decode("utf-8")) if line.strip() else {}
            except UnicodeDecodeError as error:
                reason = f"not UTF-8 at byte {error.start + 1}"
            except json.JSONDecodeError as error:
                reason = f"no JSON: {error.msg} at character {error.pos + 1}"
            if not isinstance(row, dict):
                row, reason = {}, f"{type(row).__name__}, not an object with columns"
            for column, value in row.items():
                expected = types.setdefault(column, type(value)) if value is not None else None
                alike = numbers_alike and {expected, type(value)} == {int, float}
                if expected not in (None, type(value)) and not alike:
                    reason = f"column `{column}` is {type(value).__name__}, before it was {expected.__name__}"
            yield row, reason


def _find_bad_row(local: Path, error: BaseException | None = None) -> str | None:
    """Which line of which file cannot be read, for the message; a line that is no row comes before one of other types.

    The reader takes whole numbers and fractions for one type, unless its `error` is that it saw no fraction for long.
    """
    other_types = None
    for file in (file for file in _lines_files(local) if file.suffix == ".jsonl"):
        for number, (row, reason) in enumerate(_scan(file, numbers_alike="Float value" not in str(error)), 1):
            if reason and not row:
                return f"{file}, row {number}: {reason}"
            if reason and not other_types:
                other_types = f"{file}, row {number}: {reason}"
    return other_types


def _checked_rows(file: str, size: int, modified: int, code: str) -> Iterator[dict]:
    """The rows of a .jsonl file, and what is wrong with those that cannot be read: they count as bad rows.

    `size`, `modified` and `code` tell what changed from what is in the cache.
    """
    fractions: dict[str, bool] = {}  # by column; without them the first rows would make it one of whole numbers
    for row, reason in _scan(Path(file)):
        for column, value in row.items() if not reason else ():
            fractions[column] = isinstance(value, float) or fractions.get(column, False)
    for row, reason in _scan(Path(file)):
        values = {column: None if reason else row.get(column) for column in fractions}
        numbers = {name: float(value) for name, value in values.items() if type(value) is int and fractions[name]}
        yield {**values, **numbers, UNREADABLE: reason.partition(" at ")[0] if reason else ""}


@cache
def _identify_code() -> str:
    """Of what turns files into tokens: rows that other code prepared are not taken from the cache."""
    files = (Path(__file__).with_name(f"{name}.py") for name in ("loading", "formats", "tokenization"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


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
    parts = rows.train_test_split(test_size=size, seed=seed)
    return parts["train"], parts["test"]


def _first(rows: Dataset | IterableDataset | None, limit: int | None) -> Dataset | IterableDataset | None:
    if rows is None or limit is None:
        return rows
    return rows.take(limit) if isinstance(rows, IterableDataset) else rows.select(range(min(limit, len(rows))))


@dataclass(frozen=True)
class Prepared:
    """Tokenised rows, and what became of the rows that were read (None for a stream, which nobody has counted)."""

    rows: Dataset | IterableDataset
    dropped: dict[str, int] | None


def prepare(
    rows: Dataset | IterableDataset,
    args: DataArguments,
    tokenize: Tokenize,
    fingerprint: str,
    preference: bool = False,
) -> Prepared:
    """Tokenises all rows: in parallel, from the cache where the same rows met the same `fingerprint` before.

    Under several ranks call it inside `training_args.main_process_first()`: the others then read rank 0's cache.
    """
    columns = rows.column_names or list(next(iter(rows), {}))
    names = [column for column in columns if column != UNREADABLE]
    if not names:
        reason = _find_bad_row(Path(args.dataset_name)) or f"{args.dataset_name} has no rows"
        raise InputError(f"--dataset_name: {reason}")
    format = recognise(names, preference, args.data_format)
    work = partial(_tokenize_batch, format=format, tokenize=tokenize, skip=args.bad_rows == "skip")
    if isinstance(rows, IterableDataset):
        tokenized = rows.map(work, batched=True, batch_size=100, with_indices=True, remove_columns=columns)
        return Prepared(tokenized.filter(lambda reason: reason == "", input_columns="reason"), None)
    if len(rows) == 0:
        raise InputError(f"--dataset_name: {args.dataset_name} has no rows")
    ids, number = datasets.Sequence(datasets.Value("int32")), datasets.Value("int32")
    features = {name: number if name in COUNTS else ids for name in tokenize([])[0]}
    features = datasets.Features({**features, "reason": datasets.Value("string")})
    key = (rows._fingerprint, fingerprint, format.name, args.bad_rows, _identify_code())
    try:
        tokenized = rows.map(
            work,
            batched=True,
            with_indices=True,
            remove_columns=columns,
            num_proc=min(args.num_workers, len(rows) // 1000) or None,
            features=features,
            new_fingerprint=hashlib.sha256(repr(key).encode()).hexdigest()[:32],
            desc=f"Tokenizing {format.name}",
        )
    except UnicodeDecodeError as error:
        raise InputError(f"--dataset_name: {_find_bad_row(Path(args.dataset_name)) or error}") from None
    except RowError as error:
        raise InputError(
            f"--dataset_name: {args.dataset_name}, {error} (--bad_rows skip leaves such rows out)"
        ) from None
    reasons = tokenized.data.column("reason")
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(reasons).to_pylist()}
    dropped = {reason: count for reason, count in counts.items() if reason}
    bad = sum(count for name, count in dropped.items() if name.startswith("bad row"))
    if bad > args.max_bad_rows * len(rows):
        raise InputError(
            f"--bad_rows skip: {bad} of {len(rows)} rows are bad, more than --max_bad_rows {args.max_bad_rows:g}: "
            + _count(dropped)
        )
    kept = np.flatnonzero(pc.equal(reasons, "").to_numpy())
    if len(kept) == 0:
        raise InputError(f"--dataset_name: no row of {args.dataset_name} is left; dropped: {_count(dropped)}")
    return Prepared((tokenized if len(kept) == len(rows) else tokenized.select(kept)).remove_columns("reason"), dropped)


def _count(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"


def _tokenize_batch(batch: dict, indices: list[int], format: Format, tokenize: Tokenize, skip: bool) -> dict[str, list]:
    """One batch of rows to token columns and `reason`: empty, or why the row is dropped.

    A batch goes through the tokenizer at once; where that meets a bad row, its rows go one by one to find which.
    """
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    try:
        columns, reasons = tokenize([_read(row, format) for row in rows])
    except RowError:
        parts = [_tokenize_row(row, index, format, tokenize, skip) for row, index in zip(rows, indices, strict=True)]
        columns = {name: [value for part, _ in parts for value in part[name]] for name in parts[0][0]}
        reasons = [reason for _, part in parts for reason in part]
    return {**columns, "reason": [reason or "" for reason in reasons]}


def _read(row: dict, format: Format) -> Sample:
    if row.get(UNREADABLE):
        raise RowError(row[UNREADABLE])
    return format.read(row)


def _tokenize_row(row: dict, index: int, format: Format, tokenize: Tokenize, skip: bool) -> tuple[dict, list]:
    try:
        return tokenize([_read(row, format)])
    except RowError as error:
        if not skip:
            raise RowError(f"row {index + 1}: {error}") from None
        columns, _ = tokenize([])
        nothing = np.zeros(0, np.int32)
        return {name: [0 if name in COUNTS else nothing] for name in columns}, [f"bad row: {error}"]


def report(name: str, prepared: Prepared) -> None:
    """Logs what there is to learn from: samples, tokens, the share of them trained on, what was dropped and why."""
    rows = prepared.rows
    if isinstance(rows, IterableDataset):
        logger.info(f"{name}: a stream; rows are prepared as they come")
        return
    tokens = int(np.sum(rows.with_format("numpy")["length"]))
    line = f"{name}: {len(rows):,} samples, {tokens:,} tokens"
    if "trained" in rows.column_names:
        line += f", {np.sum(rows.with_format('numpy')['trained']) / tokens:.1%} trained on"
    logger.info(f"{line}; dropped: {_count(prepared.dropped or {})}")


def show_examples(rows: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, number: int) -> None:
    """Prints samples as the model will see them: what is trained on in green, special tokens reversed."""
    special = set(tokenizer.all_special_ids)
    for sample in rows.take(number):
        text = []
        for token, label in zip(sample["input_ids"], sample["labels"], strict=True):
            style = ("7;" if token in special else "") + ("32" if label != IGNORED else "90")
            text.append(f"\033[{style}m{tokenizer.decode([token])}\033[0m")
        print("".join(text), end="\n\n")
