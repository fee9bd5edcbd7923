"""The other cards of a dry run: collectives know shapes and move nothing, and DDP has no buckets to fill."""

import contextlib
import os

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore, _create_fake_pg


def install() -> None:
    """`hccl` becomes torch's fake process group: this process is rank 0 of a world that nobody else is in."""
    distributed_c10d.Backend._plugins["HCCL"] = distributed_c10d.Backend._BackendPlugin(_create_fake_pg, True)
    distributed_c10d.Backend.backend_capability["hccl"] = ["cpu", "hpu", "meta"]
    native_init = dist.init_process_group

    def init_process_group(*args, **kwargs):
        world = {name: kwargs.pop(name, None) for name in ("init_method", "store", "rank", "world_size", "device_id")}
        rank = world["rank"] if (world["rank"] or -1) >= 0 else _variable("RANK", 0)
        size = world["world_size"] if (world["world_size"] or -1) > 0 else _variable("WORLD_SIZE", 1)
        native_init(*args, store=FakeStore(), rank=rank, world_size=size, **kwargs)

    dist.init_process_group = distributed_c10d.init_process_group = init_process_group
    from habana_frameworks.torch import hpu

    hpu.set_rng_state = hpu.random.set_rng_state = lambda *_, **__: None  # nothing is drawn
    torch.nn.parallel.DistributedDataParallel = DryDataParallel
    torch.nn.parallel.distributed.DistributedDataParallel = DryDataParallel


def _variable(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


class DryDataParallel(torch.nn.Module):
    """DDP's memory without its reducer, which looks into the tensors: a bucket for each gradient, kept between steps.

    torch's reducer holds one flat copy of all gradients, and with `gradient_as_bucket_view` the gradients are views of
    it (torch/csrc/distributed/c10d/reducer.cpp, `initialize_buckets`).
    """

    def __init__(self, module: torch.nn.Module, *args, gradient_as_bucket_view: bool = False, **kwargs):
        super().__init__()
        self.module = module
        self.require_backward_grad_sync = True
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not trained:
            raise RuntimeError("DistributedDataParallel needs a parameter that requires a gradient")
        self.buckets = [torch.empty_like(parameter, requires_grad=False) for parameter in trained]
        if gradient_as_bucket_view:
            for parameter, bucket in zip(trained, self.buckets, strict=True):
                parameter.register_hook(lambda gradient, bucket=bucket: bucket.copy_(gradient))

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def no_sync(self):
        return contextlib.nullcontext()
