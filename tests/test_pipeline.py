"""Every family through sft, merge, dpo, merge and generation, as a user would. Run: pytest tests/test_pipeline.py"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_rows
from tiny import save_model

HPU = "--use_habana --use_lazy_mode --bf16 --use_hpu_graphs_for_inference --disable_tqdm True --logging_steps 1".split()
TRAIN = "--do_train --do_eval --max_steps 3 --learning_rate 5e-3 --per_device_train_batch_size 2".split()
DPO = "--warmup_steps 0 --eval_steps 2 --max_prompt_length 32 --max_length 64".split()
ASK = "--use_hpu_graphs --use_kv_cache --bf16 --batch_size 1 --max_new_tokens 8".split()


@pytest.mark.parametrize(
    ("family", "sft_flags", "dpo_flags"),
    [
        ("llama", "--gradient_checkpointing", "--dataloader_num_workers 2"),
        ("mistral", "--packing False --num_buckets 4", "--gradient_checkpointing"),
        ("mixtral", "--dataloader_num_workers 2", ""),
        ("qwen2", "--streaming True --size_valid_set 5", "--streaming True --size_valid_set 5"),
        ("gpt2", "--packing False --pad_max True", "--precompute_ref_log_probs"),
    ],
)
def test_a_model_is_tuned_merged_aligned_merged_and_asked(run, tmp_path, family, sft_flags, dpo_flags):
    save_model(tmp_path / "model", family, "gpt2" if family == "gpt2" else "llama-3")
    rows = [
        {"question": f"what is two and {i}?", "response_j": f"It is {i + 2}, thank you.", "response_k": f"{i + 2}"}
        for i in range(40)
    ]
    write_rows("pairs.jsonl", rows)
    common = ["--dataset_name", "pairs.jsonl", *HPU, *TRAIN]

    sft = ["--model_name_or_path", "model", "--output_dir", "sft", "--max_seq_length", "96"]
    run("sft.py", *sft, *common, *sft_flags.split())
    run("merge_peft_adapter.py", "--adapter_model_name", "sft", "--output_name", "merged_sft")
    dpo = [
        "--model_name_or_path",
        "merged_sft",
        "--output_dir",
        "dpo",
        "--max_prompt_length",
        "32",
        "--max_length",
        "64",
    ]
    run("dpo.py", *dpo, *common, "--eval_steps", "2", *dpo_flags.split())
    run("merge_peft_adapter.py", "--adapter_model_name", "dpo", "--output_name", "merged_dpo")
    ask = ["--model_name_or_path", "merged_dpo", "--prompt", rows[0]["question"], "--output_dir", "text"]
    run("run_generation.py", *ask, *ASK)

    answer = json.loads(Path("text/generations.jsonl").read_text())
    assert answer["prompt"] == rows[0]["question"]
    script = [sys.executable, Path(__file__).parent / "plain_logits.py", tmp_path]
    measured = json.loads(subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    for stage in ("sft", "dpo"):
        results = json.loads(Path(stage, "all_results.json").read_text())
        assert {"train_loss", "eval_loss"} <= results.keys()
        assert Path(stage, "curves.png").stat().st_size > 1000
        assert measured[stage] < 1e-4 < measured[f"{stage}_learnt"]
