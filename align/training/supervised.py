"""Fine-tuning batches of few shapes, and the trainer that computes the right loss on them."""

import copy
import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from optimum.habana.trl import GaudiSFTTrainer

from align.data.packing import (
    IGNORED,
    BucketCollator,
    BucketSampler,
    PackedCollator,
    RowDataset,
    batches_per_bucket,
    bucket_stream,
    choose_buckets,
    pack_stream,
    read_numbers,
)
from align.data.preparing import Prepared
from align.errors import InputError
from align.models.head import find_head, look_up_as_stored, records_graphs, shift
from align.training.rows import RowsMixin
from align.upstream_fixes import RightScaleMixin, smoothed_loss

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batches:
    """Rows, what makes batches of them, and the number of each row's bucket, which a batch does not mix."""

    rows: RowDataset | IterableDataset
    collator: PackedCollator | BucketCollator
    bucket_of: np.ndarray | None

    def take_row(self) -> dict[str, torch.Tensor]:
        """The row `[T]` that is hardest to compute right: with long samples side by side, or with much padding."""
        if not isinstance(self.rows, RowDataset):  # a stream: its first rows
            rows = [{name: np.asarray(ids) for name, ids in row.items()} for row in self.rows.take(2)]
        else:
            rows = [self.rows[index] for index in self.rows.hardest()]
        batch = dataclasses.replace(self.collator, batch_size=len(rows))(rows)
        return {name: ids[-1] for name, ids in batch.items()}


def find_longest(prepared: Mapping[str, Prepared], limit: int) -> int:
    """Tokens of the longest sample; those of a stream, which nobody has read, may have as many as `limit`."""
    rows = [part.rows for part in prepared.values()]
    return max(
        int(read_numbers(each, "length").max(initial=0)) if isinstance(each, Dataset) else limit for each in rows
    )


def make_all_batches(
    prepared: Mapping[str, Prepared], args, num_buckets: int, pad_token_id: int, packing: bool
) -> dict[str, Batches]:
    """`make_batches` of each split."""
    sizes = {"train": args.per_device_train_batch_size, "validation": args.per_device_eval_batch_size}
    return {
        name: make_batches(part.rows, name, args, sizes[name], packing, num_buckets, pad_token_id)
        for name, part in prepared.items()
    }


def make_batches(
    samples: Dataset | IterableDataset,
    name: str,
    args,
    batch_size: int,
    packing: bool,
    num_buckets: int,
    pad_token_id: int,
) -> Batches:
    """Packs samples into rows of --max_seq_length, or pads them to at most `num_buckets` lengths, and logs the waste.

    `batch_size` is one device's. With --pad_max every sample is padded to --max_seq_length.
    """
    longest, seed = args.max_seq_length, args.seed
    stream = isinstance(samples, IterableDataset)
    if packing:
        rows = pack_stream(samples, longest, seed=seed) if stream else RowDataset(samples, longest, seed)
        bucket_of = None if stream else np.zeros(len(rows), np.int64)
        collator = PackedCollator.for_sft(batch_size, longest, pad_token_id)
        if not stream:
            _log_waste(name, int(rows.lengths.sum()), {longest: -(-len(rows) // batch_size)}, batch_size)
        return Batches(rows, collator, bucket_of)
    lengths: Any = None if stream else read_numbers(samples, "length")
    if args.pad_max or (stream and args.world_size > 1):  # of a stream accelerate joins all ranks' batches: one shape
        buckets = [longest]
    elif stream:  # nobody knows its lengths yet
        buckets = sorted({longest * number // num_buckets for number in range(1, num_buckets + 1)} - {0})
    else:
        buckets = choose_buckets(lengths, num_buckets, longest)
    bucketed = BucketCollator(batch_size, buckets, pad_token_id)
    if stream:
        return Batches(bucket_stream(samples, buckets, batch_size, seed=seed), bucketed, None)
    _log_waste(name, int(lengths.sum()), batches_per_bucket(lengths, buckets, batch_size), batch_size)
    return Batches(RowDataset(samples), bucketed, np.searchsorted(buckets, lengths))


def _log_waste(name: str, tokens: int, batches: dict[int, int], batch_size: int) -> None:
    computed = sum(length * number for length, number in batches.items()) * batch_size
    shapes = ", ".join(f"[{batch_size}, {length}]" for length in batches)
    logger.info(f"{name}: {tokens / computed:.1%} of the computed tokens are useful; shapes: {len(batches)} ({shapes})")


class SupervisedTrainer(RowsMixin, RightScaleMixin, GaudiSFTTrainer):
    """GaudiSFTTrainer on `Batches`: packed samples do not see each other, and every token of a loss weighs the same."""

    def __init__(self, *, args, train: Batches | None, validation: Batches | None, **kwargs):
        self.batches: Any = {"train": train, "eval": validation}
        args = copy.copy(args)
        args.packing = False  # the batches are packed already, and not as optimum-habana would
        super().__init__(
            args=args,
            train_dataset=train and train.rows,
            eval_dataset=validation and validation.rows,
            data_collator=next(filter(None, (train, validation))).collator,
            **kwargs,
        )
        self.compute_loss_func = self._smoothed_loss if args.label_smoothing_factor else None
        look_up_as_stored(self.model)
        with self.compute_loss_context_manager():
            self.head = None if self.compute_loss_func else find_head(self.model, args.device, records_graphs(args))

    @property
    def longest(self) -> int:
        return self.args.max_seq_length

    def complete(self, metrics: Mapping[str, float]) -> dict[str, float]:
        more = {"perplexity": math.exp(min(metrics["eval_loss"], 700))} if "eval_loss" in metrics else {}
        return {**metrics, **more}

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def _get_train_sampler(self, train_dataset=None):
        bucket_of = self.batches["train"].bucket_of
        world = self.args.world_size
        return None if bucket_of is None else BucketSampler(bucket_of, self._train_batch_size * world, self.args.seed)

    def _get_eval_sampler(self, eval_dataset):
        bucket_of = self.batches["eval"].bucket_of
        size = self.args.eval_batch_size * self.args.world_size
        return None if bucket_of is None else BucketSampler(bucket_of, size, shuffle=False)

    def get_eval_dataloader(self, eval_dataset=None):
        for_training, self.data_collator = self.data_collator, self.batches["eval"].collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = for_training

    def without_loss(self, batch):
        return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}

    def describe_rows(self, batch):
        """Takes a packed row apart into its samples; those of a stream have no number."""
        for place, ids in enumerate(batch["input_ids"].cpu().numpy()):
            segments = batch.get("segment_ids", batch.get("attention_mask"))[place].cpu().numpy()
            for segment in np.unique(segments[segments > 0]):
                sample = ids[segments == segment]
                yield {
                    "row": self._find_sample(sample),
                    "text": self.processing_class.decode(sample),
                    "input_ids": sample.tolist(),
                }

    def _find_sample(self, ids: np.ndarray) -> int | None:
        """The number of that sample among the training samples."""
        rows = self.batches["train"].rows
        if not isinstance(rows, RowDataset):
            return None
        alike = np.flatnonzero(rows.lengths == len(ids))
        found = (int(row) for row in alike if np.array_equal(rows.samples[[row]]["input_ids"][0].as_py(), ids))
        return next(found, None)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.head is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with self.head.scoring(shift(inputs["labels"])):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _smoothed_loss(self, outputs, labels, num_items_in_batch=None):
        share = self.args.label_smoothing_factor if self.model.training else 0.0  # evaluations measure what is true
        return smoothed_loss(outputs["logits"], labels, num_items_in_batch, share)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum().to(result[0].device)
        self.evaluated += torch.stack([torch.where(tokens > 0, result[0] * tokens, 0), tokens]).float()
        return result

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """Makes the loss of an evaluation the mean over its tokens, however they fell into batches and ranks."""
        self.evaluated = torch.zeros(2, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, tokens = self.accelerator.reduce(self.evaluated, "sum").tolist()
        if not tokens:
            raise InputError("--dataset_name: the validation rows hold no token to evaluate on")
        output.metrics[f"{metric_key_prefix}_loss"] = total / tokens
        return output
