"""Losses of transformers' own Trainer on the CPU; run by tests in a process that optimum-habana has not patched.

python plain_trainer.py MODEL SAMPLES.json STEPS LOSSES.json, where each step trains on all samples.
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments


def main() -> None:
    folder, samples, steps, losses = sys.argv[1:]
    samples = json.loads(Path(samples).read_text())
    arguments = TrainingArguments(
        output_dir=str(Path(losses).parent),
        use_cpu=True,
        max_steps=int(steps),
        per_device_train_batch_size=len(samples),
        learning_rate=1e-3,
        adam_epsilon=1e-12,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"),
        args=arguments,
        train_dataset=Dataset.from_list(samples),
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(folder)),
    )
    trainer.train()
    Path(losses).write_text(json.dumps([e["loss"] for e in trainer.state.log_history if "loss" in e]))


if __name__ == "__main__":
    main()
