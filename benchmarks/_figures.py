"""What benchmarks share: how rounds are compared, and a JSON file of figures beside what they were measured with."""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "runs" / "benchmarks"
NOISY = 0.15  # spread of a ratio above which it is marked
PACKAGES = ("optimum-habana", "transformers", "trl", "peft", "datasets", "deepspeed", "accelerate", "torch")


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    path = FOLDER / f"{Path(sys.argv[0]).stem}.json"
    parser.add_argument("--json", type=make_absolute, default=path, help="where the figures go (default: %(default)s)")


def make_absolute(name: str) -> Path:
    return Path(name).absolute()  # before a benchmark goes to a folder of its own


def compare_rounds(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """Ratios within each round, as a host's speed changes from one to the next: their median, and their spread.

    The spread is the highest less the lowest, as a share of the median.
    """
    ratios = [ours / theirs for ours, theirs in zip(values, baseline, strict=True)]
    middle = statistics.median(ratios)
    return middle, (max(ratios) - min(ratios)) / middle


def show_spread(spread: float) -> str:
    return f"{spread:.0%}{' !' if spread > NOISY else ''}"


def keep(path: Path, figures: list | dict) -> None:
    """Writes them with the command, the versions of packages and the host, and names the file."""
    host = {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0)), "cpu": platform.processor()}
    about = {"command": shlex.join(sys.argv), "host": host, "versions": {name: version(name) for name in PACKAGES}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "figures": figures}, indent=2) + "\n", encoding="utf-8")
    print(f"\nfigures: {path}")
