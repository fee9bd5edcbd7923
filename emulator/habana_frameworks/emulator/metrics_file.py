"""PT_HPU_METRICS_FILE: where the plugin writes what it counts, in the form of the real one (hpu/metrics/saver.py).

`metrics.json` becomes `metrics-rank0.json` where RANK is set, and a name that is taken ends in `.1`, `.2` and so on.
"""

import atexit
import json
import os
import sys
from collections import Counter
from collections.abc import Hashable
from contextlib import ExitStack
from datetime import datetime
from typing import IO, Any

from habana_frameworks.emulator import graph_counter
from habana_frameworks.emulator.graph_counter import GraphCounter, count_graphs

FORMATS = ("json", "text")
TRIGGERS = ("process_exit", "mark_step", "metric_change", "user")
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK")


def _variable(name: str, default: str = "") -> str:
    """Also under the name that it had before."""
    return os.environ.get(f"PT_HPU_{name}", os.environ.get(f"HABANA_PT_{name}", default))


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("y", "yes", "t", "true", "on", "1")


def names() -> list[str]:
    cache = ["recipe_cache"] if _is_on("PT_HPU_ENABLE_CACHE_METRICS") else []
    return ["graph_compilation", "cpu_fallback", "memory_defragmentation", *cache]


def stats(name: str, uses: Counter[Hashable]) -> list[tuple[str, Any]]:
    """What a metric says of these uses of graphs (`GraphCounter.uses`)."""
    recipes = {graph: str(number) for number, graph in enumerate(dict.fromkeys(graph for _, graph in uses))}
    hits, misses = ({recipes[graph]: n for (how, graph), n in uses.items() if how == what} for what in ("hit", "miss"))
    return {
        "graph_compilation": [("TotalNumber", len(misses)), ("TotalTime", 0), ("AvgTime", 0)],
        "cpu_fallback": [("TotalNumber", 0), ("FallbackOps", {})],
        "memory_defragmentation": [("TotalNumber", 0), ("TotalSuccessful", 0), ("AvgTime", 0), ("MaxTime", 0)],
        "recipe_cache": [
            *[("TotalHit", sum(hits.values())), ("RecipeHit", hits)],
            *[("TotalMiss", len(misses)), ("RecipeMiss", misses)],
        ],
    }[name]


class Metric:
    """Counts from its start on, or from the last `reset`, until `stop`."""

    def __init__(self, name: str, graphs: GraphCounter):
        self._name, self.graphs = name, graphs
        self.reset()

    def name(self) -> str:
        return self._name

    def reset(self) -> None:
        self._counted: Counter[Hashable] = Counter()
        self._since: Counter[Hashable] | None = self.graphs.uses

    def start(self) -> None:
        if self._since is None:
            self._since = self.graphs.uses

    def stop(self) -> None:
        self._counted, self._since = self._count(), None

    def stats(self) -> list[tuple[str, int | float | dict]]:
        return stats(self._name, self._count())

    def _count(self) -> Counter[Hashable]:
        return self._counted if self._since is None else self._counted + (self.graphs.uses - self._since)


_of_process: dict[str, Metric] = {}
_counting = ExitStack()
atexit.register(_counting.close)


def of_process() -> dict[str, Metric]:
    """The metrics of this process by name. Graphs are counted from the first call on."""
    if not _of_process:
        graphs = graph_counter.active or _counting.enter_context(count_graphs())
        _of_process.update({name: Metric(name, graphs) for name in names()})
    return _of_process


class Writer:
    """A file that is made by the first metric that is written to it."""

    def __init__(self, name: str, format: str):
        self.name, self.format = name, format
        self.file: IO[str] | None = None

    def write_all(self, trigger: str) -> None:
        for metric in of_process().values():
            self.write(metric, trigger)

    def write(self, metric: Metric, trigger: str) -> None:
        now = datetime.now().isoformat()
        is_first = self.file is None
        if self.file is None:
            self.file = self._create()
        if self.format == "json":
            entry = {
                "metric_name": metric.name(),
                "triggered_by": trigger,
                "generated_on": now,
                "statistics": dict(metric.stats()),
            }
            self.file.write(("[" if is_first else ",\n") + json.dumps(entry))
        else:
            self.file.write(
                f"Metric name: {metric.name()}\nTriggered by: {trigger}\nGenerated on: {now}\nStatistics:\n"
            )
            self.file.writelines([f"\t{key}: {value}\n" for key, value in metric.stats()] + ["\n"])
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.write("]\n" if self.format == "json" else "")
            self.file.close()
            self.file = None

    def _create(self) -> IO[str]:
        base, dot, extension = self.name.rpartition(".")  # of the whole path, as the plugin does
        if not dot:
            base, extension = self.name, ""
        rank = next((f"-rank{os.environ[variable]}" for variable in RANKS if variable in os.environ), "")
        path = f"{base}{rank}{dot}{extension}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        for number in range(sys.maxsize):
            try:
                return open(f"{path}.{number}" if number else path, "x")
            except FileExistsError:
                continue
        raise FileExistsError(path)


class Saver:
    """Writes to the file of the variables at what they name."""

    def __init__(self, name: str, format: str, triggers: list[str]):
        self.writer, self.triggers = Writer(name, format), triggers
        self.is_started = False

    def start(self) -> None:
        """At the first touch of the device."""
        self.is_started = True
        compiled = of_process()["graph_compilation"]
        if "metric_change" in self.triggers:
            compiled.graphs.when_new = lambda: self.writer.write(compiled, "metric_change")
        atexit.register(self.end)

    def mark_step(self) -> None:
        if self.is_started and "mark_step" in self.triggers:
            self.writer.write_all("mark_step")

    def end(self) -> None:
        of_process()["graph_compilation"].graphs.end_lazy_graph()
        if "process_exit" in self.triggers:
            self.writer.write_all("process_exit")
        self.writer.close()


saver: Saver | None = None


def read_settings() -> None:
    """Reads the variables when the plugin is loaded; ends the process with one line where a plugin would fail."""
    global saver
    name, format = _variable("METRICS_FILE"), _variable("METRICS_FILE_FORMAT", "json")
    triggers = _variable("METRICS_DUMP_TRIGGERS", "process_exit").split(",")
    if not name:
        return
    unknown = [trigger for trigger in triggers if trigger not in TRIGGERS]
    if unknown:
        _refuse("METRICS_DUMP_TRIGGERS", unknown[0], f"give {', '.join(TRIGGERS)}, with commas and without blanks")
    if format not in FORMATS:
        _refuse("METRICS_FILE_FORMAT", format, f"give {' or '.join(FORMATS)}")
    if not os.path.dirname(name):
        _refuse("METRICS_FILE", name, f"the plugin wants a folder: give ./{name}")
    saver = Saver(name, format, triggers)


def _refuse(variable: str, value: str, what_to_do: str) -> None:
    print(f"error: PT_HPU_{variable}: got {value!r}; {what_to_do}", file=sys.stderr)
    raise SystemExit(2)


def start() -> None:
    if saver is not None:
        saver.start()
