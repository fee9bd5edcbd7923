"""Counts the graphs that a card would compile and launch.

    with count_graphs() as graphs:
        trainer.train()
    print(graphs.distinct, graphs.launches)

In lazy mode a graph is what runs between two cuts: a `mark_step`, or a tensor that the host reads. Two are the same
if their operations, shapes, dtypes and integer arguments are; a card compiles each distinct one once, in seconds to
minutes. This is a proxy: operations that a program runs on the CPU on purpose count as well. Counting is off unless
asked for, and bound to the calling thread.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HOST_READS = ("cpu", "numpy", "to", "tolist")  # of `to` only to("cpu")


def signature(value: Any) -> Hashable:
    """What makes two values the same to a graph: shape and dtype of a tensor, never its content."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(signature(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, signature(item)) for key, item in value.items())
    return value if isinstance(value, (bool, int, str, torch.dtype, type(None))) else type(value)


class GraphCounter(TorchDispatchMode):
    """`lazy` and `hpu` map each distinct graph to its launches."""

    def __init__(self):
        super().__init__()
        self.lazy: Counter[Hashable] = Counter()
        self.hpu: Counter[Hashable] = Counter()
        self.in_hpu_graph = False
        self.when_new: Callable[[], None] = lambda: None  # called when a graph would be compiled
        self._open = 0  # hash of the operations since the last cut

    @property
    def distinct(self) -> int:
        """Graphs that a card would compile."""
        return len(self.lazy) + len(self.hpu)

    @property
    def launches(self) -> int:
        return self.lazy.total() + self.hpu.total()

    @property
    def uses(self) -> Counter[Hashable]:
        """For each graph its compilation, `("miss", graph)`, and its launches after that, `("hit", graph)`."""
        launches = [(("lazy", graph), count) for graph, count in self.lazy.items()] + list(self.hpu.items())
        uses = Counter({("miss", graph): 1 for graph, _ in launches})
        return uses + Counter({("hit", graph): count - 1 for graph, count in launches})

    def launch(self, graphs: Counter[Hashable], graph: Hashable) -> None:
        graphs[graph] += 1
        if graphs[graph] == 1:
            self.when_new()

    def end_lazy_graph(self) -> None:
        if self._open and not self.in_hpu_graph:
            graph, self._open = self._open, 0
            self.launch(self.lazy, graph)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten._local_scalar_dense.default:
            self.end_lazy_graph()
        elif not self.in_hpu_graph:
            self._open = hash((self._open, operation, signature(args), signature(kwargs)))
        return result


active: GraphCounter | None = None  # the one that counts now


def end_lazy_graph() -> None:
    if active:
        active.end_lazy_graph()


@contextlib.contextmanager
def hpu_graph(module_id: int, inputs: Hashable) -> Iterator[None]:
    """What runs in here is one HPU graph, not lazy ones."""
    if active is None or active.in_hpu_graph:
        yield
        return
    active.end_lazy_graph()
    active.launch(active.hpu, (module_id, inputs))
    active.in_hpu_graph = True
    try:
        yield
    finally:
        active.in_hpu_graph = False


@contextlib.contextmanager
def count_graphs() -> Iterator[GraphCounter]:
    """Counts the graphs of what runs in the context."""
    global active
    if active:
        raise RuntimeError("graphs are being counted already")
    originals = {name: getattr(torch.Tensor, name) for name in HOST_READS}
    for name in originals:
        setattr(torch.Tensor, name, _ending_graph(name, originals[name]))
    active = GraphCounter()
    try:
        with active:
            yield active
            active.end_lazy_graph()
    finally:
        active = None
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)


def _ending_graph(name: str, read: Callable) -> Callable:
    @functools.wraps(read)
    def wrapper(tensor, *args, **kwargs):
        target = kwargs.get("device", args[0] if args else None)
        if name != "to" or (isinstance(target, (str, torch.device)) and str(target) == "cpu"):
            end_lazy_graph()
        return read(tensor, *args, **kwargs)

    return wrapper
