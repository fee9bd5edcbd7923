"""The benchmarks still run, on their smallest setting. Run: pytest -m soak tests/test_benchmarks.py"""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import ROOT

SMALLEST = {
    "data.py": "--samples 100 --rounds 1",
    "dpo.py": "--batches 4 --timed_pairs 4 --rounds 1 --pairs 16",
    "generate.py": "--rounds 1 --prompts 1 8",
    "checkpoint.py": "--width 64 --rounds 2",
    "merge.py": "--gigabytes 0.01 --rounds 1 --skip_upstream",
    "launch.py": "--rounds 1",
}


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_keeps_its_figures(name):
    command = [sys.executable, str(ROOT / "benchmarks" / name), *SMALLEST[name].split(), "--json", "out.json"]

    ended = subprocess.run(command, capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stderr
    kept = json.loads(Path("out.json").read_text())
    assert kept["figures"]
    assert kept["versions"]["optimum-habana"] == version("optimum-habana")
