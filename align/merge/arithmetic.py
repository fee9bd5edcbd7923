"""
The merged values of one tensor, chunk by chunk. Each chunk repeats what PEFT 0.17's `merge_and_unload` does on a CPU,
in its order and precision, so that the result is the same to the last bit.
"""

import itertools
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch

from align.errors import InputError
from align.merge.checkpoints import FLOATS, ITEM_SIZES, TORCH_NAMES, StoredTensor
from align.merge.plan import LoraUpdate, MergedTensor

CHUNK_ELEMENTS = 1 << 20  # in float32 a chunk stays in a core's cache
CHUNK_ROWS = 64  # for slices narrower than about twelve MKL adds in another order, and the last bit differs

TORCH_DTYPES = {name: getattr(torch, TORCH_NAMES[name]) for name in FLOATS}


class _Buffers(threading.local):
    """Memory that a worker uses again for every chunk: fresh pages would cost several times the arithmetic."""

    def __init__(self):
        self.tensors = {}

    def __call__(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape)
        if (use, dtype) not in self.tensors or len(self.tensors[use, dtype]) < size:
            self.tensors[use, dtype] = torch.empty(size, dtype=dtype)
        return self.tensors[use, dtype][:size].view(shape)


_buffers = _Buffers()


def read_elements(tensor: StoredTensor, start: int, stop: int, use: str) -> torch.Tensor:
    """Elements `start` to `stop` of the flat tensor, in this worker's buffer for that `use`."""
    out = _buffers(use, (stop - start,), TORCH_DTYPES[tensor.dtype])
    memory = as_bytes(out)
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.offset + start * ITEM_SIZES[tensor.dtype])
        while memory:
            count = file.readinto(memory)
            if not count:
                raise InputError(f"{tensor.path} ended inside {tensor.name}: did something else change it?")
            memory = memory[count:]
    return out


def as_bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.view(torch.uint8).numpy())


def all_finite(values: torch.Tensor) -> bool:
    return all(math.isfinite(end) for end in torch.stack(values.aminmax()).tolist()) if len(values) else True


def is_finite(tensor: StoredTensor) -> bool:
    """Whether a stored float tensor holds neither NaN nor infinity; reads it once, chunk by chunk."""
    size = math.prod(tensor.shape)
    chunks = (range(size)[start : start + CHUNK_ELEMENTS] for start in range(0, size, CHUNK_ELEMENTS))
    return all(all_finite(read_elements(tensor, chunk.start, chunk.stop, "checked")) for chunk in chunks)


def merged_chunks(tensor: MergedTensor) -> Iterator[tuple[int, torch.Tensor]]:
    """The chunks of a float tensor in order: the first element's number, and the values, valid until the next one."""
    dtype = TORCH_DTYPES[tensor.dtype]
    wide = torch.promote_types(dtype, torch.float32)
    update = tensor.update
    rows, columns = tensor.shape[0] if tensor.shape else 1, math.prod(tensor.shape[1:])
    if not update and not tensor.tokens:
        rows, columns = rows * columns, 1
    rows_each = max(CHUNK_ROWS, CHUNK_ELEMENTS // max(1, columns))
    a: Any = None
    b: Any = None
    if update:
        a, b, magnitude = (_load(part, wide) for part in (update.a, update.b, update.magnitude))
        if update.magnitude and update.transposed:
            rows_each = rows  # the norms run over what is stored as columns
    pieces = max(1, -(-rows // rows_each))
    for start, stop in itertools.pairwise(piece * rows // pieces for piece in range(pieces + 1)):
        stored = read_elements(tensor.source, start * columns, stop * columns, "stored").view(stop - start, columns)
        weight = stored if stored.dtype == dtype else _buffers("weight", stored.shape, dtype).copy_(stored)
        if tensor.tokens:
            _replace_rows(weight, start, *tensor.tokens)
        if update:
            total = weight if dtype == wide else _buffers("total", weight.shape, wide).copy_(weight)
            if a is None:
                total += (b[start:stop] * update.scaling).view(-1, 1)
            elif update.transposed:
                _add_product(total.T, b, a[:, start:stop], magnitude, update, dtype)
            else:
                norms = magnitude if magnitude is None else magnitude[start:stop]
                _add_product(total, b[start:stop], a, norms, update, dtype)
            weight.copy_(total)
        yield start * columns, weight.view(-1)


def _load(tensor: StoredTensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    if tensor is None:
        return None
    values = read_elements(tensor, 0, math.prod(tensor.shape), "adapter")
    return values.to(dtype, copy=True).view(tensor.shape)


def _add_product(
    total: torch.Tensor,
    b: torch.Tensor,
    a: torch.Tensor,
    magnitude: torch.Tensor | None,
    update: LoraUpdate,
    dtype: torch.dtype,
) -> None:
    """Adds the scaled `b @ a` to `total`, all [out, in] here, and for DoRA scales each row to its magnitude [out]."""
    product = torch.mm(b, a, out=_buffers("product", tuple(total.shape), total.dtype))
    product *= update.scaling
    total += product.to(dtype) if update.rounded else product
    if magnitude is not None:
        total *= (magnitude / torch.linalg.norm(total, dim=1)).view(-1, 1)


def _replace_rows(weight: torch.Tensor, start: int, rows: tuple[int, ...], values: StoredTensor) -> None:
    columns = weight.shape[1]
    for number, row in enumerate(rows):
        if start <= row < start + len(weight):
            weight[row - start] = read_elements(values, number * columns, (number + 1) * columns, "row")
