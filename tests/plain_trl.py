"""Computes DPO with plain trl, transformers and PEFT on the CPU: run as `plain_trl.py FOLDER`, without the emulator.

FOLDER holds cases.json, a list of {"name", "model", "config", "pairs"}; a model is a folder with an adapter in its
`adapter`. Loss, metrics and gradients of the adapter go to FOLDER/<name>.safetensors.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def collate(pairs: list[dict], collator) -> dict:
    features = []
    for pair in pairs:
        prompt = pair["prompt_input_ids"]
        feature = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            answer = pair[f"{side}_input_ids"]
            feature[f"{side}_input_ids"] = prompt + answer
            feature[f"{side}_attention_mask"] = [1] * len(prompt + answer)
            feature[f"{side}_labels"] = [-100] * len(prompt) + answer
        features.append(feature)
    return collator(features)


def compute(folder: Path, case: dict) -> None:
    model = AutoModelForCausalLM.from_pretrained(case["model"])
    model = PeftModel.from_pretrained(model, f"{case['model']}/adapter", is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(case["model"], pad_token="<|end|>")
    text = Dataset.from_list([{"prompt": "w1", "chosen": "w2", "rejected": "w3"}])
    limits = {"max_length": 128, "max_prompt_length": 64}
    config = DPOConfig(str(folder), use_cpu=True, report_to="none", **limits, **case["config"])
    trainer = DPOTrainer(model, args=config, train_dataset=text, tokenizer=tokenizer)
    loss, metrics = trainer.get_batch_loss_metrics(model, collate(case["pairs"], trainer.data_collator))
    loss.backward()
    results = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    results |= {name: torch.as_tensor(value).detach().float() for name, value in {"loss": loss, **metrics}.items()}
    save_file(results, folder / f"{case['name']}.safetensors")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for case in json.loads((folder / "cases.json").read_text()):
        compute(folder, case)
