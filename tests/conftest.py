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
os.environ.setdefault("HABANA_EMULATOR_STRICT", "1")  # also in what turns it off by default to save time
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]


EMULATED = version("habana-torch-plugin").endswith("+cpu")


class EmulatorModule(pytest.Module):
    """Tests of the emulator itself, on a host that has the real plugin."""

    def collect(self):
        pytest.skip("tests the emulator; the plugin here is a real Gaudi's", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    if not EMULATED and (module_path.name.startswith("test_emulator") or module_path.parent.name == "conformance"):
        return EmulatorModule.from_parent(parent, path=module_path)
    return None


def pytest_collection_modifyitems(items):
    if EMULATED:
        no_card = pytest.mark.skip(reason="needs a real Gaudi card; the plugin here is the emulator")
        for item in items:
            if item.get_closest_marker("hpu"):
                item.add_marker(no_card)


TABLES: list[list[dict]] = []


@pytest.fixture
def record_table():
    """`record_table(rows)` shows these rows of figures at the end of the test session."""
    return TABLES.append


def pytest_terminal_summary(terminalreporter):
    for rows in TABLES:
        texts = {type(None): lambda _: "-", float: "{:.4g}".format}
        cells = [list(rows[0]), *([texts.get(type(cell), str)(cell) for cell in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        terminalreporter.section("figures")
        for line in cells:
            terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


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
