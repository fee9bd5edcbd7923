"""How the ranks of a run agree, and wait for one another."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.distributed.distributed_c10d import _get_default_store
from transformers import TrainingArguments

from align.errors import InputError

LOOKED_EVERY = 0.2  # seconds


def all_ranks(value: Any) -> list:
    """`value` of every rank, by rank."""
    return gather_object([value]) if _distributed() else [value]


def first_of_all_ranks(value: Any) -> Any:
    """The value of the first rank that has one, else None."""
    return next(filter(None, all_ranks(value)), None)


def on_rank_0(compute: Callable[[], Any]) -> Any:
    """What `compute()` gives on rank 0, for all ranks. An `InputError` there is raised on every rank."""
    outcome: Any = None
    if not _distributed() or torch.distributed.get_rank() == 0:
        try:
            outcome = compute()
        except InputError as error:
            outcome = error
    outcome = all_ranks(outcome)[0]
    if isinstance(outcome, InputError):
        raise outcome
    return outcome


def agree(compute: Callable[[], bool]) -> bool:
    """Whether `compute()` is true on all ranks; an `InputError` of one of them ends all."""
    outcome: Any
    try:
        outcome = compute()
    except InputError as error:
        outcome = error
    outcomes = all_ranks(outcome)
    for each in outcomes:
        if isinstance(each, InputError):
            raise each
    return all(outcomes)


@contextlib.contextmanager
def first_of_node_first(args: TrainingArguments, work: str) -> Iterator[None]:
    """Runs the block on each node's first rank, then on the others, which find its cache. No rank leaves earlier.

    `TrainingArguments.main_process_first` waits in a collective, which ends a run after `--ddp_timeout`. The store
    where the ranks have met has no such limit. `work` is a name that no other block has.
    """
    if not _distributed():
        yield
        return
    store = _get_default_store()

    def wait_for(key: str) -> None:
        while not store.check([key]):
            time.sleep(LOOKED_EVERY)

    node = args.process_index - args.local_process_index
    if args.local_process_index > 0:
        wait_for(f"{work}/node {node}")
    try:
        yield
    finally:
        if args.local_process_index == 0:  # if it failed, the others find the same error
            store.set(f"{work}/node {node}", "done")
    if store.add(f"{work}/ranks", 1) == args.world_size:
        store.set(f"{work}/all", "done")
    wait_for(f"{work}/all")


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
