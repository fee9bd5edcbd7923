"""Two places of optimum-habana 1.21.2 that fail away from Gaudi's container images.

They are mended as they are imported. Each can go when the line that it names has changed.
"""

import importlib.util
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder

import torch

MODELS = "optimum.habana.transformers"


def _load_without_torchvision(module: types.ModuleType, load: Callable) -> None:
    """models/glm4v/tokenization_chatglm.py:32 imports torchvision, which optimum-habana does not require."""
    if importlib.util.find_spec("torchvision"):
        load(module)
        return
    torchvision = types.ModuleType("torchvision")
    torchvision.transforms = None  # used for GLM-4V's images only
    sys.modules["torchvision"] = torchvision
    try:
        load(module)
    finally:
        del sys.modules["torchvision"]


def _load_for_newer_checkpointing(module: types.ModuleType, load: Callable) -> None:
    """gradient_checkpointing.py:368 calls a private function of torch by position; torch 2.13 added an argument.

    All it does in the end is torch's non-reentrant checkpointing, which has a public name.
    """
    torch_checkpoint = torch.utils.checkpoint.checkpoint

    def checkpoint(function, *args, use_reentrant: bool | None = None, **kwargs):
        return torch_checkpoint(function, *args, use_reentrant=False, **kwargs)

    load(module)
    module.checkpoint = checkpoint


FIXES = {
    f"{MODELS}.models.glm4v.tokenization_chatglm": _load_without_torchvision,
    f"{MODELS}.gradient_checkpointing": _load_for_newer_checkpointing,
}


class _FixingFinder:
    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        fix = FIXES.get(name)
        spec = PathFinder.find_spec(name, path, target) if fix else None
        if spec:
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: fix(module, load)
        return spec


def install() -> None:
    sys.meta_path.insert(0, _FixingFinder)
