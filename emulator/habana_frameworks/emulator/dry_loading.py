"""Models and files of a dry run: loading takes shapes from `config.json` or the files' headers and reads no weight,
saving notes how large a file would be."""

import contextlib
import json
import os
import struct
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from habana_frameworks.emulator import dry

on_save: list[Callable[[str, int], None]] = []
on_load: list[Callable[[str, dict[str, torch.Tensor], torch.dtype], None]] = []
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
DTYPES |= {"I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_header(path: Path) -> dict[str, dict]:
    """The tensors of a safetensors file: name -> dtype, shape, data_offsets."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header


def _on_host(shape, dtype: torch.dtype) -> torch.Tensor:
    with dry.placing(dry.CPU):
        return torch.empty(tuple(shape), dtype=dtype, device=dry.META)


def state_dict(model_class: type, config, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor that loading would read, on the host, without data.

    From the safetensors files where they are there; else from `config.json`, in the dtype to load with.
    """
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if files:
        return {
            name: _on_host(about["shape"], DTYPES[about["dtype"]])
            for file in files
            for name, about in read_header(file).items()
        }
    with torch.device("meta"):
        model = model_class(config)
        tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
        return {
            name: _on_host(tensor.shape, dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in model.state_dict().items()
            if name not in tied
        }


def on_import(name: str, change: Callable) -> None:
    """Changes a module once it is loaded."""

    class Finder:
        @staticmethod
        def find_spec(wanted: str, path=None, target=None):
            spec = PathFinder.find_spec(wanted, path, target) if wanted == name else None
            if spec:
                load = spec.loader.exec_module

                def load_and_change(module):
                    load(module)
                    change(module)

                spec.loader.exec_module = load_and_change
            return spec

    sys.meta_path.insert(0, Finder)


def install_transformers(modeling_utils) -> None:
    native = modeling_utils.PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, name=None, *args, config=None, **kwargs):
        if name is None or kwargs.get("state_dict") is not None:
            return native(cls, name, *args, config=config, **kwargs)
        config = config or cls.config_class.from_pretrained(name, token=kwargs.get("token"))
        dtype = kwargs.get("torch_dtype") or torch.float32
        if dtype == "auto":
            dtype = config.torch_dtype or torch.float32
        weights = state_dict(cls, config, Path(name), dtype)
        for tell in on_load:
            tell(str(name), weights, dtype)
        loaded = native(cls, None, *args, config=config, state_dict=weights, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.can_generate():
            with contextlib.suppress(OSError):  # transformers does without it as well
                model.generation_config = modeling_utils.GenerationConfig.from_pretrained(name)
        model.name_or_path = model.config._name_or_path = str(name)
        return loaded

    modeling_utils.PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def _nbytes(value: Any) -> int:
    storages = {
        leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes()
        for leaf in tree_leaves(value)
        if isinstance(leaf, torch.Tensor)
    }
    return sum(storages.values())


def install() -> None:
    import safetensors.torch

    on_import("transformers.modeling_utils", install_transformers)
    native_save = torch.save

    def save(value, file, *args, **kwargs):
        """Tensors without data are pickled by shape; the size of the file with data is told."""
        before, dry._state.inside = getattr(dry._state, "inside", False), True
        try:
            native_save(value, file, *args, **kwargs)
        finally:
            dry._state.inside = before
        if isinstance(file, (str, os.PathLike)):
            for tell in on_save:
                tell(str(file), _nbytes(value))

    def save_file(tensors, filename, metadata=None):
        """A whole header before a hole in the file of the data's size, which takes no place on the disk."""
        header, offset = {"__metadata__": metadata} if metadata else {}, 0
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(filename, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset)
        for tell in on_save:
            tell(str(filename), 8 + len(text) + offset)

    torch.save = save
    safetensors.torch.save_file = save_file
