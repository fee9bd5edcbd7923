"""Prepares the rows of data sets once for all ranks of a host; tokens come from the cache where nothing has changed.

Whatever a row says is used, or the log names it: what was dropped, cut or not shown, how often and where first.
"""

import ctypes
import hashlib
import itertools
import logging
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from align.data.files import PLACE, ROW, UNREADABLE, check_characters, is_sound, parse_row, seal
from align.data.formats import (
    LABELS,
    ONLY_TRUE,
    Format,
    LeftOut,
    RowError,
    Sample,
    find_label,
    read_label,
    recognise,
    without_nones,
)
from align.data.loading import DataArguments, check_data_arguments, check_output, load_splits, read_renames
from align.data.packing import drop_pages, read_column, read_numbers
from align.errors import InputError
from align.output import CACHES, check_writable, naming_a_full

logger = logging.getLogger(__name__)

COUNTS = ("length", "trained", "sample")  # columns with a number; all others hold token ids
CUT = "cut: "  # how notes about truncation begin
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")  # what a reason or a note quotes of its row
TRIED = 100  # rows that are read before any is left out: where all of them fail, the format is wrong, not the rows
Tokenize = Callable[[list[Sample]], tuple[dict[str, list], list[str | None], list[tuple[str, ...]]]]


@dataclass(frozen=True)
class Prepared:
    """Tokenised rows, and what became of the rows that were read (None where nobody counted them here).

    `notes` say what was noticed, in how many rows, and where the first of them stands; `noted` is its index.
    """

    rows: Dataset | IterableDataset
    dropped: dict[str, int] | None
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    parts: "dict[str, Prepared]" = field(default_factory=dict)  # where several data sets make one
    columns: tuple[str, ...] = ()  # of the rows that were read


def prepare_data(
    args: DataArguments,
    training_args,
    folder: str,
    tokenize: Tokenize,
    fingerprint: str,
    has_template: bool,
    token: str | None = None,
    preference: bool = False,
) -> dict[str, Prepared]:
    """The tokenised splits that the run asks for, `train` and `validation`, of all data sets together.

    Under several ranks call it inside `first_of_node_first` (align/training/ranks.py): the others then read its cache.
    """
    check_data_arguments(args, has_template)
    cache_folder = Path(datasets.config.HF_DATASETS_CACHE)
    if not (cache_folder / "align").is_dir():  # else it may hold all that is needed
        check_writable(cache_folder, CACHES)
    names = [args.dataset_name] if isinstance(args.dataset_name, str) else args.dataset_name or []
    if not names:
        raise InputError("--dataset_name: missing; give a hub name, a folder or a file")
    ends = training_args.max_steps > 0
    if args.streaming and training_args.do_train and not ends and not preference:
        raise InputError("--streaming True: nobody knows how long an epoch of a stream is; add --max_steps")
    loaded = {}
    for name in names:
        named: Any = name  # one of several
        one = replace(args, dataset_name=named)
        if not args.show_examples:  # which writes nothing that would be read
            check_output(name, args.subset, folder, training_args.output_dir)
        read = load_splits(one, training_args.do_train, training_args.do_eval, ends, training_args.seed, folder, token)
        loaded[name] = one, {split: rows for split, rows in vars(read).items() if rows is not None}
    everything = [rows for _, splits in loaded.values() for rows in splits.values()]
    _tell_unused(args, everything, training_args.do_eval, has_template)
    found: dict[str, dict[str, Prepared]] = {}
    for name, (one, splits) in loaded.items():
        for split, rows in splits.items():
            title = split if len(names) == 1 else f"{split} of {name}"
            is_alone = len(names) == 1
            prepared = prepare(rows, one, tokenize, fingerprint, preference, has_template, title, is_alone)
            report(title, prepared)
            if isinstance(prepared.rows, Dataset):
                drop_pages(prepared.rows)
            found.setdefault(split, {})[name] = prepared
    all_columns = (part.columns for parts in found.values() for part in parts.values())
    _check_columns(args, list(dict.fromkeys(itertools.chain(*all_columns))))
    if len(names) == 1:
        return {split: parts[names[0]] for split, parts in found.items()}
    mixed = {split: _mix(split, parts, args, training_args.seed) for split, parts in found.items()}
    for split, prepared in mixed.items():
        report(split, prepared)
    return mixed


def _tell_unused(args: DataArguments, rows: list[Dataset | IterableDataset], do_eval: bool, has_template: bool) -> None:
    """Warns of flags of the data that change nothing in this run."""
    streams = any(isinstance(each, IterableDataset) for each in rows)
    reasons = {
        "shuffle_buffer": None if streams else "nothing is read as a stream",
        "size_valid_set": None if streams and do_eval else "no stream is cut for validation",
        "validation_split_percentage": "nothing is cut for validation" if streams or not do_eval else None,
        "eval_subset": None if do_eval else "nothing is evaluated",
        "max_bad_rows": None if args.bad_rows == "skip" and not streams else "it limits --bad_rows skip, and no stream",
        "text_as_chat": None if has_template else "the tokenizer has no chat template",
        "num_workers": "a stream is prepared as it is read" if streams else None,
    }
    for name, reason in reasons.items():
        if reason and getattr(args, name) != getattr(DataArguments, name):
            logger.warning(f"--{name} has no effect here: {reason}")


def _check_columns(args: DataArguments, columns: list[str]) -> None:
    """Checks flags about columns: they must hold for at least one of several data sets."""
    names = args.dataset_name if isinstance(args.dataset_name, str) else " ".join(args.dataset_name or ())
    for old in read_renames(args).values():
        if old not in columns:
            raise InputError(f"--columns: {names} has no column {old!r}; found {', '.join(columns)}")
    if args.only_true_labels and not any(column in columns for column in LABELS):
        raise InputError(f"{ONLY_TRUE}: {names} has no column {' or '.join(LABELS)}; found {', '.join(columns)}")


def _mix(split: str, parts: dict[str, Prepared], args: DataArguments, seed: int) -> Prepared:
    """Joins all data sets: whole, or as much of each as --dataset_mix asks for, no row twice."""
    rows: list[Any] = [part.rows for part in parts.values()]
    shares = args.dataset_mix if split == "train" else None
    limit = args.max_train_samples if split == "train" else args.max_eval_samples
    if any(isinstance(each, IterableDataset) for each in rows):
        rows = [each if isinstance(each, IterableDataset) else each.to_iterable_dataset() for each in rows]
        if shares:
            mixed = datasets.interleave_datasets(rows, probabilities=shares, seed=seed)
        else:
            mixed = datasets.concatenate_datasets(rows)
        how = f" mixed {shares} until the first one ends" if shares else " one after the other"
        logger.info(f"{split}: {' + '.join(parts)}, streams{how}")
        return Prepared(mixed.take(limit) if limit else mixed, None, parts=dict(parts))
    everything = sum(map(len, rows))
    shares = shares or [len(each) / everything for each in rows]
    total = min(limit or everything, *(len(each) / share for each, share in zip(rows, shares, strict=True)))
    order = np.random.default_rng(seed)
    chosen: list[Dataset] = []
    noted: dict[str, int] = {}
    for part, share in zip(parts.values(), shares, strict=True):
        size = max(1, int(total * share + 1e-6))
        indices = np.sort(order.permutation(len(part.rows))[:size])
        for note, index in part.noted.items():
            if index in indices:
                noted.setdefault(note, sum(map(len, chosen)) + int(np.searchsorted(indices, index)))
        chosen.append(part.rows.select(indices) if size < len(part.rows) else part.rows)
    mixed = datasets.concatenate_datasets(chosen)
    for (name, part), each in zip(parts.items(), chosen, strict=True):
        taken = f"{len(each):,} of its {len(part.rows):,} samples"
        logger.info(f"{split}: {len(each) / len(mixed):.1%} are {name}'s, {taken}")
    return Prepared(mixed, None, noted=noted, parts=dict(parts))


class Reader:
    """Turns rows of one data set into samples, and these into tokens; a bad row raises, or is dropped with a reason."""

    def __init__(
        self,
        args: DataArguments,
        columns: list[str],
        format: Format,
        tokenize: Tokenize,
        as_chat: bool,
        is_stream: bool,
    ):
        self.name, self.renames, self.columns = args.dataset_name, read_renames(args), set(columns)
        self.skips, self.only_true = args.bad_rows == "skip", args.only_true_labels
        self.format, self.tokenize, self.as_chat, self.is_stream = format, tokenize, as_chat, is_stream
        self.told: set[str] = set()

    def read(self, row: dict) -> Sample:
        text, is_file = row.get(ROW, ""), UNREADABLE in row
        row = get_columns(row, self.renames)
        if not is_file:
            used = self.format.used  # others, as an embedding of 1,024 numbers, nobody reads
            row = {column: without_nones(value) if column in used else value for column, value in row.items()}
        check_characters(text, row, self.format.used)
        read_label(row, self.format, self.only_true)
        sample = self.format.read(row, self.as_chat)
        if row.keys() <= self.columns:
            return sample
        late = ", ".join(sorted(row.keys() - self.columns - self.format.used))
        note = f"columns that the first rows do not have are not used: {late}"
        return replace(sample, notes=(*sample.notes, note)) if late else sample

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list] | pa.Table:
        """One batch of rows to token columns; `reason` is empty, or why the row is dropped; `notes` go to the log.

        The batch goes through the tokenizer at once. Where that meets a bad row, its rows go one by one to find which.
        """
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        samples, reasons = {}, {}
        for place, row in enumerate(rows):
            try:
                samples[place] = self.read(row)
            except RowError as error:
                reasons[place] = self._give_up(error, row, indices[place])
        try:
            columns, dropped, notes = self.tokenize(list(samples.values()))
            places = list(samples)
            owners = [places[number] for number in columns["sample"]]
        except RowError:
            parts, owners = [], []
            for place, sample in samples.items():
                try:
                    parts.append(self.tokenize([sample]))
                    owners += [place] * len(parts[-1][1])
                except RowError as error:
                    reasons[place] = self._give_up(error, rows[place], indices[place])
            columns = {name: [value for part in parts for value in part[0][name]] for name in self.tokenize([])[0]}
            dropped = [reason for part in parts for reason in part[1]]
            notes = [told for part in parts for told in part[2]]
        columns["sample"] = [indices[place] for place in owners]
        nothing = [0 if name in COUNTS else np.zeros(0, np.int32) for name in columns]
        table = list(zip(owners, *columns.values(), dropped, notes, strict=True))
        table += [(place, *nothing, reason, ()) for place, reason in reasons.items()]
        owners, *values, dropped, notes = map(list, zip(*sorted(table, key=itemgetter(0)), strict=True))
        if self.is_stream:
            self._tell([rows[place] for place in owners], [indices[place] for place in owners], dropped, notes)
        made = dict(zip(columns, values, strict=True))
        made |= {"reason": [reason or "" for reason in dropped], "notes": ["\n".join(told) for told in notes]}
        return made if self.is_stream else _make_table(made)

    def _give_up(self, error: RowError, row: dict, index: int) -> str:
        if isinstance(error, LeftOut):
            return str(error)
        if not self.skips:
            where = row.get(PLACE) or f"{self.name}, row {index + 1}"
            raise InputError(f"--dataset_name: {where}: {error} (--bad_rows skip leaves such rows out)") from None
        return f"bad row: {str(error).partition(' at ')[0] if UNREADABLE in row else error}"

    def _tell(self, rows: list[dict], indices: list[int], dropped: list, notes: list) -> None:
        """Logs each kind of loss when it is first met: the rows of a stream cannot be counted beforehand."""
        for row, index, reason, told in zip(rows, indices, dropped, notes, strict=True):
            for text in filter(None, (reason and f"left out: {reason}", *told)):
                if without_quotes(text) not in self.told:
                    self.told.add(without_quotes(text))
                    logger.warning(f"{row.get(PLACE) or f'row {index + 1}'}: {text} (later rows like it are not named)")


def _make_table(columns: dict[str, list]) -> pa.Table:
    """Columns as Arrow has them: ids end to end, in one copy instead of one for each row."""
    arrays = {}
    for name, values in columns.items():
        if isinstance(values[0], np.ndarray):
            ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
            arrays[name] = pa.ListArray.from_arrays(ends, np.concatenate(values))
        else:
            arrays[name] = pa.array(values, pa.int32() if name in COUNTS else pa.string())
    return pa.table(arrays)


def get_columns(row: dict, renames: dict[str, str]) -> dict:
    """A row's columns under the names that the formats know."""
    row = parse_row(row) if UNREADABLE in row else row
    if not renames:
        return row
    renamed = {column: value for column, value in row.items() if column not in renames.values()}
    return {**renamed, **{new: row[old] for new, old in renames.items() if old in row}}


def prepare(
    rows: Dataset | IterableDataset,
    args: DataArguments,
    tokenize: Tokenize,
    fingerprint: str,
    preference: bool = False,
    has_template: bool = False,
    title: str = "train",
    is_alone: bool = True,
) -> Prepared:
    """Tokenises all rows: in parallel, from the cache where the same rows met the same `fingerprint` before."""
    if isinstance(rows, Dataset):
        rows = rows.with_format(None)
    if isinstance(rows, IterableDataset):
        first = list(rows.take(1000))
    else:
        batch = rows[:1000]
        first = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    if not first:
        raise InputError(f"--dataset_name: {args.dataset_name} has no rows")
    renames = read_renames(args)
    found = _find_columns(first, rows.column_names)
    if is_alone:
        _check_columns(args, found)
    taken = [new for new in renames if new in found and new not in renames.values() and renames[new] in found]
    if taken:
        raise InputError(f"--columns: {args.dataset_name} has a column {taken[0]!r} already; rename it as well")
    columns = list(get_columns(dict.fromkeys(found), renames))
    format = recognise(columns, preference, args.data_format)
    as_chat = has_template and format.name != "text" if args.text_as_chat is None else args.text_as_chat
    reader = Reader(args, columns, format, tokenize, as_chat, isinstance(rows, IterableDataset))
    _try_first(first[:TRIED], reader)
    _tell_format(title, reader, columns, first)
    _tell_wording(args, reader, first)
    old = rows.column_names or list(first[0])
    if isinstance(rows, IterableDataset):
        tokenized = rows.map(reader, batched=True, batch_size=100, with_indices=True, remove_columns=old)
        tokenized = tokenized.filter(lambda reason: reason == "", input_columns="reason")
        return Prepared(tokenized.remove_columns(["sample", "reason", "notes"]), None, columns=tuple(found))
    ids, number = datasets.Sequence(datasets.Value("int32")), datasets.Value("int32")
    features = {name: number if name in COUNTS else ids for name in tokenize([])[0]}
    features = datasets.Features({**features, "reason": datasets.Value("string"), "notes": datasets.Value("string")})
    asked = (renames, as_chat, args.only_true_labels, args.bad_rows)
    key = hashlib.sha256(repr((rows._fingerprint, fingerprint, format.name, asked, _identify_code())).encode())
    target = Path(datasets.config.HF_DATASETS_CACHE) / "align" / f"tokens-{key.hexdigest()[:32]}.arrow"
    target.parent.mkdir(parents=True, exist_ok=True)
    was_sound = is_sound(target)
    with EndingForks(), naming_a_full(target.parent, CACHES):
        tokenized = rows.map(
            reader,
            batched=True,
            with_indices=True,
            remove_columns=old,
            num_proc=min(args.num_workers, len(rows) // 1000) or None,
            features=features,
            new_fingerprint=key.hexdigest()[:32],
            cache_file_name=str(target),
            desc=f"Tokenizing {format.name}",
        )
        if not was_sound:
            seal(target, [Path(file["filename"]) for file in tokenized.cache_files])
    return replace(_sum_up(tokenized, rows, args), columns=tuple(found))


class EndingForks:
    """Within, the kernel ends this process's forks with it, even by SIGKILL: those that prepare data would wait on."""

    is_on = False

    def __enter__(self) -> None:
        EndingForks._register()
        EndingForks.is_on = True

    def __exit__(self, *_: object) -> None:
        EndingForks.is_on = False

    @staticmethod
    @cache
    def _register() -> None:
        prctl, pr_set_pdeathsig = ctypes.CDLL(None).prctl, 1  # linux/prctl.h
        os.register_at_fork(after_in_child=lambda: EndingForks.is_on and prctl(pr_set_pdeathsig, signal.SIGKILL))


def _identify_code() -> str:
    """A hash of the code that turns files into tokens: rows that other code prepared are not taken from the cache."""
    files = (
        Path(__file__).with_name(f"{name}.py") for name in ("preparing", "files", "formats", "chats", "tokenization")
    )
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _find_columns(first: list[dict], known: list[str] | None) -> list[str]:
    """The columns of a data set: of rows from a file, those of the first rows."""
    if UNREADABLE not in first[0]:
        return list(known or first[0])
    found, reasons = {}, []
    for row in first:
        try:
            found.update(dict.fromkeys(parse_row(row)))
        except RowError as error:
            reasons.append(f"{row[PLACE]}: {error}")
    if not found:
        raise InputError(f"--dataset_name: {reasons[0]}")
    return list(found)


def _try_first(first: list[dict], reader: Reader) -> None:
    """Stops where all of the first rows fail alike: then nothing is gained by leaving rows out."""
    reasons = []
    for row in first:
        try:
            reader.tokenize([reader.read(row)])
            return
        except RowError as error:
            if isinstance(error, LeftOut):
                return
            reasons.append(str(error))
    if len(set(map(without_quotes, reasons))) == 1 and len(first) > 1:
        where = first[0].get(PLACE) or f"{reader.name}, row 1"
        raise InputError(f"--dataset_name: {where}: {reasons[0]} (as all of the first {len(first)} rows)")


def _tell_format(title: str, reader: Reader, columns: list[str], first: list[dict]) -> None:
    """Logs in one line what the rows are taken for, in which wording, and which of their columns are not used."""
    format = reader.format
    line = f"{title}: {format.name} rows ({' + '.join(column for column in columns if column in format.used)})"
    if format.name != "text" and _is_text(reader, first):
        line += ", as text" if not reader.as_chat else ""
    elif format.name != "text":
        line += ", as turns of the chat template"
    is_label = {column for row in first[:TRIED] if (column := _find_label(reader, row))}
    used = format.used - (set(LABELS) - is_label)
    unused = [column or "the one without a name" for column in columns if column not in used]
    logger.info(f"{line}; columns not used: {', '.join(unused) or 'none'}")


def _tell_wording(args: DataArguments, reader: Reader, first: list[dict]) -> None:
    """Flags about the chat template that change nothing of these rows."""
    is_chat = not {"messages", "conversations"}.isdisjoint(reader.format.columns)
    if args.text_as_chat is not None and (is_chat or (args.text_as_chat and reader.format.name == "text")):
        reason = "rows of messages always go through the chat template" if is_chat else "plain text has no turns"
        logger.warning(f"--text_as_chat has no effect on {args.dataset_name}: {reason}")
    if args.chat_template and _is_text(reader, first):
        logger.warning(f"--chat_template has no effect on {args.dataset_name}, whose rows are trained on as text")


def _is_text(reader: Reader, first: list[dict]) -> bool:
    return any(isinstance(_try_plain(reader, row), str) for row in first[:1])


def _find_label(reader: Reader, row: dict) -> str | None:
    try:
        return find_label(get_columns(row, reader.renames), reader.format)
    except RowError:
        return None


def _try_plain(reader: Reader, row: dict) -> object:
    try:
        return reader.read(row).answers[0]
    except RowError:
        return None


def without_quotes(text: str) -> str:
    """A reason or a note by its kind alone: rows of the same kind are counted together."""
    return QUOTED.sub("", text)


def _sum_up(tokenized: Dataset, rows: Dataset, args: DataArguments) -> Prepared:
    """Takes the dropped rows out; counts them, and the notes about the others."""
    reasons = tokenized.data.column("reason")
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(reasons).to_pylist()}
    names: dict[str, str] = {}  # the first of each kind
    dropped: dict[str, int] = {}
    for reason, count in counts.items():
        if reason:
            name = names.setdefault(without_quotes(reason), reason)
            dropped[name] = dropped.get(name, 0) + count
    bad = sum(count for name, count in dropped.items() if name.startswith("bad row"))
    if bad > args.max_bad_rows * len(rows):
        raise InputError(
            f"--bad_rows skip: {bad} of {len(rows)} rows are bad, more than --max_bad_rows {args.max_bad_rows:g}: "
            + _count(dropped)
        )
    kept = np.flatnonzero(pc.equal(reasons, "").to_numpy())
    if len(kept) == 0:
        raise InputError(f"--dataset_name: no row of {args.dataset_name} is left; dropped: {_count(dropped)}")
    tokenized = tokenized if len(kept) == len(tokenized) else tokenized.select(kept)
    notes: dict[str, tuple[int, str]] = {}
    noted: dict[str, int] = {}
    told = read_column(tokenized, "notes")
    for entry in pc.value_counts(told).to_pylist():
        if entry["values"]:
            index = pc.index(told, entry["values"]).as_py()
            where = rows[tokenized[index]["sample"]].get(PLACE) or "the first in " + str(args.dataset_name)
            each = entry["values"].split("\n")
            for note in dict.fromkeys(names.setdefault(without_quotes(text), text) for text in each):
                count, place = notes.get(note, (0, where))
                notes[note] = count + entry["counts"], place
                noted.setdefault(note, index)
    return Prepared(tokenized.remove_columns(["sample", "reason", "notes"]), dropped, notes, noted)


def _count(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"


def report(name: str, prepared: Prepared) -> None:
    """Logs the samples, the tokens, the share trained on, and what was dropped or cut, and why."""
    rows = prepared.rows
    if isinstance(rows, IterableDataset):
        logger.info(f"{name}: a stream; rows are prepared as they come")
        return
    tokens = int(read_numbers(rows, "length").sum())
    line = f"{name}: {len(rows):,} samples, {tokens:,} tokens"
    if "trained" in rows.column_names:
        line += f", {read_numbers(rows, 'trained').sum() / tokens:.1%} trained on"
    cuts = [
        f"{count:,} {note.removeprefix(CUT)}" for note, (count, _) in prepared.notes.items() if note.startswith(CUT)
    ]
    if prepared.dropped is not None:
        line += f"; dropped: {_count(prepared.dropped)}; cut: {', '.join(cuts) or 'none'}"
    logger.info(line)
    for note, (count, place) in prepared.notes.items():
        if not note.startswith(CUT):
            logger.warning(f"{name}: {note}: {count:,} of {len(rows):,} samples, first {place}")
