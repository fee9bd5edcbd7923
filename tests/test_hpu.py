"""A smoke run on one real Gaudi card, for CI: `make test-hpu`. Skipped where the plugin is the emulator."""

import json
from pathlib import Path

import pytest
from conftest import write_rows
from tiny import save_model

pytestmark = pytest.mark.hpu


def test_a_small_model_is_tuned_merged_aligned_and_asked_on_the_card(run, tmp_path):
    save_model(tmp_path / "model")
    rows = [{"question": f"what is {i}?", "response_j": f"It is {i}.", "response_k": "No."} for i in range(40)]
    write_rows("pairs.jsonl", rows)
    common = "--dataset_name pairs.jsonl --do_train --do_eval --bf16 --max_steps 3 --logging_steps 1".split()
    run("sft.py", "--model_name_or_path", "model", "--output_dir", "sft", "--max_seq_length", "128", *common)
    run("merge_peft_adapter.py", "--adapter_model_name", "sft", "--output_name", "merged")
    limits = ["--max_prompt_length", "32", "--max_length", "64"]
    run("dpo.py", "--model_name_or_path", "merged", "--output_dir", "dpo", "--eval_steps", "2", *limits, *common)
    ask = "--use_hpu_graphs --use_kv_cache --bf16 --max_new_tokens 8 --prompt hello --output_dir text".split()
    run("run_generation.py", "--model_name_or_path", "merged", *ask)

    for stage in ("sft", "dpo"):
        assert json.loads(Path(stage, "all_results.json").read_text())["eval_loss"] > 0
    assert json.loads(Path("text/generations.jsonl").read_text())["prompt"] == "hello"
