"""python -m pytest tests/test_packing.py"""

from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from align.data.packing import (
    IGNORED,
    NONE,
    BucketCollator,
    BucketSampler,
    PackedCollator,
    RowDataset,
    batches_per_bucket,
    best_fit_decreasing,
    bucket_stream,
    choose_buckets,
    pack_stream,
)

ROW_LENGTH = 24
some_lengths = st.lists(st.integers(1, ROW_LENGTH), min_size=1, max_size=60)
quickly = settings(max_examples=60, deadline=None)


def make_samples(lengths: list[int]) -> Dataset:
    """Every token is one of a kind; the second half of each sample is trained on."""
    ids = np.split(np.arange(1, sum(lengths) + 1), np.cumsum(lengths)[:-1])
    rows = [
        {"input_ids": row.tolist(), "labels": [IGNORED] * (len(row) // 2) + row[len(row) // 2 :].tolist()}
        for row in ids
    ]
    return Dataset.from_list([{**row, "length": len(row["input_ids"])} for row in rows])


def split_segments(row: dict) -> list[dict]:
    """The samples in a packed row, by its segment ids."""
    ids = np.asarray(row["segment_ids"])
    return [
        {name: np.asarray(row[name])[ids == segment].tolist() for name in row} for segment in range(1, max(ids) + 1)
    ]


def assert_rows_hold_the_samples(rows: list[dict], samples: Dataset) -> None:
    """No token lost, none twice, order kept, positions restarted, every label where it belongs."""
    segments = sorted((segment for row in rows for segment in split_segments(row)), key=lambda s: s["input_ids"])
    assert [segment["input_ids"] for segment in segments] == samples["input_ids"]
    assert [segment["labels"] for segment in segments] == [[IGNORED, *labels[1:]] for labels in samples["labels"]]
    assert all(segment["position_ids"] == list(range(len(segment["input_ids"]))) for segment in segments)
    assert all(len(row["input_ids"]) <= ROW_LENGTH for row in rows)


def count_rows_one_sample_at_a_time(lengths: list[int]) -> int:
    """Best fit decreasing as the textbook has it."""
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in free if space >= length]
        if fitting:
            free.remove(min(fitting))
        free.append((min(fitting) if fitting else ROW_LENGTH) - length)
    return len(free)


@given(some_lengths, st.integers(0, 3))
@quickly
def test_packed_rows_hold_every_sample_once_and_whole(lengths, seed):
    samples = make_samples(lengths)
    packed = RowDataset(samples.select(np.random.default_rng(seed).permutation(len(samples))), ROW_LENGTH, seed)
    assert_rows_hold_the_samples(packed.__getitems__(list(range(len(packed)))), samples)


@given(some_lengths, st.integers(1, 20))
@quickly
def test_a_packed_stream_holds_every_sample_once_and_whole(lengths, window):
    samples = make_samples(lengths)
    assert_rows_hold_the_samples(list(pack_stream(samples.to_iterable_dataset(), ROW_LENGTH, window)), samples)


@given(some_lengths)
@quickly
def test_packing_needs_the_rows_that_the_textbook_needs(lengths):
    assert len(best_fit_decreasing(np.array(lengths), ROW_LENGTH)) == count_rows_one_sample_at_a_time(lengths)


@pytest.mark.parametrize("median", [60, 150, 400])
def test_packing_long_tailed_lengths_wastes_little(median):
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(median), 0.8, 5000).astype(int), 8, 512)
    rows = best_fit_decreasing(lengths, 512)
    assert lengths.sum() / (len(rows) * 512) >= (0.985 if median < 400 else 0.9)


def test_the_seed_decides_which_samples_meet():
    first, again, other = (best_fit_decreasing(np.full(100, 8), 24, seed).members.tolist() for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("length", [0, 25])
def test_a_sample_that_no_row_can_hold_is_refused(length):
    with pytest.raises(ValueError, match="lengths must be 1 to 24"):
        best_fit_decreasing(np.array([3, length]), 24)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 4), st.sampled_from([1, 4]))
@quickly
def test_no_other_buckets_waste_less(lengths, num_buckets, multiple_of):
    def padded_tokens(buckets):
        return sum(min(bucket for bucket in buckets if bucket >= length) for length in lengths)

    chosen = choose_buckets(np.array(lengths), num_buckets, 12, multiple_of)

    widths = range(multiple_of, 13, multiple_of)
    others = [set_ for n in range(1, num_buckets + 1) for set_ in combinations(widths, n) if set_[-1] >= max(lengths)]
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= num_buckets
    assert padded_tokens(chosen) == min(map(padded_tokens, others))


def test_no_bucket_is_longer_than_the_limit():
    assert choose_buckets(np.array([5, 100]), 2, 100, 8) == [8, 100]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 8), st.integers(0, 3))
@quickly
def test_a_batch_comes_from_one_bucket_and_every_sample_once(groups, batch_size, epoch):
    sampler = BucketSampler(np.array(groups), batch_size)
    sampler.set_epoch(epoch)
    order = list(sampler)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mixed = sum(len({groups[i] for i in batch if i != NONE}) > 1 for batch in batches)
    assert sorted(i for i in order if i != NONE) == list(range(len(groups)))
    assert order == list(sampler)
    assert len(order) == len(sampler) == len(batches) * batch_size
    assert mixed < len(set(groups))  # only what was left of one bucket joins the next
    assert NONE not in order[:-batch_size]


def test_each_epoch_has_its_own_order_and_evaluation_none():
    sampler, plain = BucketSampler(np.zeros(52), 4), BucketSampler(np.zeros(52), 4, shuffle=False)
    first = list(sampler)
    sampler.set_epoch(1)
    assert sorted(first) == sorted(sampler) == list(plain) == list(range(52))
    assert first != list(sampler) != list(plain)


@pytest.mark.parametrize("ranks", [1, 2])
def test_resuming_in_a_later_epoch_continues_with_the_next_row(ranks):
    def load(epoch: int, skip: int) -> list[list[int]]:
        loader = DataLoader(range(40), 4, sampler=BucketSampler(np.zeros(40), 4 * ranks), collate_fn=list)
        loader = prepare_data_loader(loader, num_processes=ranks, process_index=ranks - 1)
        loader.set_epoch(epoch)  # as the trainer does
        return list(skip_first_batches(loader, skip) if skip else loader)

    assert load(epoch=1, skip=2) == load(epoch=1, skip=0)[2:]
    assert load(epoch=1, skip=0) != load(epoch=0, skip=0)


def test_all_ranks_compute_the_same_shape_in_a_step():
    lengths = np.random.default_rng(0).integers(1, ROW_LENGTH + 1, 64)
    buckets = choose_buckets(lengths, 4, ROW_LENGTH, 1)
    sampler = BucketSampler(np.searchsorted(buckets, lengths), 8)
    loaders = [
        prepare_data_loader(DataLoader(lengths, 4, sampler=sampler, collate_fn=list), num_processes=2, process_index=i)
        for i in range(2)
    ]
    steps = [[np.searchsorted(buckets, max(batch)) for batch in loader] for loader in loaders]
    unequal = sum(one != other for one, other in zip(*steps, strict=True))
    assert set(steps[0]) == {0, 1, 2, 3}
    assert unequal < 4  # only where what was left of one bucket joined the next


def test_two_ranks_share_an_epoch_without_repeating_a_row():
    rows = RowDataset(make_samples([20] * 9), ROW_LENGTH)
    sampler = BucketSampler(np.zeros(9), 4, shuffle=False)
    collator = PackedCollator.for_sft(2, ROW_LENGTH, pad_token_id=0)
    seen, steps = [], []
    for rank in range(2):
        loader = DataLoader(rows, 2, sampler=sampler, collate_fn=collator)
        batches = list(prepare_data_loader(loader, num_processes=2, process_index=rank))
        seen += [token for batch in batches for token in batch["input_ids"][batch["segment_ids"] > 0].tolist()]
        steps.append([tuple(batch["input_ids"].shape) for batch in batches])
    assert sorted(seen) == list(range(1, 181))
    assert steps == [[(2, ROW_LENGTH)] * 3] * 2


@pytest.mark.parametrize("num_samples", [40, 43])
def test_a_bucketed_epoch_computes_the_announced_shapes(num_samples):
    lengths = np.random.default_rng(num_samples).integers(1, ROW_LENGTH + 1, num_samples)
    samples, buckets = RowDataset(make_samples(lengths.tolist())), choose_buckets(lengths, 3, ROW_LENGTH, 4)
    loader = DataLoader(
        samples,
        4,
        sampler=BucketSampler(np.searchsorted(buckets, lengths), 4),
        collate_fn=BucketCollator(4, buckets, 0),
    )
    batches = list(loader)
    shapes = Counter(tuple(batch["input_ids"].shape) for batch in batches)
    tokens = sorted(token for batch in batches for token in batch["input_ids"].flatten().tolist() if token)
    assert shapes == {(4, bucket): n for bucket, n in batches_per_bucket(lengths, buckets, 4).items()}
    assert tokens == list(range(1, lengths.sum() + 1))
    for batch in batches:
        own, real = batch["attention_mask"] > 0, batch["input_ids"] > 0
        assert own[real.any(dim=1)].equal(real[real.any(dim=1)])


def test_a_row_without_tokens_has_one_key():
    batch = BucketCollator(2, [8], 0)([{"input_ids": [], "labels": []}, {"input_ids": [5, 6], "labels": [5, 6]}])
    assert batch["attention_mask"].tolist() == [[1, *[0] * 7], [1, 1, *[0] * 6]]
    assert batch["labels"].tolist() == [[IGNORED] * 8, [IGNORED, 6, *[IGNORED] * 6]]  # no token predicts the first


@pytest.mark.parametrize(
    ("row_length", "hardest"),
    [(ROW_LENGTH, [{20, 4}]), (None, [{ROW_LENGTH}, {9}])],  # packed: the longest sample with company
)
def test_the_rows_that_a_probe_tries_hold_long_samples(row_length, hardest):
    rows = RowDataset(make_samples([4, 9, ROW_LENGTH, 20, 7]), row_length)
    lengths = [set(rows.lengths[rows.rows[index]].tolist()) for index in rows.hardest()]
    assert lengths == hardest


def test_a_partial_batch_keeps_its_shape_and_its_loss():
    packed = RowDataset(make_samples([20, 4, 9]), ROW_LENGTH)
    batch = PackedCollator.for_sft(4, ROW_LENGTH, pad_token_id=99)([packed[0], packed[1]])
    assert all(column.shape == (4, ROW_LENGTH) for column in batch.values())
    assert batch["input_ids"][2:].unique().tolist() == [99]
    assert batch["labels"][2:].unique().tolist() == [IGNORED]
    assert batch["segment_ids"].bool().sum() == 33


def test_a_stream_in_buckets_keeps_its_samples_and_groups_them():
    lengths = np.random.default_rng(0).integers(1, ROW_LENGTH + 1, 64).tolist()
    samples = make_samples(lengths)
    ordered = list(bucket_stream(samples.to_iterable_dataset(), [8, 16, 24], batch_size=4, window=30))
    batches = [ordered[start : start + 4] for start in range(0, 64, 4)]
    shapes = [{np.searchsorted([8, 16, 24], len(sample["labels"])) for sample in batch} for batch in batches]
    assert sorted(sample["input_ids"] for sample in ordered) == samples["input_ids"]
    assert sum(len(shape) > 1 for shape in shapes) <= 4  # at most two a window
    assert sorted(sample["input_ids"] for sample in ordered[:32]) == samples["input_ids"][:32]  # whole batches a window


def test_a_stream_in_buckets_has_an_order_that_the_seed_fixes():
    samples = make_samples(np.random.default_rng(0).integers(1, ROW_LENGTH + 1, 64).tolist())

    def order(seed):
        ordered = bucket_stream(samples.to_iterable_dataset(), [8, 16, 24], batch_size=4, window=30, seed=seed)
        return [sample["input_ids"] for sample in ordered]

    assert order(0) == order(0) != order(1)


def test_packing_in_loader_workers_gives_the_same_batches():
    packed = RowDataset(make_samples([5, 9, 13, 20, 3, 7, 24, 1] * 4), ROW_LENGTH)
    collator = PackedCollator.for_sft(2, ROW_LENGTH, pad_token_id=0)
    here, there = (
        [batch["input_ids"].tolist() for batch in DataLoader(packed, 2, collate_fn=collator, num_workers=n)]
        for n in (0, 2)
    )
    assert here == there


def test_rows_that_were_read_do_not_stay_in_memory(tmp_path):
    """The cache is mapped: without care, a run holds all of it in the end."""

    def measure_held() -> int:
        areas = Path("/proc/self/smaps").read_text(encoding="utf-8").split(str(tmp_path))[1:]
        return sum(int(area.split("Rss:")[1].split()[0]) for area in areas)  # KiB

    make_samples([1000] * 2000).save_to_disk(tmp_path / "rows")
    (tmp_path / "link").symlink_to(tmp_path / "rows")
    rows = RowDataset(Dataset.load_from_disk(tmp_path / "link"))
    held = []
    for batch in np.arange(2000).reshape(-1, 20).tolist():
        for number, row in zip(batch, rows.__getitems__(batch), strict=True):
            assert row["input_ids"].tolist() == list(range(1000 * number + 1, 1000 * number + 1001))
        held.append(measure_held())
    whole = sum(file.stat().st_size for file in tmp_path.glob("rows/*.arrow")) / 1024
    assert 0 < max(held) < whole / 2


def test_no_epoch_goes_from_short_batches_to_long_ones_or_from_full_rows_to_others():
    bucket_of = np.repeat(np.arange(4), 32)
    order = bucket_of[list(BucketSampler(bucket_of, batch_size=8))]
    assert (np.diff(order) < 0).any()
    stream = make_samples([ROW_LENGTH, 20, 16, 13] * 8).to_iterable_dataset()
    sizes = [len(row["input_ids"]) for row in pack_stream(stream, ROW_LENGTH)]
    assert (np.diff(sizes) > 0).any()
    assert (np.diff(sizes) < 0).any()


def test_the_row_that_a_probe_gets_has_a_long_sample_beside_others():
    rows = RowDataset(make_samples([20, 4, 12, 12, 24]), ROW_LENGTH)
    (hardest,) = rows.hardest()
    assert sorted(rows.lengths[rows.rows[hardest]]) == [4, 20]
