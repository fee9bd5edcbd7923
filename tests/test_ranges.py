"""Every number that a flag cannot take is one clear line, before anything loads. Run: pytest tests/test_ranges.py"""

import contextlib
import importlib
import math
import sys

import pytest

from align.errors import InputError
from align.ranges import RANGES

# What needs no range: no_effect flags are refused as such, the others may be any number.
WITHOUT = {
    "local_rank",
    "label_pad_token_id",
    "padding_value",
    "max_target_length",
    "past_index",
    "fsdp_min_num_params",
}
WITHOUT |= {"per_gpu_train_batch_size", "per_gpu_eval_batch_size", "tpu_num_cores", "dataset_num_proc"}
WITHOUT |= {"dataset_batch_size", "num_of_sequences", "chars_per_token"}


def parsers():
    from align import cli

    for name in ("sft", "dpo", "run_generation"):
        module = importlib.import_module(name)
        yield name, cli.make_parser(module.ARGUMENTS, module.__doc__, getattr(module, "RECIPE", {}))


def wrong_values(name):
    allowed = RANGES[name]
    yield from ("nan", "inf", "-inf", "many", "", "1" + "0" * 30)
    for value in (allowed.low - 1, allowed.high + 1, allowed.low if allowed.above else math.nan):
        if math.isfinite(value) and value != allowed.special:
            yield f"{value:.12g}"
    yield from ["-2"]


LAUNCHER = ["world_size", "master_port", "grace_period", "stall_timeout", "card_memory"]
CASES = [(name, value) for name in RANGES for value in wrong_values(name)]


def test_the_table_tries_a_few_hundred_wrong_numbers():
    assert len(CASES) >= 150


@pytest.fixture(scope="module")
def known():
    found = {name: {action.dest: action for action in parser._actions} for name, parser in parsers()}
    return {**found, "gaudi_spawn": LAUNCHER, "merge_peft_adapter": ["num_workers"]}


@pytest.mark.parametrize("script", ["sft", "dpo", "run_generation"])
def test_every_numeric_flag_has_a_range(script, known):
    numeric = {name for name, action in known[script].items() if callable(action.type)}
    numeric = {name for name in numeric if is_numeric(known[script][name])}
    assert numeric - RANGES.keys() - WITHOUT == set()
    assert {name for name in RANGES if name in known[script]} == numeric & RANGES.keys()


def is_numeric(action):
    for text in ("0.4", "1", "7"):
        with contextlib.suppress(Exception):  # whatever a type raises
            return action.choices is None and not isinstance(action.type(text), bool | str)
    return False


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_number_out_of_range_is_one_line_that_names_the_flag(name, value, known, monkeypatch, tmp_path):
    scripts = [script for script, flags in known.items() if name in flags]
    assert scripts
    for script in scripts:
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", f"--{name}={value}", "--model_name_or_path", "nowhere"])

        with pytest.raises(InputError) as error:
            module.main()

        assert f"--{name}" in str(error.value)
        assert "give" in str(error.value)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_with_a_number_is_told_in_a_line_that_can_be_read(monkeypatch):
    import sft

    for value, told in {
        "9" * 5000: "got '999",
        "1" + "0" * 30: "give at most 2147483647",
        "1e-320": "give 1e-12 to 1000",
    }.items():
        name = "learning_rate" if "e" in value else "max_steps"
        monkeypatch.setattr(sys, "argv", ["sft.py", f"--{name}={value}"])
        with pytest.raises(InputError) as error:
            sft.main()
        assert f"--{name}: got" in str(error.value)
        assert told in str(error.value)
        assert len(str(error.value)) < 120
