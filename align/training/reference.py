"""Log-probs of the reference model, kept on disk under a key made of all that they depend on."""

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, config
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PretrainedConfig

from align.errors import InputError

logger = logging.getLogger(__name__)


@dataclass
class Stored:
    """Log-probs of one split's answers, `[pairs, 2]` (chosen, rejected), and their file; None until it is written."""

    path: Path
    values: np.ndarray | None


def identify_model(name: str, model_config: PretrainedConfig) -> str:
    """What changes when the model's files do: their sizes and times in a local folder, the commit on the hub."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name} {model_config._commit_hash}"
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
    return repr([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])


def find(folder: str | None, splits: Mapping[str, Dataset], *about: object) -> dict[str, Stored]:
    """What is stored for each split; the file's name is a hash of the split's content and all that is in `about`."""
    folder = Path(folder or config.HF_DATASETS_CACHE / "reference_log_probs")
    found = {}
    for name, split in splits.items():
        key = hashlib.sha256(repr((split._fingerprint, *about)).encode()).hexdigest()[:32]
        path = folder / f"{key}.safetensors"
        found[name] = Stored(path, _load(path, len(split)) if path.exists() else None)
        logger.info(f"{name}: reference log-probs {'from' if path.exists() else 'will be stored in'} {path}")
    return found


def _load(path: Path, pairs: int) -> np.ndarray:
    """What is there must be whole and fit."""
    try:
        with safe_open(path, framework="numpy") as file:
            key, values = (file.metadata() or {}).get("key"), file.get_tensor("log_probs")
    except (SafetensorError, OSError) as error:
        raise InputError(f"--ref_log_probs_dir: {path} is damaged ({error}); delete it to compute it anew") from error
    if key != path.stem or values.shape != (pairs, 2) or not np.isfinite(values).all():
        raise InputError(f"--ref_log_probs_dir: {path} is of another run or broken; delete it to compute it anew")
    return values


def store(stored: Stored, values: np.ndarray, write: bool) -> None:
    """Keeps `values`; the file appears whole or not at all."""
    stored.values = np.ascontiguousarray(values, np.float32)
    if write:
        stored.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = stored.path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"log_probs": stored.values}, unfinished, metadata={"key": stored.path.stem})
        os.replace(unfinished, stored.path)
