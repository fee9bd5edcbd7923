"""Plain trl's newest release on samples that are tokenized: benchmarks/data.py --peer runs this in trl's environment.

    runs/peer/bin/python benchmarks/_peer.py MODEL SAMPLES OUTPUT STEPS BATCH_SIZE LONGEST

Prints useful and computed tokens of the steps, shapes, and CPU seconds, as JSON. Packed samples of a batch are one row
without padding (packing_strategy "bfd"), whose length is another one at each step.
"""

import json
import sys
import time

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Watch(TrainerCallback):
    """Counts what goes into the model, and the CPU time from the first step on."""

    def __init__(self):
        self.start, self.shapes, self.tokens = 0.0, set(), 0

    def on_train_begin(self, *_, model, **__):
        model.get_input_embeddings().register_forward_pre_hook(self.note)

    def note(self, _, inputs):
        self.start = self.start or time.process_time()
        self.shapes.add(tuple(inputs[0].shape))
        self.tokens += inputs[0].numel()


def main() -> None:
    model, samples, output, steps, batch_size, longest = sys.argv[1:]
    watch = Watch()
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        args=SFTConfig(
            output_dir=output,
            use_cpu=True,
            packing=True,
            max_length=int(longest),
            per_device_train_batch_size=int(batch_size),
            max_steps=int(steps),
            gradient_checkpointing=False,  # which it would turn on by itself
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files=samples, split="train"),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds = time.process_time() - watch.start
    print(json.dumps({"tokens": watch.tokens, "seconds": seconds, "shapes": len(watch.shapes)}))


if __name__ == "__main__":
    main()
