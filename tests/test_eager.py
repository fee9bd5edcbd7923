"""Eager mode, in which a plugin has no HPU graphs, and lazy mode. Run: pytest tests/test_eager.py"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_rows
from tiny import save_model

from align.errors import InputError

TRAIN = "--do_train --do_eval --max_steps 2 --logging_steps 1 --bf16 --disable_tqdm True".split()
RUNS = {
    "sft.py": [
        *("--model_name_or_path", "model", "--max_seq_length", "64", "--output_dir", "sft", *TRAIN),
        *("--profiling_warmup_steps", "1", "--profiling_steps", "1"),
    ],
    "merge_peft_adapter.py": ["--adapter_model_name", "sft", "--output_name", "merged"],
    "dpo.py": ["--model_name_or_path", "merged", "--max_prompt_length", "32", "--max_length", "64", *TRAIN],
    "run_generation.py": ["--model_name_or_path", "merged", "--prompt", "Hi", "--max_new_tokens", "8", "--bf16"],
}
RUNS["dpo.py"] += ["--output_dir", "dpo", "--eval_steps", "2", "--sample_prompts", "2"]
# One process for all, as their imports take longest.
IN_TURN = """
import importlib, json, sys
for script, flags in json.loads(sys.argv[1]).items():
    sys.argv = [script, *flags]
    importlib.import_module(script.removesuffix(".py")).main()
from habana_frameworks.torch import hpu
print(hasattr(hpu, "wrap_in_hpu_graph"), hasattr(hpu, "HPUGraph"))
"""


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        ("sft.py", "--use_lazy_mode"),
        ("sft.py", "--use_hpu_graphs_for_training"),
        ("dpo.py", "--use_hpu_graphs_for_inference"),
        ("run_generation.py", "--use_hpu_graphs"),
    ],
)
def test_what_eager_mode_lacks_is_refused_before_anything_is_loaded(script, flag, run, monkeypatch):
    monkeypatch.setenv("PT_HPU_LAZY_MODE", "0")

    with pytest.raises(InputError, match=rf"^{flag}: the variable PT_HPU_LAZY_MODE=0 asks for eager mode"):
        run(script, "--model_name_or_path", "none", "--output_dir", "out", "--do_sample", flag)


def test_compiling_needs_eager_mode(run):
    with pytest.raises(InputError, match=r"^--torch_compile: needs eager mode; set the variable PT_HPU_LAZY_MODE=0"):
        run("sft.py", "--model_name_or_path", "none", "--output_dir", "out", "--torch_compile", "True")


def test_lazy_mode_is_refused_where_the_plugin_is_eager_unless_told(run, monkeypatch):
    monkeypatch.setattr("habana_frameworks.torch.utils.internal.is_lazy", lambda: False)

    with pytest.raises(InputError, match=r"^--use_lazy_mode: this plugin is in eager mode; set .* PT_HPU_LAZY_MODE=1"):
        run("sft.py", "--model_name_or_path", "none", "--output_dir", "out", "--do_train")


EAGER = {"PT_HPU_LAZY_MODE": "0"}
LAZY = {"PT_HPU_LAZY_MODE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # a plugin of 1.19 then waits to be imported


@pytest.mark.soak
@pytest.mark.parametrize(
    ("variables", "flags", "graphs"),
    [(EAGER, ["--torch_compile", "True"], "False False"), (LAZY, ["--use_hpu_graphs_for_training"], "True True")],
    ids=["eager", "lazy, where torch does not load the plugin"],
)
def test_every_script_runs_in_either_mode(variables, flags, graphs):
    save_model("model", tokenizer="llama-3")
    rows = [{"question": f"{i}?", "response_j": f"It is {i}.", "response_k": "No."} for i in range(40)]
    write_rows("pairs.jsonl", rows)
    runs = {
        name: [*given, "--dataset_name", "pairs.jsonl"] if "--do_train" in given else given
        for name, given in RUNS.items()
    }
    runs["sft.py"] += flags
    environment = {**os.environ, **variables, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}

    ended = subprocess.run(
        [sys.executable, "-c", IN_TURN, json.dumps(runs)], env=environment, capture_output=True, text=True, check=False
    )

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == graphs
    assert list(Path("hpu_profile").rglob("*.json"))
    for name in ("sft", "dpo"):
        results = json.loads(Path(name, "all_results.json").read_text())
        assert results["train_loss"] > 0
        assert results["eval_loss"] > 0


@pytest.mark.soak
def test_a_launch_hands_eager_mode_to_its_ranks():
    Path("rank.py").write_text(
        "from habana_frameworks.torch import hpu\nprint('graphs', hasattr(hpu, 'wrap_in_hpu_graph'), flush=True)\n"
    )
    command = [sys.executable, ROOT / "gaudi_spawn.py", "--world_size", "2", "rank.py"]
    environment = os.environ | EAGER

    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("graphs False") == 2
