"""The collective backend `hccl`, carried by gloo, with what a card refuses and rounds.

Read in distributed/hccl/process_group_hccl_base.cpp and backend/helpers/collective_utils.cpp.
"""

import contextlib
import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from habana_frameworks.emulator import dry
from habana_frameworks.emulator.placement import require_card, tensors_in

REDUCTIONS = (dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT)
FLOATS = (torch.float32, torch.bfloat16)
REDUCIBLE = (*FLOATS, torch.float64, torch.float16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)
# torchrun's variables, with Open MPI's
RANKS = {
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "RANK": "OMPI_COMM_WORLD_RANK",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
}
# What a card moves as float32: all but these types. In reduce_scatter of a list it turns nothing.
KEPT = dict.fromkeys(("all_reduce", "all_reduce_coalesced", "reduce"), FLOATS)
KEPT |= dict.fromkeys(
    ("reduce_scatter_tensor", "reduce_scatter_single", "_reduce_scatter_base", "all_to_all_single"),
    (*FLOATS, torch.int32, torch.int64),
)


def initialize_distributed_hpu(
    world_size: int | None = None, rank: int | None = None, local_rank: int | None = None
) -> tuple[int, int, int]:
    """World size, rank and local rank (distributed/hccl/__init__.py): as given, else torchrun's, else Open MPI's.

    They are 1, -1 and -1 where nobody says. Sets torchrun's variables and, among several ranks, the card's module.
    """
    given = dict(zip(RANKS, (world_size, rank, local_rank), strict=True))
    if None not in given.values():
        os.environ.update({name: str(value) for name, value in given.items()})
    elif not RANKS.keys() <= os.environ.keys() and set(RANKS.values()) <= os.environ.keys():
        os.environ.update({name: os.environ[theirs] for name, theirs in RANKS.items()})
    size, rank, local_rank = (int(os.environ.get(name, start)) for name, start in zip(RANKS, (1, -1, -1), strict=True))
    if local_rank != -1 and size > 1:
        modules = os.environ.get("HABANA_VISIBLE_MODULES", "0,1,2,3,4,5,6,7").split(",")
        os.environ.setdefault("HLS_MODULE_ID", modules[local_rank])
    return size, rank, local_rank


def _create_gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
    return dist.ProcessGroupGloo(store, rank, size, timeout)


class _UnderWay(threading.local):
    """`objects`: torch sends an object, whose bytes it moves to the card by itself.

    `coalesced`: what `_widen` returned of collectives that run together at the end of a context.
    """

    objects = False
    coalesced: list[tuple[torch.Tensor, torch.Tensor]] | None = None


_under_way = _UnderWay()


def _carry_objects(collective: Callable) -> Callable:
    @functools.wraps(collective)
    def carried(*args, **kwargs):
        before, _under_way.objects = _under_way.objects, True
        try:
            return collective(*args, **kwargs)
        finally:
            _under_way.objects = before

    return carried


def _as_a_card_does(collective: Callable, waits: bool) -> Callable:
    """`collective` with a card's refusals and types. `waits`: it has its result when it returns, also under `async_op`.

    A Gaudi orders what is computed after what is received, and DeepSpeed relies on it: it waits for no collective.
    """
    signature, name = inspect.signature(collective), collective.__name__

    @functools.wraps(collective)
    def wrapper(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        narrow = []
        if not dry.is_wanted and not _under_way.objects and _is_hccl(given.arguments.get("group")):
            _refuse(name, given)
            narrow = _widen(name, given)
        work = collective(*given.args, **given.kwargs)
        if _under_way.coalesced is not None:
            _under_way.coalesced += narrow
            return work
        if waits and hasattr(work, "wait"):
            work.wait()
        _narrow(narrow)
        return work

    return wrapper


def _is_hccl(group: dist.ProcessGroup | None) -> bool:
    return group is not dist.GroupMember.NON_GROUP_MEMBER and dist.get_backend(group) == "hccl"


def _refuse(name: str, given: inspect.BoundArguments) -> None:
    tensors = list(tensors_in(given.arguments.values()))
    require_card(name, *tensors)
    if name == "all_gather_coalesced":
        raise RuntimeError("ProcessGroupHcclBase does not support allgather_coalesced")
    if name in ("recv", "irecv") and {given.arguments.get("src"), given.arguments.get("group_src")} == {None}:
        raise RuntimeError("ProcessGroupHcclBase does not support recv")  # from any rank
    if "reduce" not in name and name not in KEPT:
        return
    if given.arguments.get("op", dist.ReduceOp.SUM) not in REDUCTIONS:
        raise RuntimeError("Unsupported ReduceOp for HCCL process group")
    for tensor in tensors:
        if tensor.dtype not in REDUCIBLE and not tensor.is_complex():
            raise RuntimeError(f"Input tensor data type is not supported for HCCL process group: {tensor.dtype}")


def _widen(name: str, given: inspect.BoundArguments) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Puts float32 copies in the place of tensors; returns which of them become results, with their copies.

    A card fills results on every rank, also where `reduce` leaves no sum: such a rank's own numbers are rounded there.
    """
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def widen(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [widen(item) for item in value]
        if value.dtype in KEPT[name] or value.is_complex():  # torch reduces complex numbers as pairs
            return value
        copies.append((value, value.float()))
        return copies[-1][1]

    if name not in KEPT:
        return []
    if "input" in given.arguments:
        given.arguments["input"] = widen(given.arguments["input"])
        copies.clear()
    for argument in {"tensor", "tensors", "output"} & given.arguments.keys():
        given.arguments[argument] = widen(given.arguments[argument])
    return copies


def _narrow(copies: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for tensor, wide in copies:
        tensor.copy_(wide)


@contextlib.contextmanager
def _finish_coalesced(group=None, device=None, async_ops=False) -> Iterator:
    _under_way.coalesced = narrow = []
    try:
        with _coalescing_manager(group, device, async_ops=False) as manager:
            yield manager
    finally:
        _under_way.coalesced = None
    _narrow(narrow)


_coalescing_manager = distributed_c10d._coalescing_manager
distributed_c10d._coalescing_manager = dist._coalescing_manager = _finish_coalesced
for name, function in list(vars(distributed_c10d).items()):
    if type(function) is not FunctionType:
        continue
    if "object" in name and "group" in inspect.signature(function).parameters:
        replacement = _carry_objects(function)
    elif "async_op" in inspect.signature(function).parameters:
        replacement = _as_a_card_does(function, waits=True)
    elif name in ("send", "recv", "isend", "irecv"):
        replacement = _as_a_card_does(function, waits=False)
    else:
        continue
    setattr(distributed_c10d, name, replacement)
    if hasattr(dist, name):
        setattr(dist, name, replacement)
dist.Backend.register_backend("hccl", _create_gloo, devices=["cpu", "hpu"])
