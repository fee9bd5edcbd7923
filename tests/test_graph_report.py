"""What a run took, beside what its rehearsal said. Run: pytest tests/test_graph_report.py"""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from conftest import ROOT

from align.rehearsal import measuring

SCRIPT = """
import json, torch
from habana_frameworks.torch.core import mark_step
for length in (2, 2, 3):
    torch.ones(length, device="hpu").add(1)
    mark_step()
json.dump({"max_memory_allocated (GB)": 1.5, "train_runtime": 9.0}, open("all_results.json", "w"))
"""


def test_a_graph_report_shows_what_a_run_took_beside_what_its_rehearsal_said():
    Path("script.py").write_text(SCRIPT)
    command = ["script.py", "--output-dir", "."]
    rehearsed: dict = {"memory_per_card_gb": {"peak": 1.25, "between_steps": 0.5}, "graphs": {"by_step": [1, 2]}}
    Path("rehearsal").mkdir()
    Path("rehearsal/report.json").write_text(
        json.dumps(rehearsed | {"about": {"command": ["script.py", "--output_dir", "."]}})
    )

    spawn = [sys.executable, str(ROOT / "gaudi_spawn.py"), "--graph_report", "took.json", *command]
    ended = subprocess.run(spawn, capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stderr
    report = json.loads(Path("took.json").read_text())
    assert report["measured"].items() >= {"graphs": 2, "cpu_fallbacks": 0, "memory_gb": 1.5, "seconds": 9.0}.items()
    assert report["rehearsed"] == {"memory_gb": 1.25, "memory_between_steps_gb": 0.5, "graphs": 2}
    assert ["memory", "gb", "1.5", "1.25"] in [line.split() for line in ended.stdout.splitlines()]


def test_a_metrics_file_that_is_not_whole_and_results_of_an_earlier_run_are_left_out(capsys):
    began = time.time()
    Path("metrics-rank0.json").write_text('[{"metric_name": "graph_comp')
    Path("all_results.json").write_text('{"train_runtime": 9.0}')
    run = SimpleNamespace(script=["sft.py", "--output_dir", "."])

    assert measuring.read_metrics(Path("metrics.json"), began - 1) == {}
    assert "metrics-rank0.json is not whole, and is left out of the report" in capsys.readouterr().err
    assert measuring.read_results(run, began - 1) == {"seconds": 9.0}
    assert measuring.read_results(run, began + 60) == {}
