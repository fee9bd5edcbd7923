"""A smoke run on one real Gaudi card, for CI: `make test-hpu`. Skipped where the plugin is the emulator.

Each stage is a process of its own, as users start it, with Gaudi's own metrics file, and is rehearsed after it has run.
The figures stand in a table at the end, what the rehearsal said beside what the card took, and in
runs/test-hpu/report.json, so that owners of a card can send them; beside it answers.json, what the card says to the
questions that the emulator could not settle (tests/card_questions.py, docs/emulator.md).
"""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import ROOT, write_rows
from tiny import save_model

pytestmark = pytest.mark.hpu
REPORT = ROOT / "runs" / "test-hpu"
COMMON = "--dataset_name pairs.jsonl --do_train --do_eval --bf16 --max_steps 8 --logging_steps 1".split()
STAGES = {
    "sft": ["sft.py", "--model_name_or_path", "model", "--output_dir", "sft", "--max_seq_length", "128", *COMMON],
    "merge": ["merge_peft_adapter.py", "--adapter_model_name", "sft", "--output_name", "merged"],
    "dpo": [
        *("dpo.py", "--model_name_or_path", "merged", "--output_dir", "dpo", "--eval_steps", "4"),
        *("--max_prompt_length", "32", "--max_length", "64", *COMMON),
    ],
    "merge again": ["merge_peft_adapter.py", "--adapter_model_name", "dpo", "--output_name", "aligned"],
    "generate": [
        *("run_generation.py", "--model_name_or_path", "aligned", "--prompt", "hello", "--output_dir", "text"),
        *"--use_hpu_graphs --use_kv_cache --bf16 --max_new_tokens 32".split(),
    ],
}


def read_metrics(stage: str) -> dict[str, float]:
    """The last count of each metric that Gaudi's plugin wrote, `{metric_name: TotalNumber}`."""
    counts: dict[str, float] = {}
    for path in sorted(Path().glob(f"{stage}-metrics*.json*")):
        for entry in json.loads(path.read_text()):
            statistics = entry["statistics"]
            counts[entry["metric_name"]] = dict(statistics).get("TotalNumber")
    return counts


def read_results(folder: str) -> dict[str, float]:
    for name in ("all_results.json", "generation_results.json"):
        if (path := Path(folder, name)).exists():
            return json.loads(path.read_text())
    return {}


def rehearse(stage: str, script: str, flags: list[str]) -> dict[str, float | None]:
    """What a rehearsal says of a stage: memory at most, in GB, and graphs after the first steps."""
    command = [sys.executable, str(ROOT / "gaudi_spawn.py"), "--rehearse", "--no_shrunken_run", "--no_alternatives"]
    command += ["--rehearsal_dir", f"{stage}-rehearsal", str(ROOT / script), *flags]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(Path(f"{stage}-rehearsal", "report.json").read_text())
    curve = report["graphs"]["by_step"]
    peak = report["memory_per_card_gb"]["peak"]
    return {"memory_rehearsed_gb": peak or None, "graphs_rehearsed": curve[-1] if curve else None}


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """Runs the stages; one row of figures each."""
    folder = tmp_path_factory.mktemp("card")
    before = os.getcwd()
    os.chdir(folder)
    save_model(folder / "model")
    rows = [{"question": f"what is {i}?", "response_j": f"It is {i}.", "response_k": "No."} for i in range(80)]
    write_rows("pairs.jsonl", rows)
    table = []
    for stage, (script, *flags) in STAGES.items():
        metrics = {"PT_HPU_METRICS_FILE": str(folder / f"{stage}-metrics.json")}
        metrics["PT_HPU_METRICS_DUMP_TRIGGERS"] = "process_exit"
        began = time.monotonic()
        ran = subprocess.run(
            [sys.executable, str(ROOT / script), *flags],
            env=os.environ | metrics,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        results, counts = read_results({"generate": "text"}.get(stage, stage)), read_metrics(stage)
        table.append(
            {
                "stage": stage,
                "seconds": round(time.monotonic() - began, 1),
                "loss": results.get("train_loss"),
                "eval_loss": results.get("eval_loss"),
                "memory_gb": results.get("max_memory_allocated (GB)"),
                "graphs": counts.get("graph_compilation"),
                "recompilations": counts.get("recipe_cache"),
                "tokens_per_second": results.get("tokens_per_second", results.get("train_tokens_per_second")),
                **rehearse(stage, script, flags),
            }
        )
    REPORT.mkdir(parents=True, exist_ok=True)
    about = {name: version(name) for name in ("habana-torch-plugin", "torch", "optimum-habana", "transformers")}
    (REPORT / "report.json").write_text(json.dumps({"versions": about, "stages": table}, indent=2) + "\n")
    for path in folder.glob("*-metrics*.json*"):
        shutil.copy(path, REPORT)
    yield table
    os.chdir(before)


def test_a_small_model_is_tuned_merged_aligned_and_asked_on_the_card(figures, record_table):
    record_table(figures)

    by_stage = {row["stage"]: row for row in figures}
    assert by_stage["sft"]["eval_loss"] > 0
    assert abs(by_stage["dpo"]["loss"]) < 1
    assert by_stage["generate"]["tokens_per_second"] > 0
    assert by_stage["sft"]["graphs"], "Gaudi's metrics file says nothing of graphs"
    for name in ("sft", "dpo"):  # a card has its own kernels and workspaces, but none of another order of magnitude
        assert by_stage[name]["memory_rehearsed_gb"] < 2 * by_stage[name]["memory_gb"] + 0.5


def test_the_card_answers_what_the_emulator_could_not_settle(record_table, tmp_path):
    import card_questions

    REPORT.mkdir(parents=True, exist_ok=True)
    answers = REPORT / "answers.json"
    variables = {"PT_HPU_METRICS_FILE": str(tmp_path / "metrics.json"), "RANK": "0", "PT_HPU_LAZY_MODE": "1"}
    command = [sys.executable, str(ROOT / "tests" / "card_questions.py"), str(answers)]

    ended = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads(answers.read_text())
    files = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("metrics*")}
    names = sorted({entry["metric_name"] for entries in files.values() for entry in entries})
    loads = [sys.executable, "-c", "import torch; print(hasattr(torch, 'hpu'))"]
    loaded = subprocess.run(loads, env=os.environ | variables, capture_output=True, text=True, check=True)
    answered = ", ".join(files), ", ".join(names), loaded.stdout.split()[-1]
    rows += [
        {"question": question, "answer": answer, "emulator": emulated}
        for answer, (question, emulated) in zip(answered, card_questions.OF_PROCESSES.items(), strict=True)
    ]
    answers.write_text(json.dumps(rows, indent=2) + "\n")
    record_table(rows)
    assert all(row["answer"] for row in rows)
