"""The collective backend `hccl`, carried by gloo."""

from datetime import timedelta

import torch.distributed as dist


def _create_gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
    return dist.ProcessGroupGloo(store, rank, size, timeout)


dist.Backend.register_backend("hccl", _create_gloo, devices=["cpu", "hpu"])
