"""Rows and batches of few static shapes with little padding: a new shape costs a Gaudi a graph compilation.

Packing puts whole samples side by side into rows of one length (one shape in all); buckets pad samples of similar
length to one of a few. Everything here is numpy: a torch operation on the CPU in a collator would count as a graph.
"""

import ctypes
import mmap
import os
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
import torch

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset

IGNORED = -100  # the label that cross entropy leaves out
KEPT_READS = 4  # batches whose pages of the cache stay in memory
NONE = -1  # the index of no row, to fill up a batch


def take(values: np.ndarray, indices: np.ndarray, nothing: int) -> np.ndarray:
    """`values[indices]`, and `nothing` where an index is `NONE`."""
    taken = values[np.maximum(indices, 0)]
    taken[indices == NONE] = nothing
    return taken


@dataclass(frozen=True)
class SampleRows:
    """Which samples share a row: row r holds `members[starts[r] : starts[r + 1]]`. Flat, as there may be millions."""

    members: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.members[self.starts[row] : self.starts[row + 1]]


def best_fit_decreasing(lengths: np.ndarray, row_length: int, seed: int = 0) -> SampleRows:
    """Assigns each sample, longest first, to the row that it leaves the fewest free tokens in; none is split.

    Samples of one length are alike, so rows with the same content are handled as one kind: the work grows with the
    number of distinct lengths, not of samples. `seed` decides which of the equally long samples goes where.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= row_length:
        raise ValueError(f"lengths must be 1 to {row_length}, got {lengths.min()} to {lengths.max()}")
    counts = np.bincount(lengths, minlength=1)

    kinds: dict[int, list[tuple[int, tuple]]] = {}  # free tokens -> [(number of rows, ((length, times), ...)), ...]
    free: list[int] = []  # the keys of kinds, sorted

    def add_kind(space: int, number: int, content: tuple) -> None:
        if space not in kinds:
            insort(free, space)
        kinds.setdefault(space, []).append((number, content))

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            tightest = bisect_left(free, length)
            if tightest < len(free):
                space = free[tightest]
                number, content = kinds[space].pop()
                if not kinds[space]:
                    del kinds[space], free[tightest]
            else:
                space, number, content = row_length, -(-left // (row_length // length)), ()
            times = space // length  # a row that took one sample is the tightest fit for the next
            full = min(number, left // times)
            if full:
                add_kind(space - times * length, full, (*content, (length, times)))
                number, left = number - full, left - full * times
            if number and left:
                add_kind(space - left * length, 1, (*content, (length, left)))
                number, left = number - 1, 0
            if number:
                add_kind(space, number, content)

    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    taken = np.cumsum(counts) - counts  # where the next unused sample of each length stands in order
    members, sizes = [np.empty(0, np.int64)], [np.zeros(1, np.int64)]
    for number, content in (kind for space in free for kind in kinds[space]):
        columns = []
        for length, times in content:
            columns.append(order[taken[length] : taken[length] + number * times].reshape(number, times))
            taken[length] += number * times
        table = np.concatenate(columns, axis=1)
        members.append(table.ravel())
        sizes.append(np.full(number, table.shape[1]))
    return SampleRows(np.concatenate(members), np.cumsum(np.concatenate(sizes)))


def _join(input_ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """One row from samples that stand end to end: positions restart and segments count up from 1 with each sample.

    Samples a1 a2 a3 and b1 b2, and what each token sees once the collator has padded the row:

        input_ids     a1  a2  a3  b1  b2   .  .         a1  x
        labels         -  a2  a3   -  b2   -  -         a2  x  x
        position_ids   0   1   2   0   1   0  0         a3  x  x  x
        segment_ids    1   1   1   2   2   0  0         b1           x
                                                        b2           x  x

    Each first label is ignored: no token of the sample predicts it (and the trainer counts it as if one did).
    """
    starts = np.cumsum(lengths) - lengths
    labels = labels.copy()
    labels[starts] = IGNORED
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": np.arange(len(input_ids)) - np.repeat(starts, lengths),
        "segment_ids": np.repeat(np.arange(1, len(lengths) + 1), lengths),
    }


def read_column(samples: "Dataset", name: str) -> "pa.ChunkedArray":
    """A whole column `[samples]`; `samples[name]` would make a Python object of each value, or a table of each row."""
    column = samples.data.column(name)
    return column if samples._indices is None else pc.take(column, samples._indices.column(0))


def read_numbers(samples: "Dataset", name: str) -> np.ndarray:
    """A whole column of numbers `[samples]`, int64."""
    return read_column(samples, name).to_numpy().astype(np.int64)


def drop_pages(samples: "Dataset") -> None:
    """Takes what was read of the mapped cache out of this process's memory, where it would stay; nothing is lost."""
    files = {os.path.realpath(file["filename"]) for file in samples.cache_files}
    if not files:
        return
    libc = ctypes.CDLL(None)
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as areas:
        for addresses, *_, path in (area.rstrip("\n").split(maxsplit=5) for area in areas):
            if path in files:
                start, end = (int(address, 16) for address in addresses.split("-"))
                size = ctypes.c_size_t(end - start)
                libc.madvise(ctypes.c_void_p(start), size, mmap.MADV_DONTNEED)


class MappedDataset(torch.utils.data.Dataset):
    """Rows over a data set whose cache is mapped: of what was read, some batches stay in memory and not all."""

    reads = 0

    def forget(self, samples: "Dataset") -> None:
        """To be called after each batch that was read of `samples`."""
        self.reads += 1
        if self.reads % KEPT_READS == 0:
            drop_pages(samples)


class RowDataset(MappedDataset):
    """Rows over a data set with `input_ids`, `labels` and `length`: packed, or without `row_length` one to a sample.

    A row is put together when it is asked for: nothing is written and nothing but the plan is kept in memory.
    """

    def __init__(self, samples: "Dataset", row_length: int | None = None, seed: int = 0):
        self.lengths = read_numbers(samples, "length")
        single = SampleRows(np.arange(len(self.lengths)), np.arange(len(self.lengths) + 1))
        self.rows = best_fit_decreasing(self.lengths, row_length, seed) if row_length else single
        self.samples = samples.select_columns(["input_ids", "labels"]).with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def hardest(self) -> list[int]:
        """The packed row with the longest sample beside others; without packing, the longest sample and a short one."""
        longest = np.maximum.reduceat(self.lengths[self.rows.members], self.rows.starts[:-1])
        shared = np.diff(self.rows.starts) > 1
        if shared.any():
            return [int(np.argmax(longest * shared))]
        order = np.argsort(longest, kind="stable")
        return [int(order[-1]), int(order[len(order) // 2])]

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[dict[str, np.ndarray]]:
        """Arrow gathers the samples of a whole batch at once, already end to end. `NONE` gives a row without tokens."""
        members = [self.rows[row] if row != NONE else self.rows.members[:0] for row in rows]
        table: pa.Table = self.samples[np.concatenate(members)]
        input_ids, labels = (table[name].combine_chunks().flatten().to_numpy() for name in ("input_ids", "labels"))
        ends = np.cumsum([self.lengths[samples].sum() for samples in members])[:-1]
        parts = zip(np.split(input_ids, ends), np.split(labels, ends), members, strict=True)
        self.forget(self.samples)
        return [_join(ids, row_labels, self.lengths[samples]) for ids, row_labels, samples in parts]


def pack_stream(stream: "IterableDataset", row_length: int, window: int = 1000, seed: int = 0) -> "IterableDataset":
    """Packs each `window` consecutive samples of a stream, so that skipping rows finds the same ones again."""

    def pack_window(samples: dict[str, list], indices: list[int]) -> dict[str, list]:
        lengths = np.array([len(ids) for ids in samples["input_ids"]])
        rows = best_fit_decreasing(lengths, row_length, seed)
        packed = []
        for row in np.random.default_rng([seed, indices[0]]).permutation(len(rows)):
            ids, labels = (np.concatenate([samples[name][i] for i in rows[row]]) for name in ("input_ids", "labels"))
            packed.append(_join(ids, labels, lengths[rows[row]]))
        return {name: [row[name] for row in packed] for name in packed[0]}

    return _map_windows(stream, pack_window, window)


def choose_buckets(lengths: np.ndarray, num_buckets: int, longest: int, multiple_of: int = 8) -> list[int]:
    """The at most `num_buckets` lengths that cost the fewest tokens when each sample is padded to the next of them.

    Exact, by dynamic programming over the histogram of lengths. They are multiples of `multiple_of`, but none exceeds
    `longest`, the limit that the samples themselves keep.
    """
    lengths = np.asarray(lengths)
    if num_buckets < 1 or not len(lengths) or not 1 <= lengths.min() <= lengths.max() <= longest:
        raise ValueError(f"no {num_buckets} buckets up to {longest} for {len(lengths)} samples")
    widths = np.minimum(-(-lengths // multiple_of) * multiple_of, longest)
    widths, counts = np.unique(widths, return_counts=True)
    shorter = np.concatenate([[0], np.cumsum(counts)])  # samples that the first i widths hold
    cost = np.full(len(widths) + 1, np.inf)  # of the samples in the first i widths with the buckets so far
    cost[0] = 0
    previous = []
    for _ in range(min(num_buckets, len(widths))):
        # [i, j]: width i is a bucket and takes everything after the first j widths, which have theirs already
        table = cost[:-1] + widths[:, None] * (shorter[1:, None] - shorter[:-1])
        table[np.triu_indices(len(widths), 1)] = np.inf
        previous.append(np.argmin(table, axis=1))
        cost = np.concatenate([[0], np.min(table, axis=1)])
    buckets, last = [], len(widths)
    for choice in reversed(previous):
        if last:
            buckets.append(int(widths[last - 1]))
            last = choice[last - 1]
    return buckets[::-1]


def _order_by_bucket(bucket_of: np.ndarray, batch_size: int, rng: np.random.Generator | None) -> np.ndarray:
    """All samples, such that each `batch_size` in a row share a bucket; the last, partial batch is left short.

    What is left of a bucket joins the next one, which is longer. Without `rng` nothing is shuffled.
    """
    order = np.arange(len(bucket_of)) if rng is None else rng.permutation(len(bucket_of))
    order = order[np.argsort(bucket_of[order], kind="stable")]
    batches, left = [], order[:0]
    for members in np.split(order, np.flatnonzero(np.diff(bucket_of[order])) + 1):
        members = np.concatenate([left, members])
        full = len(members) // batch_size * batch_size
        batches.append(members[:full].reshape(-1, batch_size))
        left = members[full:]
    batches = np.concatenate(batches)
    if rng is not None and bucket_of.any():  # one bucket is shuffled already, however it is cut
        rng.shuffle(batches)
    return np.concatenate([batches.ravel(), left])


class BucketSampler(torch.utils.data.Sampler):
    """Every row once an epoch, in an order that seed and epoch fix, in batches from one bucket.

    `bucket_of` has the number of each row's bucket, from short to long (all zeros for packed rows). `batch_size` counts
    the rows of all ranks in a step, so every rank computes the same shape; only what is left of one bucket may join the
    next. The last batch is filled up with `NONE`: no rank is left without a batch, and no row is repeated.
    """

    def __init__(self, bucket_of: np.ndarray, batch_size: int, seed: int = 0, shuffle: bool = True):
        self.bucket_of, self.batch_size, self.seed, self.shuffle = np.asarray(bucket_of), batch_size, seed, shuffle
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.bucket_of) // self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch]) if self.shuffle else None
        yield from _order_by_bucket(self.bucket_of, self.batch_size, rng).tolist()
        yield from [NONE] * (len(self) - len(self.bucket_of))

    def set_epoch(self, epoch: int) -> None:
        """Never backwards: on a resume accelerate 1.10.1 (`skip_first_batches`) starts a copied loader at epoch 0."""
        self.epoch = max(self.epoch, epoch)


def bucket_stream(
    stream: "IterableDataset", buckets: Sequence[int], batch_size: int, window: int = 1000, seed: int = 0
) -> "IterableDataset":
    """Reorders each `window` consecutive samples (rounded up to whole batches) so that a batch is of one bucket."""

    def bucket_window(samples: dict[str, list], indices: list[int]) -> dict[str, list]:
        lengths = [len(ids) for ids in samples["input_ids"]]
        rng = np.random.default_rng([seed, indices[0]])
        order = _order_by_bucket(np.searchsorted(buckets, lengths), batch_size, rng)
        return {name: [column[i] for i in order] for name, column in samples.items()}

    return _map_windows(stream, bucket_window, -(-window // batch_size) * batch_size)


def _map_windows(stream: "IterableDataset", function: Callable, window: int) -> "IterableDataset":
    columns = ["input_ids", "labels"]
    options = {"batched": True, "batch_size": window, "with_indices": True, "remove_columns": columns}
    return stream.select_columns(columns).map(function, **options)


def batches_per_bucket(lengths: np.ndarray, buckets: Sequence[int], batch_size: int) -> dict[int, int]:
    """How many batches an epoch of `BucketSampler` computes at each length: its shapes, and what they cost."""
    bucket_of = np.searchsorted(buckets, lengths)
    order = _order_by_bucket(bucket_of, batch_size, None)
    longest = np.maximum.reduceat(bucket_of[order], np.arange(0, len(order), batch_size))
    return {buckets[bucket]: number for bucket, number in zip(*np.unique(longest, return_counts=True), strict=True)}


def _stack(rows: Sequence[Sequence[int]], batch_size: int, width: int, padding: int) -> np.ndarray:
    """`[batch_size, width]`, each row at the left; missing rows and what follows a row are padding."""
    stacked = np.full((batch_size, width), padding, np.int64)
    for line, row in zip(stacked, rows, strict=False):
        line[: len(row)] = row
    return stacked


@dataclass(frozen=True)
class PackedCollator:
    """Packed rows to a batch of one shape; a stream's last batch is filled up with rows that are padding (segment 0).

    `paddings` names the columns and what pads each of them.
    """

    batch_size: int
    row_length: int
    paddings: dict[str, int]

    @classmethod
    def for_sft(cls, batch_size: int, row_length: int, pad_token_id: int) -> "PackedCollator":
        paddings = {"input_ids": pad_token_id, "labels": IGNORED, "position_ids": 0, "segment_ids": 0}
        return cls(batch_size, row_length, paddings)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        return {
            name: torch.from_numpy(_stack([row[name] for row in rows], self.batch_size, self.row_length, padding))
            for name, padding in self.paddings.items()
        }


@dataclass(frozen=True)
class BucketCollator:
    """Samples to a batch padded to the next bucket; a stream's last batch is filled up with rows that are padding."""

    batch_size: int
    buckets: Sequence[int]
    pad_token_id: int

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        input_ids = [sample["input_ids"] for sample in samples]
        longest = max(len(ids) for ids in input_ids)
        width = self.buckets[np.searchsorted(self.buckets, longest)]
        seen = [np.ones(max(1, len(ids))) for ids in input_ids]  # no row is left without a key
        batch = {
            "input_ids": _stack(input_ids, self.batch_size, width, self.pad_token_id),
            "attention_mask": _stack(seen, self.batch_size, width, 0),
            "labels": _stack([sample["labels"] for sample in samples], self.batch_size, width, IGNORED),
        }
        batch["labels"][:, 0] = IGNORED  # no token predicts the first
        return {name: torch.from_numpy(values) for name, values in batch.items()}
