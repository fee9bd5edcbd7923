"""PT_HPU_METRICS_FILE: where to write at exit how many graphs a process would have compiled, in the real plugin's form.

Of its metrics there is graph_compilation with TotalNumber; times have no meaning here. Each of several ranks writes a
file of its own, `metrics.json` becoming `metrics-RANK.json`.
"""

import atexit
import json
import os
import time
from contextlib import ExitStack
from pathlib import Path

from habana_frameworks.emulator.graph_counter import GraphCounter, count_graphs


def start() -> None:
    """Counts from now on, if the variable is set."""
    path = Path(os.environ.get("PT_HPU_METRICS_FILE", ""))
    if not path.name:
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        path = path.with_stem(f"{path.stem}-{os.environ['RANK']}")
    counting = ExitStack()
    atexit.register(_write, path, counting, counting.enter_context(count_graphs()))


def _write(path: Path, counting: ExitStack, graphs: GraphCounter) -> None:
    counting.close()
    metric = {
        "metric_name": "graph_compilation",
        "triggered_by": "process_exit",
        "generated_on": time.strftime("%d-%m-%Y %H:%M:%S"),
        "statistics": {"TotalNumber": graphs.distinct},
    }
    path.write_text(json.dumps([metric], indent=4) + "\n")
