"""`torch.compile` for a card: what is compiled runs as it does without, and each key of its inputs counts as a graph.

Where a compiler would break the code into several graphs, or what it would fuse, is not shown.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from habana_frameworks.emulator import graph_counter

BACKEND = "hpu_backend"
_native = torch.compile


def install() -> None:
    torch.compile = _compile


@functools.wraps(_native)
def _compile(model: Callable | None = None, *, backend: Any = "inductor", disable: bool = False, **options):
    if backend != BACKEND or disable:
        return _native(model, backend=backend, disable=disable, **options)
    if model is None:
        return functools.partial(_compile, backend=backend, **options)
    if not isinstance(model, torch.nn.Module):
        return _counted(model)
    from torch._dynamo.eval_frame import OptimizedModule  # what tells others that a module is compiled

    return OptimizedModule(model, _counted)


def _counted(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with graph_counter.hpu_graph(id(function), graph_counter.signature((args, kwargs))):
            return function(*args, **kwargs)

    return wrapper
