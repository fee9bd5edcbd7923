"""What the plugin counts (hpu/metrics/metrics.py). Graphs are counted here; nothing falls back to the host, and memory
is never in pieces. Times have no meaning and are 0.
"""

import contextlib
from collections.abc import Iterator
from enum import Enum

from habana_frameworks.emulator import graph_counter, metrics_file
from habana_frameworks.emulator.metrics_file import Metric

__all__ = [
    "Metric",
    "MetricDumpFormat",
    "MetricDumpTrigger",
    "MetricNotFound",
    "metric_global",
    "metric_localcontext",
    "metrics_dump",
]


class MetricNotFound(Exception):
    pass


class MetricDumpFormat(str, Enum):
    json = "json"
    text = "text"


class MetricDumpTrigger(str, Enum):
    process_exit = "process_exit"
    mark_step = "mark_step"
    metric_change = "metric_change"
    user = "user"


def metric_global(name: str) -> Metric | None:
    """The metric of this process; None where there is none of that name. Graphs are counted from the first call on."""
    return metrics_file.of_process().get(name)


@contextlib.contextmanager
def metric_localcontext(name: str) -> Iterator[Metric]:
    """Counts what the context adds to that before."""
    if name not in metrics_file.names():
        raise MetricNotFound(f"Metric with given name ({name}) doesn't exist.")
    with contextlib.ExitStack() as stack:
        metric = Metric(name, graph_counter.active or stack.enter_context(graph_counter.count_graphs()))
        try:
            yield metric
        finally:
            metric.stop()


def metrics_dump(file_name: str, format: MetricDumpFormat = MetricDumpFormat.json) -> None:
    """Writes the metrics of this process to a file, named as that of PT_HPU_METRICS_FILE is."""
    writer = metrics_file.Writer(file_name, format.value)
    writer.write_all(MetricDumpTrigger.user.value)
    writer.close()
