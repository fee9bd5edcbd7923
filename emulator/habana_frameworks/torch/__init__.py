"""Importing this makes `hpu` a device of torch: `torch.hpu`, the `hccl` backend, `torch.ops.hpu`."""

import torch

from habana_frameworks.emulator import device_alias, optimum_habana_fixes
from habana_frameworks.torch import hpu

device_alias.install()
torch._register_device_module("hpu", hpu)
optimum_habana_fixes.install()

from habana_frameworks.torch import core, custom_ops  # noqa: E402, F401
from habana_frameworks.torch.distributed import hccl  # noqa: E402, F401
