"""What the plugin counts, and the file that it writes (hpu/metrics/ of gaudi-pytorch-bridge 1.19.0)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from habana_frameworks.torch.core import mark_step
from habana_frameworks.torch.hpu.metrics import MetricNotFound, metric_localcontext

CODE = """
import torch
from habana_frameworks.torch.core import mark_step
for length in (2, 3, 2):
    torch.ones(length, device="hpu").add(1)
    mark_step()
"""
GLOBAL = """
import torch
from habana_frameworks.torch.core import mark_step
from habana_frameworks.torch.hpu.metrics import metric_global, metrics_dump
def run(length):
    torch.ones(length, device="hpu").add(1)
    mark_step()
metric = metric_global("graph_compilation")
run(2), run(3), run(2)
metric.stop(), run(4), metric.start(), run(4), run(5)
first = dict(metric.stats())["TotalNumber"]
metric.reset()
metrics_dump("out/dump.json")
print(first, dict(metric.stats())["TotalNumber"], metric_global("none"))
print(dict(metric_global("cpu_fallback").stats()), metric_global("memory_defragmentation").name())
"""


def run_python(code, check=True, **environment):
    variables = {name: value for name, value in os.environ.items() if name != "RANK"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=variables | environment, capture_output=True, text=True, check=check)


def test_a_file_has_three_metrics_at_the_end_and_a_second_run_one_of_its_own():
    for _ in range(2):
        run_python(CODE, PT_HPU_METRICS_FILE="new/metrics.json")

    for name in ("metrics.json", "metrics.json.1"):
        graphs, fallbacks, memory = json.loads(Path("new", name).read_text())
        assert graphs["metric_name"] == "graph_compilation"
        assert graphs["triggered_by"] == "process_exit"
        assert graphs["statistics"] == {"TotalNumber": 2, "TotalTime": 0, "AvgTime": 0}
        assert fallbacks["statistics"] == {"TotalNumber": 0, "FallbackOps": {}}
        assert memory["statistics"].keys() == {"TotalNumber", "TotalSuccessful", "AvgTime", "MaxTime"}


def test_a_rank_writes_its_number_before_the_last_dot_and_tells_each_change():
    rank = run_python(
        CODE,
        PT_HPU_METRICS_FILE="v1.2/metrics",
        PT_HPU_METRICS_DUMP_TRIGGERS="metric_change,mark_step",
        PT_HPU_ENABLE_CACHE_METRICS="1",
        RANK="1",
    )

    said = json.loads(Path("v1-rank1.2/metrics").read_text())
    steps = ["graph_compilation", "cpu_fallback", "memory_defragmentation", "recipe_cache"]
    assert [(entry["triggered_by"], entry["metric_name"]) for entry in said] == [
        ("metric_change", "graph_compilation"),
        *(("mark_step", name) for name in steps),
        ("metric_change", "graph_compilation"),
        *(("mark_step", name) for name in [*steps, *steps]),
    ]
    assert said[-1]["statistics"] == {
        "TotalHit": 1,
        "RecipeHit": {"0": 1},
        "TotalMiss": 2,
        "RecipeMiss": {"0": 1, "1": 1},
    }
    assert "Emulating" not in rank.stderr


def test_a_file_may_be_text_and_its_variables_have_older_names():
    run_python(CODE, HABANA_PT_METRICS_FILE="./metrics", HABANA_PT_METRICS_FILE_FORMAT="text")

    text = Path("metrics").read_text()
    assert text.startswith("Metric name: graph_compilation\nTriggered by: process_exit\nGenerated on: 2")
    assert "Statistics:\n\tTotalNumber: 2\n\tTotalTime: 0\n" in text


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PT_HPU_METRICS_FILE": "metrics.json"}, "METRICS_FILE: got 'metrics.json'; the plugin wants a folder"),
        (
            {"PT_HPU_METRICS_DUMP_TRIGGERS": "process_exit, user"},
            "METRICS_DUMP_TRIGGERS: got ' user'; give process_exit",
        ),
        ({"PT_HPU_METRICS_FILE_FORMAT": "yaml"}, "METRICS_FILE_FORMAT: got 'yaml'; give json or text"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "".join(value),
)
def test_what_fails_in_the_plugin_is_one_line_here(variables, message):
    ended = run_python("import torch", check=False, **{"PT_HPU_METRICS_FILE": "./metrics.json"} | variables)

    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: PT_HPU_{message}")
    assert ended.stderr.count("\n") == 1


def test_the_metrics_of_a_process_start_stop_and_are_written_when_asked_for():
    said = run_python(GLOBAL).stdout.splitlines()

    assert said == ["3 0 None", "{'TotalNumber': 0, 'FallbackOps': {}} memory_defragmentation"]
    entry = json.loads(Path("out/dump.json").read_text())[0]
    assert entry["triggered_by"] == "user"
    assert entry["statistics"]["TotalNumber"] == 0


def test_a_context_counts_what_it_adds():
    with metric_localcontext("graph_compilation") as outer:
        torch.ones(2, device="hpu").add(1)
        mark_step()
        with metric_localcontext("graph_compilation") as inner:
            torch.ones(3, device="hpu").add(1)
            mark_step()
        torch.ones(3, device="hpu").add(1)
        mark_step()

    assert [dict(metric.stats())["TotalNumber"] for metric in (inner, outer)] == [1, 2]
    with pytest.raises(MetricNotFound, match=r"\(graphs\) doesn't exist"), metric_localcontext("graphs"):
        pass
