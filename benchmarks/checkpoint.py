"""What a checkpoint costs: sft.py's, which is checked, hashed, flushed and renamed, against that of a plain Trainer.

python benchmarks/checkpoint.py                    some minutes on two quiet cores
python benchmarks/checkpoint.py --width 1024 --rounds 12

In one run with --save_steps 1 the two ways take turns, so that both meet the same disk and the same steps. "step" is
one without its checkpoint; the last columns are what a run costs that saves at every step or at every tenth, of the
plain one's. A plain checkpoint is not on the disk when the next step begins; sft.py waits for it.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from _figures import add_json_flag, keep

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HABANA_EMULATOR_STRICT", "0")

from conftest import write_rows
from optimum.habana import GaudiTrainer
from test_dpo import make_rows
from tiny import save_model

import sft
from align.training.supervised import SupervisedTrainer

KINDS = {"adapter": [], "all weights": ["--use_peft", "False"]}
OURS, PLAIN = "sft.py", "plain Trainer"


class Watch:
    """Seconds and bytes of each checkpoint, and seconds of the steps between them."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = {OURS: [], PLAIN: []}
        self.bytes: dict[str, int] = {}
        self.steps: list[float] = []
        self.ended = 0.0
        self.ours = SupervisedTrainer._save_checkpoint

    def save(self, trainer, model, trial=None) -> None:
        began = time.perf_counter()
        if self.ended:
            self.steps.append(began - self.ended)
        way = OURS if trainer.state.global_step % 2 else PLAIN
        if way == OURS:
            self.ours(trainer, model, trial)
        else:
            trainer.save_model = partial(GaudiTrainer.save_model, trainer)
            GaudiTrainer._save_checkpoint(trainer, model, trial)
            del trainer.save_model
        self.seconds[way].append(time.perf_counter() - began)
        os.sync()  # else ours, which waits for the disk, would wait for what the plain one has left to be written
        folder = Path(trainer.args.output_dir, f"checkpoint-{trainer.state.global_step}")
        self.bytes[way] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shutil.rmtree(folder)
        self.ended = time.perf_counter()


def measure(flags: list[str], rounds: int) -> Watch:
    watch = Watch()
    SupervisedTrainer._save_checkpoint = lambda *arguments: watch.save(*arguments)  # noqa: PLW0108 - as a method
    command = "--do_train --bf16 False --disable_tqdm True --log_level error --max_seq_length 256 --save_steps 1"
    command += f" --per_device_train_batch_size 2 --skip_probe True --max_steps {2 * rounds + 2}"
    paths = ["--model_name_or_path", "model", "--dataset_name", "rows.jsonl", "--output_dir", "out"]
    sys.argv = ["sft.py", *command.split(), *paths, "--overwrite_output_dir", *flags]
    try:
        sft.main()
    finally:
        SupervisedTrainer._save_checkpoint = watch.ours
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="hidden size of the model, which has 8 layers")
    parser.add_argument("--rounds", type=int, default=8, help="checkpoints of each way; the first of each is left out")
    add_json_flag(parser)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # a disk, where /tmp may be memory
        os.chdir(folder)
        sizes = {"hidden_size": args.width, "intermediate_size": 11 * args.width // 4, "num_hidden_layers": 8}
        save_model(Path("model"), **sizes)
        write_rows("rows.jsonl", make_rows(2000))
        print("| | | MB | seconds | step | saved at each step | at every tenth |\n|---|---|---|---|---|---|---|")
        for kind, flags in KINDS.items():
            watch = measure(flags, args.rounds)
            step = statistics.median(watch.steps[1:])
            seconds = {way: statistics.median(each[1:]) for way, each in watch.seconds.items()}
            for way in (PLAIN, OURS):
                each, tenth = ((n * step + seconds[way]) / (n * step + seconds[PLAIN]) for n in (1, 10))
                figures = f"{watch.bytes[way] / 1e6:.2f} | {seconds[way]:.3f} | {step:.3f} | {each:.3f} | {tenth:.3f}"
                print(f"| {kind} | {way} | {figures} |", flush=True)
                rows.append({"kind": kind, "way": way, "mb": watch.bytes[way] / 1e6, "seconds": seconds[way]})
                rows[-1] |= {"step": step, "each_step": each, "each_tenth": tenth}
        os.chdir(ROOT)
    keep(args.json, rows)


if __name__ == "__main__":
    main()
