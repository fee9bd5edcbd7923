"""Preference pairs as rows of few static shapes: the prompt once, both answers behind it, several pairs to a row.

A row is filled from both ends: all but the last token of each prompt from the left, the answers from the right. Each
answer is headed by the prompt's last token, so that every token that is predicted stands in the row's last columns and
only those go through the head. A row of two pairs, p1 p2 p3 with the answers c1 c2 (chosen) and r1 (rejected), and
q1 q2 with d1 and s1 s2:

                                  | scored: go through the head
    input_ids      p1 p2 q1  .  . | q2 s1  q2  p3  p3 c1
    predicted                     | s1 s2  d1  r1  c1 c2       targets
    answer                        |  3  3   2   1   0  0       slots: 2 * pair, + 1 for the rejected one
    position_ids    0  1  0  0  0 |  1  2   1   2   2  3
    segment_ids     1  1  2  0  0 |  2  2   2   1   1  1       the pair
    branch_ids      0  0  0  0  0 |  2  2   1   2   1  1       0 prompt, 1 chosen, 2 rejected

A token sees what stands in front of it in its pair's prompt and in its own answer: c1 sees p1 p2 p3. A pair of a prompt
of p tokens and answers of c and r takes p - 1 + c + r columns, where two rows of their own take 2p + c + r. Everything
here is numpy: see align/data/packing.py.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from transformers import PretrainedConfig

from align.data.packing import IGNORED, NONE, BucketSampler, MappedDataset, choose_buckets, drop_pages, take
from align.errors import InputError
from align.training.reference import Stored

logger = logging.getLogger(__name__)

IDS = pyarrow.list_(pyarrow.int32())
COLUMNS = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")
LABELS = ("chosen_labels", "rejected_labels")  # the answer's tokens that are scored, IGNORED the others
ROW_IDS = ("input_ids", "attention_mask", "position_ids", "segment_ids", "branch_ids")
EMPTY = np.empty(0, np.int64)
WORTHWHILE = 0.85  # share of useful columns at which no further bucket is added
WEIGHTS = (0, 0.5, 1, 2)  # of a scored column beside any column, tried for rows of the same size
SAMPLED = 100_000  # pairs that a layout is chosen on


class Bucket(NamedTuple):
    """What rows are padded to: so many columns, of which the last `scored` go through the head."""

    columns: int
    scored: int


@dataclass(frozen=True)
class PairRows:
    """Which pairs stand in each row, `[rows, pairs_per_row]` (`NONE` where none does), and the number of its bucket."""

    members: np.ndarray
    bucket_of: np.ndarray


@dataclass(frozen=True)
class Layout:
    """How all pairs of a run are laid out. Without `shared`, chosen and rejected are padded rows of their own."""

    shared: bool
    pairs_per_row: int
    buckets: tuple[Bucket, ...]  # from short to long
    rows: Mapping[str, PairRows]  # by split


def collect(rows: Dataset | IterableDataset, limit: int) -> Dataset:
    """A stream's first `limit` pairs (all, where it is not positive), in memory: their lengths decide the layout."""
    if isinstance(rows, Dataset):
        return rows
    columns = [*COLUMNS, *LABELS]
    parts = (rows.take(limit) if limit > 0 else rows).select_columns(columns).iter(batch_size=1000)
    tables = [pyarrow.table({name: pyarrow.array(part[name], IDS) for name in columns}) for part in parts]
    if not tables:
        raise InputError("--dataset_name: no pair of the stream can be used")
    table = pyarrow.concat_tables(tables)
    content = hashlib.sha256()
    for column in table.columns:
        for chunk in column.chunks:
            content.update(chunk.flatten().to_numpy().tobytes() + chunk.value_lengths().to_numpy().tobytes())
    return Dataset(table, fingerprint=content.hexdigest()[:32])


def measure(pairs: Dataset) -> np.ndarray:
    """Tokens of each prompt, chosen and rejected answer, `[pairs, 3]`."""
    parts = pairs.select_columns(list(COLUMNS)).with_format("arrow").iter(batch_size=10_000)
    lengths = [np.stack([pc.list_value_length(part[name]) for name in COLUMNS], axis=1) for part in parts]
    drop_pages(pairs)
    return np.concatenate(lengths)


def find_longest(lengths: np.ndarray) -> int:
    """Columns of the longest prompt with its answer, of lengths `[pairs, 3]`: nothing is asked behind a last token."""
    return int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).max(initial=1)) - 1


def column_cost(config: PretrainedConfig) -> Callable[[int, int], float]:
    """About what a row costs in multiply-adds: layers and attention for all columns, the head for `scored` ones."""
    config = config.get_text_config()
    width, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size

    def cost(columns: int, scored: int) -> float:
        return layers * columns * (12 * width**2 + 2 * columns * width) + scored * vocabulary * width

    return cost


def share_rows(
    lengths: Mapping[str, np.ndarray],
    pairs_per_step: int,
    token_budget: int,
    num_buckets: int,
    cost: Callable[[int, int], float],
    seed: int = 0,
) -> Layout:
    """Puts the same number of pairs into every row, long ones with short ones, so that all rows are about equally long.

    That number divides `pairs_per_step`, what one device computes for a step, and its rows fit `token_budget`. Of those
    it needs the fewest buckets, at most `num_buckets`, then costs least. `lengths` are `measure`d, by split; the first
    split decides.
    """
    first = next(iter(lengths.values()))
    sample = first[:: math.ceil(len(first) / SAMPLED)]
    plans = []
    for number in (number for number in range(1, pairs_per_step + 1) if pairs_per_step % number == 0):
        for weight in WEIGHTS if number > 1 else (0,):
            sizes = _sizes(sample, _balance(sample, number, weight, seed))
            buckets = _choose_buckets(sizes, num_buckets)
            if number == 1 or buckets[-1].columns <= token_budget:
                total = sum(cost(*buckets[bucket]) for bucket in _assign(sizes, buckets))
                plans.append((len(buckets), total / (number * len(sizes)), number, weight))
    *_, number, weight = min(plans)
    members = {name: _balance(split, number, weight, seed) for name, split in lengths.items()}
    sizes = {name: _sizes(split, members[name]) for name, split in lengths.items()}
    buckets = _choose_buckets(np.concatenate(list(sizes.values())), num_buckets)
    rows = {name: PairRows(members[name], _assign(sizes[name], buckets)) for name in lengths}
    return Layout(True, number, tuple(buckets), rows)


def separate_rows(lengths: Mapping[str, np.ndarray], num_buckets: int, longest: int) -> Layout:
    """Gives each answer a row of its own behind its prompt, padded to one of at most `num_buckets` lengths."""
    widths = {name: split[:, 0] + split[:, 1:].max(axis=1) for name, split in lengths.items()}
    columns = choose_buckets(np.concatenate(list(widths.values())), num_buckets, longest)
    rows = {
        name: PairRows(np.arange(len(width))[:, None], np.searchsorted(columns, width))
        for name, width in widths.items()
    }
    return Layout(False, 1, tuple(Bucket(number, number) for number in columns), rows)


def take_row(
    layout: Layout, pairs: Mapping[str, Dataset], lengths: Mapping[str, np.ndarray], pad_token_id: int
) -> dict[str, torch.Tensor]:
    """The row `[T]` with the longest pair of the first split, as the collator gives it; of padded ones, the shorter."""
    name, rows = next(iter(layout.rows.items()))
    sizes = take(lengths[name].sum(axis=1), rows.members, nothing=0)
    members = rows.members[sizes.max(axis=1).argmax()].tolist()
    batch = PairCollator(layout, pad_token_id)(PairDataset(pairs[name], rows).__getitems__(members))
    ids = {name: batch[name] for name in ROW_IDS if name in batch}
    row = 0 if layout.shared else int(ids["attention_mask"].sum(dim=1).argmin())
    return {name: values[row] for name, values in ids.items()}


def log_layout(layout: Layout, lengths: Mapping[str, np.ndarray]) -> None:
    """What is computed for one pair, and how much of it is useful."""
    for name, rows in layout.rows.items():
        pairs = (rows.members != NONE).sum()
        needed = lengths[name].sum() - pairs + (0 if layout.shared else (lengths[name][:, 0] + 1).sum())
        computed = np.array([bucket.columns for bucket in layout.buckets])[rows.bucket_of].sum() * (2 - layout.shared)
        logger.info(
            f"{name}: {computed / pairs:.0f} computed tokens a pair, {needed / computed:.1%} of them useful; "
            f"{layout.pairs_per_row} pair(s) to a row" + (", the prompt once" if layout.shared else " and answer")
        )
    shapes = ", ".join(f"{bucket.columns} columns, {bucket.scored} scored" for bucket in layout.buckets)
    logger.info(f"shapes: {shapes}")


def _balance(lengths: np.ndarray, number: int, weight: float, seed: int) -> np.ndarray:
    """`number` pairs to each row, `[rows, number]`, of about the same size: columns + `weight` * scored columns.

    Longest first; in each round the shortest row so far gets the longest pair that is left.
    """
    sizes = lengths.sum(axis=1) - 1 + weight * lengths[:, 1:].sum(axis=1)
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    order = np.append(order, np.full(-len(order) % number, NONE)).reshape(number, -1)
    members = order[:1]
    for longest_first in order[1:]:
        shortest_first = np.argsort(take(sizes, members, nothing=0).sum(axis=0), kind="stable")
        taken = np.empty_like(longest_first)
        taken[shortest_first] = longest_first
        members = np.append(members, taken[None], axis=0)
    return members.T


def _sizes(lengths: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Columns and scored columns of each row, `[rows, 2]`."""
    scored = lengths[:, 1:].sum(axis=1)
    sizes = np.stack([lengths[:, 0] - 1 + scored, scored], axis=1)
    return take(sizes, members, nothing=0).sum(axis=1)


def _choose_buckets(sizes: np.ndarray, num_buckets: int, multiple_of: int = 8) -> list[Bucket]:
    """As few buckets as are worthwhile for rows of these `_sizes`."""
    columns, longest = sizes[:, 0], _round_up(sizes[:, 0].max(), multiple_of)
    for number in range(1, num_buckets + 1):
        padded = choose_buckets(columns, number, longest, multiple_of)
        bucket_of = np.searchsorted(padded, columns)
        if columns.sum() >= WORTHWHILE * np.array(padded)[bucket_of].sum():
            break
    scored = [_round_up(sizes[bucket_of == bucket, 1].max(), multiple_of) for bucket in range(len(padded))]
    return [Bucket(*size) for size in zip(padded, np.maximum.accumulate(scored).tolist(), strict=True)]


def _assign(sizes: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    """The number of each row's bucket, `[rows]`."""
    return np.searchsorted([bucket.columns for bucket in buckets], sizes[:, 0])


def _round_up(number: int, multiple_of: int) -> int:
    return -(-int(number) // multiple_of) * multiple_of


class PairDataset(MappedDataset):
    """Pairs as the collator takes them, with the reference's log-probs where they are `stored`."""

    def __init__(self, pairs: Dataset, rows: PairRows, stored: Stored | None = None):
        self.pairs = pairs.select_columns([*COLUMNS, *LABELS]).with_format("numpy")
        self.rows = rows
        self.stored = stored

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitems__(self, indices: list[int]) -> list[dict]:
        taken = [index for index in indices if index != NONE]
        columns = self.pairs[taken] if taken else {name: [] for name in (*COLUMNS, *LABELS)}
        pairs = zip(*(columns[name] for name in (*COLUMNS, *LABELS)), strict=True)
        self.forget(self.pairs)
        return [self._describe(index, *(next(pairs) if index != NONE else [EMPTY] * 5)) for index in indices]

    def _describe(self, index: int, prompt: np.ndarray, *answers_and_labels: np.ndarray) -> dict:
        pair = {"index": index, "prompt": prompt, "answers": answers_and_labels[:2], "labels": answers_and_labels[2:]}
        if self.stored is not None and self.stored.values is not None:
            pair["reference"] = self.stored.values[index] if index != NONE else np.zeros(2, np.float32)
        return pair


class PairSampler(torch.utils.data.Sampler):
    """Every pair once an epoch, row by row, filled up with `NONE` to whole batches on all ranks.

    `rows_per_batch` counts the rows of all ranks. Nothing is repeated at the end of an epoch: evaluations are exact.
    """

    def __init__(self, rows: PairRows, rows_per_batch: int, seed: int = 0, shuffle: bool = True):
        self.members = rows.members
        self.order = BucketSampler(rows.bucket_of, rows_per_batch, seed, shuffle)

    def __len__(self) -> int:
        return len(self.order) * self.members.shape[1]

    def __iter__(self) -> Iterator[int]:
        yield from take(self.members, np.fromiter(self.order, np.int64), nothing=NONE).ravel().tolist()

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)


def no_slot(pairs: int) -> int:
    """The slot in which a batch of so many pairs adds up what belongs to no answer: behind two slots a pair."""
    return 2 * pairs


@dataclass(frozen=True)
class PairCollator:
    """Pairs, `pairs_per_row` to a row, to one batch in the smallest bucket that holds them.

    Beside what the model takes: `targets` and `slots` of the scored columns (the token to predict, and 2 * pair, + 1
    for the rejected answer; `no_slot` where nothing is scored), and by pair `answer_lengths` (0 where there is none),
    `indices` (`NONE` where there is no pair) and, where stored, `reference`.
    """

    layout: Layout
    pad_token_id: int

    def __call__(self, pairs: list[dict]) -> dict[str, torch.Tensor]:
        batch = self._fill_shared(pairs) if self.layout.shared else self._fill_separate(pairs)
        batch["answer_lengths"] = np.array([[(each != IGNORED).sum() for each in pair["labels"]] for pair in pairs])
        batch["indices"] = np.array([pair["index"] for pair in pairs])
        if "reference" in pairs[0]:
            batch["reference"] = np.stack([pair["reference"] for pair in pairs])
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _fill_shared(self, pairs: list[dict]) -> dict[str, np.ndarray]:
        """Rows as the picture at the top of this file shows them."""
        number = self.layout.pairs_per_row
        rows = [pairs[start : start + number] for start in range(0, len(pairs), number)]
        bucket = self._choose_bucket(max(sum(map(_columns, row)) for row in rows))
        batch = self._empty(len(rows), bucket, len(pairs))
        for name in ("position_ids", "segment_ids", "branch_ids"):
            batch[name] = np.zeros((len(rows), bucket.columns), np.int64)

        def put(row: int, start: int, tokens: np.ndarray, position: int, segment: int, branch: int) -> slice:
            columns = slice(start, start + len(tokens))
            batch["input_ids"][row, columns] = tokens
            batch["position_ids"][row, columns] = np.arange(position, position + len(tokens))
            batch["segment_ids"][row, columns], batch["branch_ids"][row, columns] = segment, branch
            return columns

        for row, members in enumerate(rows):
            left, right = 0, bucket.columns
            for place, pair in enumerate(members):
                if pair["index"] == NONE:
                    continue
                prompt, last = pair["prompt"][:-1], pair["prompt"][-1:]
                left = put(row, left, prompt, 0, place + 1, 0).stop
                for branch, answer in enumerate(pair["answers"]):
                    right -= len(answer)
                    put(row, right, np.append(last, answer[:-1]), len(prompt), place + 1, branch + 1)
                    self._score(batch, row, right, pair["labels"][branch], 2 * (row * number + place) + branch)
        return batch

    def _fill_separate(self, pairs: list[dict]) -> dict[str, np.ndarray]:
        bucket = self._choose_bucket(max(len(pair["prompt"]) + max(map(len, pair["answers"])) for pair in pairs))
        batch = self._empty(2 * len(pairs), bucket, len(pairs))
        batch["attention_mask"] = np.zeros_like(batch["input_ids"])
        for place, pair in enumerate(pairs):
            for branch, answer in enumerate(pair["answers"] if pair["index"] != NONE else ()):
                row, start = 2 * place + branch, len(pair["prompt"])
                tokens = np.append(pair["prompt"], answer)
                batch["input_ids"][row, : len(tokens)] = tokens
                batch["attention_mask"][row, : len(tokens)] = 1
                self._score(batch, row, start - 1, pair["labels"][branch], row)
        batch["attention_mask"][:, 0] = 1  # a row without a pair must not be without a key
        return batch

    def _choose_bucket(self, columns: int) -> Bucket:
        return next(bucket for bucket in self.layout.buckets if bucket.columns >= columns)

    def _empty(self, rows: int, bucket: Bucket, pairs: int) -> dict[str, np.ndarray]:
        return {
            "input_ids": np.full((rows, bucket.columns), self.pad_token_id),
            "targets": np.zeros((rows, bucket.scored), np.int64),
            "slots": np.full((rows, bucket.scored), no_slot(pairs)),
        }

    @staticmethod
    def _score(batch: dict[str, np.ndarray], row: int, column: int, labels: np.ndarray, slot: int) -> None:
        """The tokens from `column` on predict `labels`, where these are not IGNORED."""
        start = column - batch["input_ids"].shape[1] + batch["targets"].shape[1]
        places = start + np.flatnonzero(labels != IGNORED)
        batch["targets"][row, places] = labels[labels != IGNORED]
        batch["slots"][row, places] = slot


def _columns(pair: dict) -> int:
    return max(len(pair["prompt"]) - 1, 0) + sum(map(len, pair["answers"]))
