"""Loads what a pipeline saved with plain transformers and PEFT, without this project: run by tests in a process.

python plain_logits.py FOLDER ... -> for each pipeline's folder a line of JSON: the largest differences of logits.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def measure(folder: Path) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged_dpo")
    ids = tokenizer("Question: what is two and two?\n\nAnswer:", return_tensors="pt").input_ids
    measured, base = {}, folder / "model"
    for stage in ("sft", "dpo"):
        start = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
        before = start(ids).logits
        expected = PeftModel.from_pretrained(start, folder / stage)(ids).logits
        base = folder / f"merged_{stage}"
        merged = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)(ids).logits
        measured[stage] = (merged - expected).abs().max().item()
        measured[f"{stage}_learnt"] = (merged - before).abs().max().item()
    return measured


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps(measure(Path(argument))))
