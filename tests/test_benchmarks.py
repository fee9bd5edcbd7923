"""The benchmarks still run, on their smallest setting. Run: pytest -m soak tests/test_benchmarks.py"""

import subprocess
import sys

import pytest
from conftest import ROOT

SMALLEST = {
    "data.py": "--samples 100 --rounds 1 --json out.json",
    "dpo.py": "--batches 4 --steps 2 --rounds 1 --pairs 16",
    "generate.py": "--rounds 1 --prompts 1 8 --output out.json",
    "checkpoint.py": "--width 64 --rounds 2",
    "merge.py": "--gigabytes 0.01 --rounds 1 --skip_upstream --output out.json",
    "launch.py": "--rounds 1",
}


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_prints_its_table(name):
    command = [sys.executable, str(ROOT / "benchmarks" / name), *SMALLEST[name].split()]

    ended = subprocess.run(command, capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) > 2
