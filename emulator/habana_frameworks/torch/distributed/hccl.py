"""The collective backend `hccl`, carried by gloo."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FunctionType

import torch.distributed as dist
from torch.distributed import distributed_c10d


def _create_gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def _finish(collective: Callable) -> Callable:
    """`collective` that has its result when it returns, also under `async_op`.

    A Gaudi orders what is computed after what is received, and DeepSpeed relies on it: it waits for no collective.
    """

    @functools.wraps(collective)
    def finished(*args, **kwargs):
        work = collective(*args, **kwargs)
        if work is not None and type(work) is not distributed_c10d._IllegalWork:  # a part of coalesced work
            work.wait()
        return work

    return finished


@contextlib.contextmanager
def _finish_coalesced(group=None, device=None, async_ops=False) -> Iterator:
    with _coalescing_manager(group, device, async_ops=False) as manager:
        yield manager


_coalescing_manager = distributed_c10d._coalescing_manager
distributed_c10d._coalescing_manager = dist._coalescing_manager = _finish_coalesced
for name, function in list(vars(distributed_c10d).items()):
    if type(function) is FunctionType and "async_op" in inspect.signature(function).parameters:
        setattr(distributed_c10d, name, _finish(function))
        if hasattr(dist, name):
            setattr(dist, name, getattr(distributed_c10d, name))
dist.Backend.register_backend("hccl", _create_gloo, devices=["cpu", "hpu"])
