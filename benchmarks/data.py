"""What becomes of a computed token: packing and buckets against optimum-habana's own trainer, on the same samples.

python benchmarks/data.py                          some fifteen minutes on two quiet cores
python benchmarks/data.py --samples 2000 --rounds 1
python benchmarks/data.py --memory                 what sft.py holds of 20,000 and of 200,000 rows: some five minutes

Samples are synthetic, with log-normal lengths like those of chats (dolly) and of questions with an answer (stack
exchange), and stop at 512 tokens; a batch has 8 rows. All ways train once a round and are compared within it, as a
host's speed changes from one minute to the next: the table has medians of these ratios, their spread, and a ! where
that is more than 15 %. Graphs are those that the emulator counts in 40 steps; on a card each one is a compilation.
Speed is this host's, not a card's. "possible" is the share of useful tokens that no packing can exceed: samples longer
than half a row never meet. Both sets together are packed as well, but not trained on.
"""

import argparse
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from _figures import add_json_flag, compare_rounds, keep, show_spread
from tqdm import trange

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HABANA_EMULATOR_STRICT", "0")

import numpy as np
import transformers
from datasets import Dataset, concatenate_datasets, disable_progress_bars, load_dataset
from optimum.habana import GaudiConfig
from optimum.habana.trl import GaudiSFTConfig, GaudiSFTTrainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback

from align.data import preparing
from align.data.loading import DataArguments
from align.data.tokenization import SampleTokenizer, set_chat_template, tokenize_samples
from align.training.supervised import SupervisedTrainer, make_batches
from habana_frameworks.emulator.graph_counter import count_graphs

LONGEST, BATCH_SIZE, STEPS, COUNTED_STEPS, PROCESSES = 512, 8, 16, 40, 2
OURS = {"packing": {"packing": True}, "buckets": {"packing": False}}
BASELINE = "optimum-habana pad_max"
UPSTREAM = {
    "optimum-habana packing=True": {"packing": True},
    BASELINE: {"packing": False, "pad_max": True},
    "optimum-habana num_buckets=8": {"packing": False, "pad_max": False, "num_buckets": 8},
}


def draw_words(rng: np.random.Generator, words: list[str], median: float, sigma: float, number: int) -> list[str]:
    """Texts with a log-normal number of words."""
    lengths = np.maximum(rng.lognormal(np.log(median), sigma, number), 4).astype(int)
    return [" ".join(text) for text in np.split(rng.choice(words, lengths.sum()), np.cumsum(lengths)[:-1])]


def write_samples(folder: Path, number: int) -> tuple[dict[str, Path], list[str]]:
    """A JSON file of messages and one of questions and answers; the words that they are made of."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, size)) for size in rng.integers(3, 9, 300)]
    draw = partial(draw_words, rng, words, number=number)
    chat = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in zip(draw(40, 0.9), draw(95, 1.1), strict=True)
    ]
    pairs = [
        {"question": question, "response_j": answer, "response_k": "no idea"}
        for question, answer in zip(draw(190, 0.8), draw(170, 0.8), strict=True)
    ]
    files = {"chat": folder / "chat.jsonl", "question and answer": folder / "pairs.jsonl"}
    for path, rows in zip(files.values(), (chat, pairs), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files, words


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" " + word for word in words], trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    set_chat_template(made, "plain")
    return made


def add_text(row: dict, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """The text that upstream trains on, as its example makes it."""
    if "messages" in row:
        return {"text": tokenizer.apply_chat_template(row["messages"], tokenize=False)}
    return {"text": f"Question: {row['question']}\n\nAnswer: {row['response_j']}"}


def prepare(rows: Dataset, tokenizer: PreTrainedTokenizerFast, fingerprint: str) -> Dataset:
    samples = SampleTokenizer(tokenizer)
    tokenize = partial(tokenize_samples, tokenizer=samples, max_length=LONGEST, truncation="keep_start")
    return preparing.prepare(rows, DataArguments(num_workers=PROCESSES), tokenize, fingerprint).rows


def tokenize_alone(texts: Dataset, tokenizer: PreTrainedTokenizerFast, fingerprint: str) -> Dataset:
    options = {"batched": True, "num_proc": PROCESSES, "new_fingerprint": fingerprint}
    return texts.map(lambda batch: tokenizer(batch["text"]), **options)


def measure_preparation(
    rows: Dataset, texts: Dataset, tokenizer: PreTrainedTokenizerFast, rounds: int
) -> dict[str, float]:
    """Samples per second of our preparation and of `datasets.map` with the same tokenizer alone, and their ratio."""
    speeds = {"ours": [], "tokenizer alone": []}
    for turn in trange(rounds, desc="preparing", unit=" rounds", leave=False):
        for name, work, made_from in (("ours", prepare, rows), ("tokenizer alone", tokenize_alone, texts)):
            start = time.perf_counter()
            work(made_from, tokenizer, f"round{turn}")
            speeds[name].append(len(rows) / (time.perf_counter() - start))
    ratio, spread = compare_rounds(*speeds.values())
    return {name: statistics.median(values) for name, values in speeds.items()} | {"ratio": ratio, "spread": spread}


def measure_memory(rows: int, folder: Path) -> float:
    """The most memory that `sft.py` holds while it prepares so many rows and trains on some, in MB."""
    files, words = write_samples(folder, rows)
    make_model(make_tokenizer(words), folder / "model")
    command = f"--model_name_or_path model --dataset_name {files['chat'].name} --output_dir out --do_train"
    command += f" --max_steps 40 --max_seq_length {LONGEST} --report_to none --save_strategy no"
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "w", encoding="utf-8") as log:
        line = [sys.executable, str(ROOT / "sft.py"), *command.split()]
        process = subprocess.Popen(line, cwd=folder, env=environment, stdout=log, stderr=log)
        held = 0.0
        while process.poll() is None:  # what the kernel says at its end counts the memory of this process as well
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            if peak := re.search(r"VmHWM:\s+(\d+) kB", status):
                held = int(peak[1]) / 1000
            time.sleep(0.05)
    if process.returncode:
        sys.exit((folder / "log").read_text(encoding="utf-8"))
    return held


def compare_memory() -> dict[int, float]:
    """MB by number of rows."""
    held = {}
    for rows in (20_000, 200_000):
        with tempfile.TemporaryDirectory() as folder:
            held[rows] = measure_memory(rows, Path(folder))
        print(f"{rows:,} rows: {held[rows]:.0f} MB, {held[rows] / held[20_000]:.2f} of what 20,000 take")
    return held


def count_tokens(batch: dict) -> tuple[int, int]:
    """Tokens of samples, and computed ones."""
    mask = batch.get("segment_ids", batch.get("attention_mask"))
    return batch["input_ids"].numel() if mask is None else int((mask > 0).sum()), batch["input_ids"].numel()


class Metered:
    """Counts useful tokens and CPU time from the first step on, where asked for: reading tokens ends a graph."""

    timed = False

    def training_step(self, model, inputs, *args, **kwargs):
        if self.timed:
            self.start = self.start or time.process_time()
            self.useful += count_tokens(inputs)[0]
        return super().training_step(model, inputs, *args, **kwargs)

    def measure_speed(self) -> float:
        """Useful tokens per second of CPU time, which other work on the host disturbs least."""
        self.timed, self.start, self.useful = True, None, 0
        self.train()
        return self.useful / (time.process_time() - self.start)

    def count_batches(self) -> dict[str, float]:
        """Share of useful tokens and number of shapes, over an epoch."""
        tokens, shapes = Counter(), set()
        for batch in self.get_train_dataloader():
            useful, computed = count_tokens(batch)
            tokens.update(useful=useful, computed=computed)
            shapes.add(tuple(batch["input_ids"].shape))
        return {"useful_share": tokens["useful"] / tokens["computed"], "shapes": len(shapes)}


class MeteredSupervisedTrainer(Metered, SupervisedTrainer):
    pass


class MeteredGaudiSFTTrainer(Metered, GaudiSFTTrainer):
    pass


def make_model(tokenizer: PreTrainedTokenizerFast, folder: Path | None = None) -> LlamaForCausalLM:
    """A small random Llama, kept in `folder` with its tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONGEST,
    )
    model = LlamaForCausalLM(config)
    if folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model


def make_trainer(
    name: str, samples: Dataset, texts: Dataset, tokenizer: PreTrainedTokenizerFast, folder: str, steps: int
) -> Metered:
    transformers.set_seed(0)
    options = {"pad_max": False, **(OURS | UPSTREAM)[name]}
    num_buckets = options.pop("num_buckets", -1)
    args = GaudiSFTConfig(
        output_dir=folder,
        use_habana=True,
        use_lazy_mode=True,
        per_device_train_batch_size=BATCH_SIZE,
        max_seq_length=LONGEST,
        max_steps=steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataset_text_field="text",
        remove_unused_columns=name in UPSTREAM,
        **options,
    )
    gaudi_config = GaudiConfig(use_fused_adam=True, use_fused_clip_norm=True)
    common = {"model": make_model(tokenizer), "args": args, "gaudi_config": gaudi_config, "tokenizer": tokenizer}
    if name in UPSTREAM:
        trainer = MeteredGaudiSFTTrainer(train_dataset=texts, num_buckets=num_buckets, **common)
    else:
        batches = make_batches(samples, name, args, BATCH_SIZE, args.packing, 8, tokenizer.pad_token_id)
        trainer = MeteredSupervisedTrainer(train=batches, validation=None, **common)
    trainer.remove_callback(PrinterCallback)
    return trainer


class Peer:
    """Plain trl's newest release on the same samples, run by its own Python."""

    name = "trl's newest, packing=True"

    def __init__(self, python: Path, samples: Dataset, model: LlamaForCausalLM, tokenizer, folder: Path):
        self.python, self.folder = python, folder
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        samples.select_columns(["input_ids"]).to_json(folder / "samples.jsonl")

    def run(self, steps: int) -> dict[str, float]:
        paths = [self.folder / name for name in ("model", "samples.jsonl", "out")]
        command = [self.python, ROOT / "benchmarks/_peer.py", *paths, steps, BATCH_SIZE, LONGEST]
        environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1"}
        command = [str(word) for word in command]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode:
            sys.exit(ended.stderr)
        return json.loads(ended.stdout.splitlines()[-1])


def compare(make: Callable[..., Metered], rounds: int, peer: Peer | None) -> dict[str, dict[str, float]]:
    """For each way useful share and shapes; after some `rounds` of training also graphs and speed."""
    trainers = {name: make(name, steps=STEPS) for name in OURS | UPSTREAM}
    results = {name: trainer.count_batches() for name, trainer in trainers.items()}
    speeds = {name: [] for name in trainers}
    for _ in trange(rounds, desc="training", unit=" rounds", leave=False):
        for name, trainer in trainers.items():
            speeds[name].append(trainer.measure_speed())
        if peer:
            run = peer.run(STEPS)
            speeds.setdefault(peer.name, []).append(run["tokens"] / run["seconds"])
    for name in trainers if rounds else ():
        counted = make(name, steps=COUNTED_STEPS)
        with count_graphs() as graphs:
            counted.train()
        results[name]["graphs"] = graphs.distinct
    if peer and rounds:
        results[peer.name] = {"useful_share": 1.0, "shapes": peer.run(COUNTED_STEPS)["shapes"], "graphs": "-"}
    for name in results if rounds else ():
        times, spread = compare_rounds(speeds[name], speeds[BASELINE])
        speed = statistics.median(speeds[name])
        results[name] |= {"useful_tokens_per_cpu_second": speed, "times_pad_max": times, "spread": spread}
    return results


def cut_share(lengths: np.ndarray) -> float:
    """Share of the samples that end to end, with EOS between, lie across the border of two rows."""
    ends = np.cumsum(lengths + 1) - 1
    return float(np.mean((ends - lengths) // LONGEST != (ends - 1) // LONGEST))


def find_possible_share(lengths: np.ndarray) -> float:
    """The useful share of a packing with as few rows as there could be."""
    rows = max(-(-lengths.sum() // LONGEST), np.sum(lengths > LONGEST / 2))
    return float(lengths.sum() / (rows * LONGEST))


def print_table(title: str, figures: dict) -> None:
    """One line a way to train, with its speed relative to padding everything to the maximum."""
    print(f"\n{title}: {figures['mean_length']:.0f} tokens on average, possible {figures['possible_share']:.1%}")
    print(f"{'':30}{'useful':>8}{'shapes':>8}{'graphs':>8}{'useful tokens/CPU s':>21}{'x pad_max':>11}{'spread':>9}")
    for name, row in figures["ways"].items():
        line = f"{name:30}{row['useful_share']:8.1%}{row['shapes']:8}"
        if "times_pad_max" in row:
            line += f"{row['graphs']:>8}{row['useful_tokens_per_cpu_second']:21,.0f}{row['times_pad_max']:11.2f}"
            line += f"{show_spread(row['spread']):>9}"
        print(line)
    cut = figures["samples_cut_by_upstream_packing"]
    print(
        f"optimum-habana's packing cuts {cut:.0%} of the samples, and lets those in a row see each other.", flush=True
    )


def print_preparation(title: str, figures: dict[str, float]) -> None:
    times = f"{figures['ratio']:.2f} of datasets.map with the tokenizer alone (spread {show_spread(figures['spread'])})"
    print(f"{title}, prepared: {figures['ours']:,.0f} samples/s, {times}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=6000, help="samples in each data set")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which all ways train once")
    add_json_flag(parser)
    parser.add_argument("--peer", type=Path, help="Python of an environment with benchmarks/requirements-peer.txt")
    parser.add_argument("--memory", action="store_true", help="measure the memory of many rows, and nothing else")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    if options.memory:
        keep(options.json, {"memory_mb": compare_memory()})
        return
    disable_progress_bars()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    report = {"preparation_samples_per_second": {}}
    sets = {}
    with tempfile.TemporaryDirectory() as folder:
        files, words = write_samples(Path(folder), options.samples)
        tokenizer = make_tokenizer(words)
        for title, path in files.items():
            rows = load_dataset("json", data_files=str(path), split="train", cache_dir=folder)
            texts = rows.map(add_text, fn_kwargs={"tokenizer": tokenizer}, remove_columns=rows.column_names)
            sets[title] = prepare(rows, tokenizer, "samples"), texts
            speeds = measure_preparation(rows, texts, tokenizer, options.rounds)
            report["preparation_samples_per_second"][title] = speeds
            print_preparation(title, speeds)
        sets["both"] = tuple(map(concatenate_datasets, zip(*sets.values(), strict=True)))
        for title, (samples, texts) in sets.items():
            lengths = np.array(samples["length"])
            whole_lengths = np.array([len(ids) for ids in tokenizer(texts["text"]).input_ids])
            make = partial(make_trainer, samples=samples, texts=texts, tokenizer=tokenizer, folder=folder)
            rounds = options.rounds if title in files else 0
            peer = None
            if options.peer and rounds:
                model = make("packing", steps=STEPS).model
                peer = Peer(options.peer, samples, model, tokenizer, Path(folder, f"peer-{len(samples)}-{title[0]}"))
            report[title] = {
                "mean_length": float(lengths.mean()),
                "possible_share": find_possible_share(lengths),
                "samples_cut_by_upstream_packing": cut_share(whole_lengths),
                "ways": compare(make, rounds, peer),
            }
            print_table(title, report[title])
    keep(options.json, report)


if __name__ == "__main__":
    main()
