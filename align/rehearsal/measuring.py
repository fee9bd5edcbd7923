"""`gaudi_spawn.py --graph_report`: what a run on cards took, from Gaudi's own metrics file and the run's results.

The figures are those that a rehearsal predicts; where there is one of the same command, they stand beside it.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from pathlib import Path

from align.cli import with_underscores
from align.launch.engines import Run
from align.rehearsal.judging import flag_values

# A figure, the metric or result that it is read from, and what of it
METRICS = {
    "graphs": ("graph_compilation", "TotalNumber"),
    "graph_seconds": ("graph_compilation", "TotalTime"),
    "cpu_fallbacks": ("cpu_fallback", "TotalNumber"),
    "defragmentations": ("memory_defragmentation", "TotalNumber"),
}
RESULTS = {
    "memory_gb": "max_memory_allocated (GB)",
    "memory_between_steps_gb": "memory_allocated (GB)",
    "seconds": "train_runtime",
}
NAMES = ("all_results.json", "generation_results.json", "benchmark.json")


def run_and_report(
    run: Run, environment: MutableMapping[str, str], start: Callable[[], int], file: Path, rehearsal: Path
) -> int:
    """Starts the run with Gaudi's metrics on, writes the report to `file` and prints it. Returns the run's exit code.

    `environment` is that of the run; a metrics file that it names already is read where it is.
    """
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(environment.setdefault("PT_HPU_METRICS_FILE", str(Path(folder, "metrics.json"))))
        environment.setdefault("PT_HPU_METRICS_DUMP_TRIGGERS", "process_exit")
        began = time.time()
        code = start()
        measured = read_metrics(metrics, began) | (read_results(run, began) if code == 0 else {})
    about = {"command": run.script, "cards": run.world_size, "exit_code": code}
    report = {"measured": measured, "rehearsed": read_rehearsal(rehearsal, run), "about": about}
    file.write_text(json.dumps(report, indent=2) + "\n")
    print(render(report, file))
    return code


def read_metrics(path: Path, began: float) -> dict[str, float]:
    """The last count of each metric, the highest among ranks: the plugin writes a file a rank, `metrics-rank0.json`.

    Files from before `began` (seconds since the epoch) are another run's.
    """
    figures: dict[str, float] = {}
    files = path.parent.glob(f"{path.stem}*{path.suffix}*")
    for part in (file for file in files if file.stat().st_mtime >= began):
        try:
            entries = {each["metric_name"]: dict(each["statistics"]) for each in json.loads(part.read_text())}
        except (ValueError, KeyError, TypeError):  # of a rank that was killed while it wrote
            print(f"{part} is not whole, and is left out of the report", file=sys.stderr)
            continue
        for name, (metric, statistic) in METRICS.items():
            if (value := entries.get(metric, {}).get(statistic)) is not None:
                figures[name] = max(value, figures.get(name, value))
    return figures


def read_results(run: Run, began: float) -> dict[str, float]:
    """Memory of rank 0's card and the time of the training, as the script has saved them since `began`."""
    folder = next(
        iter(flag_values(with_underscores(run.script), "--output_dir")),
        "results" if Path(run.script[0]).name == "dpo.py" else "",
    )
    for path in (Path(folder, name) for name in NAMES if folder):
        with suppress(OSError, ValueError):  # another script, or a run that has not ended well
            if path.stat().st_mtime >= began:
                results = json.loads(path.read_text())
                return {name: results[key] for name, key in RESULTS.items() if key in results}
    return {}


def read_rehearsal(folder: Path, run: Run) -> dict[str, float]:
    """The same figures of a rehearsal of the same command in `folder`, if there is one."""
    with suppress(OSError, ValueError, KeyError, StopIteration):
        report = json.loads((folder / "report.json").read_text())
        stages = report.get("stages", [report])
        stage = next(stage for stage in stages if stage["about"]["command"] == with_underscores(run.script))
        memory, curve = stage["memory_per_card_gb"], stage["graphs"]["by_step"]
        figures: dict[str, float] = {"memory_gb": memory["peak"], "memory_between_steps_gb": memory["between_steps"]}
        if curve:
            figures["graphs"] = curve[-1]
        return {name: value for name, value in figures.items() if value}
    return {}


def render(report: dict, file: Path) -> str:
    measured, rehearsed = report["measured"], report["rehearsed"]
    lines = [f"{'':26}{'measured':>12}{'rehearsed':>12}"]
    for name in measured | rehearsed:
        figures = [each.get(name) for each in (measured, rehearsed)]
        cells = "".join(f"{'-' if figure is None else format(figure, '.4g'):>12}" for figure in figures)
        lines.append(f"{name.replace('_', ' '):26}{cells}")
    if not measured:
        lines.append("no figures: Gaudi's plugin wrote no metrics, and the run no results")
    return "\n".join([*lines, f"Report: {file}"])
