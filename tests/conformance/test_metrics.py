"""What the plugin counts, and the file that it writes (hpu/metrics/ of gaudi-pytorch-bridge 1.19.0).

Run: pytest tests/conformance/test_metrics.py
"""

import atexit
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from habana_frameworks.emulator import metrics_file
from habana_frameworks.emulator.graph_counter import count_graphs
from habana_frameworks.torch.core import mark_step
from habana_frameworks.torch.hpu.metrics import (
    MetricDumpFormat,
    MetricNotFound,
    metric_global,
    metric_localcontext,
    metrics_dump,
)


@pytest.fixture
def process(monkeypatch):
    """`process(NAME=value, ...)` loads the plugin with these variables, as a process of its own would be."""
    torch.hpu.init()  # the first touch of the device starts the file of this process, if any
    for name in [name for name in os.environ if "METRICS" in name or name == "RANK"]:
        monkeypatch.delenv(name)

    def load(**variables):
        monkeypatch.setattr(metrics_file, "_of_process", {})
        monkeypatch.setattr(metrics_file, "saver", None)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        metrics_file.read_settings()
        metrics_file.start()
        if metrics_file.saver is not None:
            atexit.unregister(metrics_file.saver.end)
        return metrics_file.saver

    with count_graphs():
        yield load


def run(*lengths):
    """A graph for each length."""
    for length in lengths:
        torch.ones(length, device="hpu").add(1)
        mark_step()


def test_a_process_writes_its_file_when_it_ends():
    code = "import torch; torch.ones(2, device='hpu').add(1)"

    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PT_HPU_METRICS_FILE": "new/metrics"}, check=True)

    (path,) = Path("new").iterdir()
    assert [entry["metric_name"] for entry in json.loads(path.read_text())] == [
        *("graph_compilation", "cpu_fallback", "memory_defragmentation")
    ]


def test_a_file_has_three_metrics_at_the_end_and_a_second_run_one_of_its_own(process):
    for _ in range(2):
        saver = process(PT_HPU_METRICS_FILE="new/metrics.json")
        run(2, 3, 2)
        saver.end()

    for name in ("metrics.json", "metrics.json.1"):
        graphs, fallbacks, memory = json.loads(Path("new", name).read_text())
        assert graphs["triggered_by"] == "process_exit"
        assert graphs["statistics"].keys() == {"TotalNumber", "TotalTime", "AvgTime"}
        assert fallbacks["statistics"] == {"TotalNumber": 0, "FallbackOps": {}}
        assert memory["statistics"].keys() == {"TotalNumber", "TotalSuccessful", "AvgTime", "MaxTime"}


def test_a_rank_writes_its_number_before_the_last_dot_and_tells_each_change(process):
    saver = process(
        PT_HPU_METRICS_FILE="v1.2/metrics",
        PT_HPU_METRICS_DUMP_TRIGGERS="metric_change,mark_step",
        PT_HPU_ENABLE_CACHE_METRICS="1",
        RANK="1",
    )
    run(2, 3, 2)
    saver.end()

    said = json.loads(Path("v1-rank1.2/metrics").read_text())
    steps = ["graph_compilation", "cpu_fallback", "memory_defragmentation", "recipe_cache"]
    assert [(entry["triggered_by"], entry["metric_name"]) for entry in said] == [
        ("metric_change", "graph_compilation"),
        *(("mark_step", name) for name in steps),
        ("metric_change", "graph_compilation"),
        *(("mark_step", name) for name in [*steps, *steps]),
    ]
    cache = {"TotalHit": 1, "RecipeHit": {"0": 1}, "TotalMiss": 2, "RecipeMiss": {"0": 1, "1": 1}}
    assert said[-1]["statistics"] == cache


def test_a_file_may_be_text_and_its_variables_have_older_names(process):
    saver = process(HABANA_PT_METRICS_FILE="./metrics", HABANA_PT_METRICS_FILE_FORMAT="text")
    run(2, 3)
    saver.end()

    text = Path("metrics").read_text()
    assert text.startswith("Metric name: graph_compilation\nTriggered by: process_exit\nGenerated on: 2")
    assert "Statistics:\n\tTotalNumber: 2\n\tTotalTime: 0\n" in text


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("METRICS_FILE", "metrics.json", "got 'metrics.json'; the plugin wants a folder: give ./metrics.json"),
        (
            "METRICS_DUMP_TRIGGERS",
            "process_exit, user",
            "got ' user'; give process_exit, mark_step, metric_change, user",
        ),
        ("METRICS_FILE_FORMAT", "yaml", "got 'yaml'; give json or text"),
    ],
)
def test_what_fails_in_the_plugin_is_one_line_here(process, capsys, variable, value, message):
    variables = {"PT_HPU_METRICS_FILE": "./metrics.json"} | {f"PT_HPU_{variable}": value}

    with pytest.raises(SystemExit) as ended:
        process(**variables)

    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: PT_HPU_{variable}: {message}")


def test_the_metrics_of_a_process_start_stop_and_are_written_when_asked_for(process):
    process()
    metric = metric_global("graph_compilation")
    run(2, 3, 2)
    metric.stop()
    run(4)
    metric.start()
    run(4, 5)
    counted = dict(metric.stats())["TotalNumber"]
    metric.reset()
    run(6)
    metrics_dump("out/dump.json", MetricDumpFormat.json)

    entry = json.loads(Path("out/dump.json").read_text())[0]
    assert (counted, entry["statistics"]["TotalNumber"]) == (3, 1)
    assert entry["triggered_by"] == "user"
    assert metric_global("cpu_fallback").name() == "cpu_fallback"
    assert metric_global("none") is None


def test_a_context_counts_what_it_adds():
    with metric_localcontext("graph_compilation") as outer:
        run(2)
        with metric_localcontext("graph_compilation") as inner:
            run(3)
        run(3)

    assert [dict(metric.stats())["TotalNumber"] for metric in (inner, outer)] == [1, 2]
    with pytest.raises(MetricNotFound, match=r"\(graphs\) doesn't exist"), metric_localcontext("graphs"):
        pass
