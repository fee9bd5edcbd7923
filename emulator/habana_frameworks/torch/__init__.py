"""Importing this makes `hpu` a device of torch: `torch.hpu`, the `hccl` backend, `torch.ops.hpu`."""

import torch

from habana_frameworks.emulator import compiling, device_alias, dry, optimum_habana_fixes
from habana_frameworks.torch import hpu

(dry if dry.is_wanted else device_alias).install()
torch._register_device_module("hpu", hpu)
optimum_habana_fixes.install()
compiling.install()

from habana_frameworks.torch import activity_profiler, core, custom_ops  # noqa: E402, F401
from habana_frameworks.torch.distributed import hccl  # noqa: E402, F401

if dry.is_wanted:
    from habana_frameworks.emulator import dry_autocast, dry_kernels, dry_loading, dry_world

    for part in (dry_autocast, dry_world, dry_kernels, dry_loading):
        part.install()
