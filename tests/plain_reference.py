"""Trains with plain transformers on samples one by one; run by tests in a process that optimum-habana has not patched.

python plain_reference.py MODEL STEPS.json SMOOTHING -> prints the loss of each step as JSON. STEPS.json holds for each
step its samples as {"input_ids": [...], "labels": [...]}; the loss is the mean over all labels of the step, smoothed.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

LEARNING_RATE = 0.5


def main() -> None:
    folder, steps = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    smoothed = partial(torch.nn.functional.cross_entropy, reduction="sum", label_smoothing=float(sys.argv[3]))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for number, samples in enumerate(steps):
        tokens = sum(label != -100 for sample in samples for label in sample["labels"][1:])
        total = 0.0
        for sample in samples:
            ids, labels = (torch.tensor([sample[name]]) for name in ("input_ids", "labels"))
            logits = model(ids).logits[:, :-1].float()
            loss = smoothed(logits.flatten(0, 1), labels[0, 1:]) / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - number / len(steps))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
