"""Lazy mode's only call that matters to a caller: where one graph ends and the next begins."""

from habana_frameworks.emulator import graph_counter
from habana_frameworks.torch import hpu
from habana_frameworks.torch.core import step_closure

__all__ = ["hpu", "mark_step", "step_closure"]


def mark_step() -> None:
    """Ends the lazy graph. Here operations have run already; a graph counter, if one is active, notes the cut."""
    graph_counter.end_lazy_graph()
