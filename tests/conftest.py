"""What all tests share: scripts run in this process, as their imports take longer than their work."""

import importlib
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it: a name that is no folder fails at once
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]


def pytest_collection_modifyitems(items):
    if version("habana-torch-plugin").endswith("+cpu"):
        no_card = pytest.mark.skip(reason="needs a real Gaudi card; the plugin here is the emulator")
        for item in items:
            if item.get_closest_marker("hpu"):
                item.add_marker(no_card)


@pytest.fixture(autouse=True)
def leave_nothing_to_the_next_run():
    """A run leaves its precision, its DeepSpeed file and more where the next one would find them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state()
    if "transformers.integrations.deepspeed" in sys.modules:
        sys.modules["transformers.integrations.deepspeed"].unset_hf_deepspeed_config()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(monkeypatch, capsys):
    """`run("sft.py", "--flag", value, ...)` calls that script's `main` with this command line; returns its output."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        importlib.import_module(script.removesuffix(".py")).main()
        return capsys.readouterr()

    return run


def write_rows(path, rows):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
