"""Log-probs of the reference model, kept on disk under a key made of all that they depend on."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from datasets import Dataset, config
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from align.errors import InputError
from align.output import check_writable
from align.training.checkpoints import noting_disk_errors
from align.training.ranks import all_ranks, first_of_all_ranks
from align.whole import replace_file

logger = logging.getLogger(__name__)


@dataclass
class Stored:
    """Log-probs of one split's answers, `[pairs, 2]` (chosen, rejected), and their file; None until it is written."""

    path: Path
    values: np.ndarray | None


def find(folder: str | None, splits: Mapping[str, Dataset], *about: object) -> dict[str, Stored]:
    """What is stored for each split; the file's name is a hash of the split's content and all that is in `about`.

    Ranks on nodes with disks of their own agree: what one of them lacks, all compute. All ranks call it.
    """
    kept = Path(folder or config.HF_DATASETS_CACHE / "reference_log_probs")
    found = {}
    for name, split in splits.items():
        key = hashlib.sha256(repr((split._fingerprint, *about)).encode()).hexdigest()[:32]
        path = kept / f"{key}.safetensors"
        values = problem = None
        try:
            values = load(path, len(split)) if path.exists() else None
            if values is None:
                check_writable(kept, "the folder of reference log-probs")
        except InputError as error:
            problem = error
        if problem := first_of_all_ranks(problem):
            raise problem
        if any(missing := all_ranks(values is None)):
            if not all(missing):
                ranks = ", ".join(str(rank) for rank, is_missing in enumerate(missing) if is_missing)
                logger.info(f"{name}: ranks {ranks} do not have the reference log-probs of the others")
            values = None
        found[name] = Stored(path, values)
        logger.info(f"{name}: reference log-probs {'will be stored in' if values is None else 'from'} {path}")
    return found


def load(path: Path, pairs: int) -> np.ndarray:
    """Reads the file, which must be whole and of these pairs."""
    try:
        with safe_open(path, framework="numpy") as file:
            told, values = file.metadata() or {}, file.get_tensor("log_probs")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it to compute it anew") from error
    if told.get("key") != path.stem or values.shape != (pairs, 2) or not np.isfinite(values).all():
        raise InputError(f"{path} is of another run or broken; delete it to compute it anew")
    if told.get("xxh3_128") != _checksum(values):
        raise InputError(f"{path} is damaged: not what was written; delete it to compute it anew")
    return values


def _checksum(values: np.ndarray) -> str:
    return xxhash.xxh3_128(values.tobytes()).hexdigest()


def store(stored: Stored, values: np.ndarray, write: bool) -> None:
    """Keeps `values`; the file appears whole or not at all. A full disk costs it, and not the run."""
    stored.values = np.ascontiguousarray(values, np.float32)
    if write:
        told = {"key": stored.path.stem, "xxh3_128": _checksum(stored.values)}
        errors: list[str] = []
        with noting_disk_errors(errors), replace_file(stored.path) as partial:
            save_file({"log_probs": stored.values}, partial, metadata=told)
        if errors:
            logger.warning(f"reference log-probs are not stored, so another run computes them anew: {errors[0]}")
