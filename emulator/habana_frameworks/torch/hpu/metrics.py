"""Metrics of the plugin: of them there is `graph_compilation`, and of its figures the number of graphs."""

import contextlib
from collections.abc import Iterator

from habana_frameworks.emulator import graph_counter


class Metric:
    """What was counted in a context; times have no meaning here."""

    total_number = 0

    def stats(self) -> list[tuple[str, int]]:
        return [("TotalNumber", self.total_number)]


@contextlib.contextmanager
def metric_localcontext(name: str) -> Iterator[Metric]:
    """Counts the graphs that what runs in the context adds to those before."""
    if name != "graph_compilation":
        raise ValueError(f"the emulator has the metric graph_compilation alone, not {name}")
    metric = Metric()
    with contextlib.ExitStack() as stack:
        graphs = graph_counter.active or stack.enter_context(graph_counter.count_graphs())
        before = graphs.distinct
        yield metric
        graphs.end_lazy_graph()
        metric.total_number = graphs.distinct - before
