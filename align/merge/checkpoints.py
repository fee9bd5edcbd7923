"""Checkpoints as files: where each tensor lies, from headers alone."""

import itertools
import json
import math
import pickle
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import xxhash

from align.errors import InputError, one_line

DTYPES = {  # safetensors' name: torch's, and the bytes of one element
    **{"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)},
    **{"I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "BOOL": ("bool", 1)},
    **{"U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1)},
    **{"F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1)},
}
TORCH_NAMES = {name: torch_name for name, (torch_name, _) in DTYPES.items()}
ITEM_SIZES = {name: size for name, (_, size) in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
PIECE = 1 << 16  # bytes of a piece of a large file


class NotStreamableError(Exception):
    """Merging needs the whole model in memory; the message says why."""


@dataclass(frozen=True)
class StoredTensor:
    """A row-major tensor of `dtype` (safetensors' name) whose bytes start at `offset` in `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """The weights in `folder`: its files by name, and in each the tensors in the order of their bytes."""

    folder: Path
    files: dict[str, list[StoredTensor]]

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        return {tensor.name: tensor for tensors in self.files.values() for tensor in tensors}


def find_folder(name: str, flag: str, *patterns: str, token: str | None = None, revision: str | None = None) -> Path:
    """`name` where it is a folder, else a folder with that hub repository's files of these patterns."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise InputError(f"{flag}: {name} is a file; give a folder or a hub name")
    from huggingface_hub import snapshot_download

    try:
        ignored = ["*/*", "consolidated*"]
        return Path(
            snapshot_download(name, allow_patterns=patterns, ignore_patterns=ignored, token=token, revision=revision)
        )
    except (OSError, ValueError) as error:  # what huggingface_hub raises for names, access, network and cache
        reason = one_line(error)
        raise InputError(f"{flag}: {name} is not a folder, and cannot be read from the hub ({reason})") from None


def read_json(path: Path) -> dict:
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise InputError(f"{path} is not a file: copy or download it again")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): copy or download it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__} where a JSON object is expected")
    return content


def read_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of a `.safetensors` or `.bin` file in the order of their bytes, without reading those bytes."""
    if not path.is_file():
        raise InputError(f"{path} is missing: copy or download it again")
    try:
        tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch_file(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return sorted(tensors, key=lambda tensor: tensor.offset)


def _read_safetensors(path: Path) -> list[StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        start = 8 + header_size
        if not 2 <= header_size <= size - 8:
            raise InputError(f"{path} is damaged (header of {header_size} bytes in a file of {size}): copy it again")
        header = file.read(header_size)
    try:
        entries = json.loads(header, object_pairs_hook=_without_doubles)
        entries.pop("__metadata__", None)
        tensors, ends = [], []
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            if not all(isinstance(size, int) and size >= 0 for size in (first, last, *entry["shape"])):
                raise ValueError
            tensors.append(StoredTensor(name, entry["dtype"], tuple(entry["shape"]), path, start + first))
            ends.append(start + last)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise InputError(f"{path} is damaged (its header is not one of safetensors): copy it again") from None
    for tensor, end in zip(tensors, ends, strict=True):
        if tensor.dtype not in ITEM_SIZES:
            raise InputError(f"{path}: {tensor.name} has dtype {tensor.dtype}, known are {', '.join(ITEM_SIZES)}")
        if tensor.offset + tensor.nbytes != end:
            raise InputError(f"{path} is damaged ({tensor.name} does not fit its place): copy it again")
    place = start
    for tensor, end in sorted(zip(tensors, ends, strict=True), key=lambda pair: (pair[0].offset, pair[1])):
        if tensor.offset != place:
            what = "overlaps the one before it" if tensor.offset < place else "leaves a hole before it"
            raise InputError(f"{path} is damaged ({tensor.name} {what}): copy it again")
        place = end
    if max(ends, default=start) != size:
        raise InputError(
            f"{path} is truncated or damaged ({size} bytes, not {max(ends, default=start)}): copy it again"
        )
    return tensors


def _without_doubles(pairs: list[tuple[str, object]]) -> dict:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def _read_torch_file(path: Path) -> list[StoredTensor]:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            is_pickle = file.read(2) == b"\x80\x02"
        if is_pickle:
            raise NotStreamableError(f"{path.name} has the format of torch before 1.6")
        raise InputError(f"{path} is truncated or not a file that torch.save wrote: copy it again")
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode  # torch's documented way to read offsets only

    dtypes = {getattr(torch, dtype): name for name, dtype in TORCH_NAMES.items()}
    try:
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own text says how to run what is planted there
        raise InputError(f"{path} holds more than tensors, which may be code to run: not read") from None
    except Exception as error:  # torch.load has no error class of its own
        raise InputError(f"{path} cannot be read ({one_line(error)}): copy it again") from None
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__} where tensors by name are expected: convert it first")
    tensors = []
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.dtype not in dtypes or not value.is_contiguous():
            raise NotStreamableError(f"{name} in {path.name} is not a plain, contiguous tensor")
        offset = value.untyped_storage()._checkpoint_offset + value.storage_offset() * value.itemsize
        tensors.append(StoredTensor(name, dtypes[value.dtype], tuple(value.shape), path, offset))
    return tensors


def same_bytes(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two stored tensors are one and the same, read block by block to the first difference."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.path.open("rb") as one, second.path.open("rb") as two:
        one.seek(first.offset)
        two.seek(second.offset)
        sizes = itertools.chain(itertools.repeat(1 << 20, first.nbytes >> 20), [first.nbytes % (1 << 20)])
        return all(one.read(size) == two.read(size) for size in sizes)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The model weights in `folder`, in transformers' order of preference; InputError where they are not whole."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).exists():
            return Checkpoint(folder, {stem: read_tensors(folder / stem)})
        index = folder / f"{stem}.index.json"
        if not index.exists():
            continue
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
            raise InputError(f'{index} has no "weight_map" of files: copy or download it again')
        if outside := [file for file in places.values() if Path(file).name != file]:
            raise InputError(f"{index} leaves the folder for {outside[0]}: copy or download it again")
        missing = sorted(set(places.values()) - {path.name for path in folder.iterdir() if path.is_file()})
        if missing:
            raise InputError(f"{index} names {missing[0]}, which is not there: copy or download it again")
        checkpoint = Checkpoint(folder, {file: read_tensors(folder / file) for file in sorted(set(places.values()))})
        held = {file: {tensor.name: tensor for tensor in tensors} for file, tensors in checkpoint.files.items()}
        for name, file in places.items():
            if name not in held[file]:
                raise InputError(f"{index} looks for {name} in {file}, which does not hold it: copy both again")
        for tensor in (tensor for tensors in checkpoint.files.values() for tensor in tensors):
            named = places.get(tensor.name)
            if named not in (None, tensor.path.name) and not same_bytes(tensor, held[named][tensor.name]):
                raise InputError(
                    f"{tensor.path} holds {tensor.name} as well, with other values than {named}, where {index.name} "
                    "looks for it: copy all three again"
                )
        return checkpoint
    hint = "an adapter, merge that one first" if (folder / "adapter_config.json").exists() else "a model"
    raise InputError(f"{folder} has no model.safetensors or pytorch_model.bin, whole or with an index: is it {hint}?")


def identify_files(paths: Collection[Path], pieces: int | None = None) -> str:
    """A hash of names, sizes and content; of files beyond 64 MiB it reads 1024 pieces.

    Another model's weights differ nearly everywhere, and those of a merge in every layer. With `pieces`, it reads
    about so many of all files together.
    """
    digest = xxhash.xxh3_128()
    every = math.ceil(len(paths) / pieces) if pieces and paths else 1  # which files are read at all
    each = max(1, pieces // len(paths)) if pieces and paths else 1024
    for number, path in enumerate(sorted(paths)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        if number % every:
            continue
        with open(path, "rb") as file:
            for start in range(0, size, max(PIECE, size // each)):
                file.seek(start)
                digest.update(file.read(PIECE))
    return digest.hexdigest()


def identify_folder(folder: Path) -> str:
    """A hash of a model's weights and configuration, as the manifest of a run on it has it."""
    weights = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    return identify_files([*weights, folder / "config.json"])
