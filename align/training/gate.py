"""Checks a saved model or adapter before it gets its name."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import load_peft_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from align.errors import ResultError

SAMPLED = 64  # elements of each tensor that tell whether it has changed
MOVED = 1e-6  # sum of the steps' learning rates below which rounding may leave all weights as they were


class Gate:
    """Reads back what was saved and compares it with what is in memory. Raises: ResultError."""

    def __init__(self, model: PreTrainedModel | PeftModel):
        self.model = model
        self.is_adapter = isinstance(model, PeftModel)

    def check(self, folder: Path, state: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """`state` is what was saved, by the names that the model has. Returns how much was looked at."""
        saved = self._load_adapter(folder) if self.is_adapter else self._open_model(folder)
        expected = self._adapter_names(state) if self.is_adapter else dict(state)
        self._check_names(folder, saved, expected)
        elements = 0
        for name, tensor in saved.items():
            tensor = tensor() if callable(tensor) else tensor
            wanted = expected[name]
            if tensor.shape != wanted.shape or tensor.numel() == 0:
                raise ResultError(f"{folder}: {name} was saved as {list(tensor.shape)}, not {list(wanted.shape)}")
            if tensor.is_floating_point() and not torch.stack(tensor.aminmax()).isfinite().all():
                raise ResultError(f"{folder}: {name} holds values that are not finite")
            if not torch.equal(tensor, wanted.to(tensor.dtype)):
                raise ResultError(f"{folder}: {name} was saved with other values than it has in memory")
            elements += tensor.numel()
        return {"tensors": len(saved), "elements": elements}

    def _check_names(self, folder: Path, saved: Mapping, expected: Mapping[str, torch.Tensor]) -> None:
        if more := sorted(saved.keys() - expected.keys()):
            raise ResultError(f"{folder}: {more[0]} was saved, which the model does not have")
        held = {_place(tensor) for name, tensor in expected.items() if name in saved}
        missing = sorted(name for name, tensor in expected.items() if name not in saved and _place(tensor) not in held)
        tied = self.model._tied_weights_keys or [] if not self.is_adapter else []
        if missing := [name for name in missing if name not in tied]:
            raise ResultError(f"{folder}: {missing[0]} is not among what was saved")

    def _adapter_names(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What PEFT calls the tensors of an adapter in its file."""
        names = {name: name.replace(f".{self.model.active_adapter}.", ".") for name in state}
        names = {name: new.removesuffix(f".{self.model.active_adapter}") for name, new in names.items()}
        return {new: state[name] for name, new in names.items()}

    def _load_adapter(self, folder: Path) -> dict[str, torch.Tensor]:
        """As PEFT's own loader reads it, with a configuration that it understands."""
        try:
            type(self.model.active_peft_config).from_pretrained(str(folder))
            return load_peft_weights(str(folder), device="cpu")
        except Exception as error:
            raise ResultError(f"{folder}: PEFT cannot load what was saved: {error}") from error

    def _open_model(self, folder: Path) -> dict:
        """A function for each tensor in the files, so that one at a time is in memory."""
        try:
            AutoConfig.from_pretrained(folder)
            index = folder / "model.safetensors.index.json"
            files = {"model.safetensors"}
            if index.is_file():
                files = set(json.loads(index.read_text())["weight_map"].values())
            opened = [safe_open(folder / name, framework="pt") for name in sorted(files)]
            return {name: lambda file=file, name=name: file.get_tensor(name) for file in opened for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise ResultError(f"{folder}: transformers cannot load what was saved: {error}") from error


def _place(tensor: torch.Tensor) -> tuple:
    """Alike for tied tensors."""
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape


class Movement:
    """Whether training has changed any weight, from a few elements of each that this rank holds."""

    def __init__(self, model: nn.Module):
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.before = [self._sample(weight).clone() for weight in self.weights]
        self.rates = 0.0  # of the steps taken

    @staticmethod
    @torch.no_grad()
    def _sample(weight: nn.Parameter) -> torch.Tensor:
        held = getattr(weight, "ds_tensor", weight).flatten()  # under ZeRO-3: this rank's part
        return held[:: max(1, held.numel() // SAMPLED)][:SAMPLED]

    @torch.no_grad()
    def count_changed(self) -> int:
        pairs = zip(self.weights, self.before, strict=True)
        changed = [(self._sample(weight) != before).any() for weight, before in pairs]
        return int(torch.stack(changed).sum()) if changed else 0
