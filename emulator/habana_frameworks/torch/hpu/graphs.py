"""HPU graphs. On a card they spare the host its work; here they run as the operations they are made of."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from habana_frameworks.emulator import graph_counter

__all__ = ["HPUGraph", "ModuleCacher", "graph", "is_current_stream_capturing", "wrap_in_hpu_graph"]


class _Recorder(TorchDispatchMode):
    """Notes every operation with its inputs and outputs, and lets it run."""

    active = False

    def __init__(self):
        super().__init__()
        self.operations: list[tuple[Callable, tuple, dict, object]] = []

    def __enter__(self):
        _Recorder.active = True
        return super().__enter__()

    def __exit__(self, *exception):
        _Recorder.active = False
        return super().__exit__(*exception)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result


class HPUGraph:
    """A recorded sequence of operations; `replay` runs it again from and into the same tensors."""

    def __init__(self):
        self._recorder = _Recorder()

    def capture_begin(self) -> None:
        self._recorder.__enter__()

    def capture_end(self) -> None:
        self._recorder.__exit__(None, None, None)

    @torch.no_grad()
    def replay(self, asynchronous: bool = False) -> None:
        for operation, args, kwargs, recorded in self._recorder.operations:
            result = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                # Views and operations in place have written to the recorded memory already.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def reset(self) -> None:
        self._recorder = _Recorder()


@contextlib.contextmanager
def graph(hpu_graph: HPUGraph, stream=None) -> Iterator[None]:
    """Captures what runs in the context."""
    hpu_graph.capture_begin()
    try:
        yield
    finally:
        hpu_graph.capture_end()


def is_current_stream_capturing() -> bool:
    return _Recorder.active


def wrap_in_hpu_graph(
    module: torch.nn.Module,
    asynchronous: bool = False,
    disable_tensor_cache: bool = False,
    max_graphs: int | None = None,
) -> torch.nn.Module:
    """Makes `module` run as one HPU graph for each signature of its inputs, at most `max_graphs` of them.

    Nothing is captured: a graph counter sees the call as one graph, and callers get what they expect of a wrapped
    module, the argument `bypass_hpu_graphs` and the methods `clear_cache` and `clear_inputs`.
    """
    run, captured = module.forward, set()

    @functools.wraps(run)
    def forward(*args, bypass_hpu_graphs: bool = False, **kwargs):
        signature = graph_counter.signature((module.training, torch.is_grad_enabled(), args, kwargs))
        is_full = max_graphs is not None and len(captured) >= max_graphs and signature not in captured
        if bypass_hpu_graphs or is_full:
            return run(*args, **kwargs)
        captured.add(signature)
        with graph_counter.hpu_graph(id(module), signature):
            return run(*args, **kwargs)

    module.forward = forward
    module.clear_cache = captured.clear
    module.clear_inputs = lambda: None
    return module


class ModuleCacher:
    """Training graphs: `ModuleCacher()(model, inplace=True)` makes its forward and backward pass one HPU graph."""

    def __init__(self, max_graphs: int = 10):
        self.max_graphs = max_graphs

    def __call__(self, model: torch.nn.Module, inplace: bool = False, **options) -> torch.nn.Module:
        return wrap_in_hpu_graph(model if inplace else copy.copy(model), max_graphs=self.max_graphs)
