"""What a checkpoint costs: sft.py's, which is checked, hashed, flushed and renamed, against that of a plain Trainer.

python benchmarks/checkpoint.py                    some fifteen minutes on two quiet cores
python benchmarks/checkpoint.py --width 1024 --rounds 3

In one run with --save_steps 1 three ways take turns of some steps each, so that all meet the same disk: no checkpoint,
a plain Trainer's, sft.py's. A turn ends when its last step does, for sft.py once its last checkpoint is whole on the
disk; what a plain Trainer's turn has left to be written by then is not counted, but what the disk does within it is.
"held up" is the median time until the next step begins. What a run costs that saves at every step is the median of the
ratios within a round, with their spread; at every tenth it follows from the medians. One core computes what a card
would, so that the host has one of its own for the disk.
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

from _figures import add_json_flag, compare_rounds, keep, show_spread

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HABANA_EMULATOR_STRICT", "0")
os.environ["OMP_NUM_THREADS"] = "1"

from conftest import write_rows
from optimum.habana import GaudiTrainer
from test_dpo import make_rows
from tiny import save_model

import sft
from align.training.supervised import SupervisedTrainer

KINDS = {"adapter": [], "all weights": ["--use_peft", "False"]}
NONE, PLAIN, OURS = WAYS = ("no checkpoint", "plain Trainer", "sft.py")


class Watch:
    """Seconds of each turn by way, those of its checkpoints before the next step, and bytes of a checkpoint."""

    def __init__(self, turn: int):
        self.turn, self.began = turn, 0.0
        self.seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        self.held_up: dict[str, list[float]] = {way: [] for way in WAYS}
        self.bytes = dict.fromkeys(WAYS, 0)
        self.ours = SupervisedTrainer._save_checkpoint

    def save(self, trainer, model, trial=None) -> None:
        """Called after each step; the first turn is of the steps after the first one."""
        turns, place = divmod(trainer.state.global_step - 1, self.turn)
        way = WAYS[turns % len(WAYS)]
        if place == 0 and turns:
            self.end(trainer, WAYS[(turns - 1) % len(WAYS)])
        if place == 0:
            self.began = time.perf_counter()
        began = time.perf_counter()
        if way == OURS:
            self.ours(trainer, model, trial)
        elif way == PLAIN:
            trainer.save_model = partial(GaudiTrainer.save_model, trainer)
            GaudiTrainer._save_checkpoint(trainer, model, trial)
            del trainer.save_model
        self.held_up[way].append(time.perf_counter() - began)

    def end(self, trainer, way: str) -> None:
        trainer._finish_checkpoint()
        self.seconds[way].append(time.perf_counter() - self.began)
        for folder in Path(trainer.args.output_dir).glob("checkpoint-*"):
            self.bytes[way] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            shutil.rmtree(folder)
        os.sync()  # the next turn begins with a disk that has nothing to do


def measure(flags: list[str], rounds: int, turn: int) -> Watch:
    watch = Watch(turn)
    SupervisedTrainer._save_checkpoint = lambda *arguments: watch.save(*arguments)  # noqa: PLW0108 - as a method
    command = "--do_train --bf16 False --disable_tqdm True --log_level error --max_seq_length 256 --save_steps 1"
    command += f" --per_device_train_batch_size 1 --skip_probe True --max_steps {len(WAYS) * rounds * turn + 1}"
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
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which each way has its turn")
    parser.add_argument("--turn", type=int, default=16, help="steps of a turn, each with its checkpoint")
    add_json_flag(parser)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # a disk, where /tmp may be memory
        os.chdir(folder)
        sizes = {"hidden_size": args.width, "intermediate_size": 11 * args.width // 4, "num_hidden_layers": 8}
        save_model(Path("model"), **sizes)
        write_rows("rows.jsonl", make_rows(2000))
        print("| | | MB | held up | a step | at each step | spread | at every tenth |\n" + "|---" * 8 + "|")
        for kind, flags in KINDS.items():
            watch = measure(flags, args.rounds, args.turn)
            seconds = {way: statistics.median(each) / args.turn for way, each in watch.seconds.items()}
            for way in WAYS:
                each, spread = compare_rounds(watch.seconds[way], watch.seconds[PLAIN])
                tenth = (9 * seconds[NONE] + seconds[way]) / (9 * seconds[NONE] + seconds[PLAIN])
                held_up, mb = statistics.median(watch.held_up[way]), watch.bytes[way] / 1e6
                figures = f"{mb:.2f} | {held_up:.3f} | {seconds[way]:.3f} | {each:.3f} | {show_spread(spread)}"
                print(f"| {kind} | {way} | {figures} | {tenth:.3f} |", flush=True)
                rows.append({"kind": kind, "way": way, "mb": mb, "held_up": held_up, "seconds": seconds[way]})
                rows[-1] |= {"each_step": each, "spread": spread, "each_tenth": tenth}
        os.chdir(ROOT)
    keep(args.json, rows)


if __name__ == "__main__":
    main()
