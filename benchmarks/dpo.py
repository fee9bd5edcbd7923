"""What a preference pair costs: dpo.py's trainer against optimum-habana's dpo example and plain trl, on the same pairs.

python benchmarks/dpo.py                       one to two hours on two quiet cores
python benchmarks/dpo.py --batches 4 --timed_pairs 4 --rounds 1

Pairs are synthetic, with log-normal lengths like stack exchange's that stop at 256 tokens for the prompt and 512 in
all, the model is a Llama with Llama-2's vocabulary, in float32, and LoRA on q and v. Each measurement has a process of
its own, so that its peak memory is its own. Its first step is not timed; then as many pairs are, whatever the batch.
All variants run once a round, one after the other, and are compared within it, as a host's speed changes from one
minute to the next: the table has medians of these ratios, their spread (highest less lowest, of the median), and a !
where that is more than 15 %. "stored" takes the reference's log-probs from a pass of its own in the first round, timed
beside; its memory counts, as a peak is that of all rounds. Speed and memory are this host's, not a card's; graphs are
those that the emulator counts. Learning curves are those of a tiny model on pairs that can be learnt: the same adapter
at the start and, since plain trl is given the pairs in our order, the same pairs at each step.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _figures import add_json_flag, compare_rounds, keep, show_spread
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HABANA_EMULATOR_STRICT", "0")  # for the processes that it starts
MAX_PROMPT_LENGTH, MAX_LENGTH = 256, 512
VARIANTS = {
    "optimum-habana": "its example: a second model as reference, every answer padded",
    "trl": "plain trl on the CPU: adapter off, answers padded to the longest of a batch",
    "trl, newest": "the same of benchmarks/requirements-peer.txt, where --peer names its Python",
    "ours": "shared rows, adapter off",
    "ours, stored": "shared rows, stored log-probs",
}
LLAMA = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_rows(number: int, easy: bool = False) -> list[dict[str, str]]:
    """Pairs of words that are one token each; where `easy`, the chosen answers say one word that the others do not."""
    import numpy as np

    rng = np.random.default_rng(0)
    longest = {"prompt": MAX_PROMPT_LENGTH - 1, "chosen": MAX_PROMPT_LENGTH - 1, "rejected": MAX_PROMPT_LENGTH - 1}
    medians = {"prompt": 190, "chosen": 170, "rejected": 130}
    rows = []
    for _ in range(number):
        row = {}
        for name, median in medians.items():
            length = int(np.clip(rng.lognormal(np.log(median), 0.7), 2, longest[name]))
            words = rng.integers(10, 31_000, length // 8 if easy else length)
            row[name] = "".join(f" w{word}" for word in words)
        rows.append({**row, "chosen": row["chosen"] + " w5"} if easy else row)
    return rows


def make_model(folder: Path, sizes: dict[str, int]) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", *(f"w{i}" for i in range(31_998))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(vocabulary))).save_pretrained(folder)


def train_upstream(folder: Path, rows: list[dict], flags: dict, callbacks: list, stored: bool):
    from datasets import Dataset
    from optimum.habana import GaudiConfig
    from optimum.habana.trl import GaudiDPOConfig, GaudiDPOTrainer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = GaudiConfig()
    config.use_fused_adam = config.use_fused_clip_norm = True
    trainer = GaudiDPOTrainer(
        *(AutoModelForCausalLM.from_pretrained(folder) for _ in range(2)),
        gaudi_config=config,
        args=GaudiDPOConfig(use_habana=True, use_lazy_mode=True, **flags),
        train_dataset=Dataset.from_list(rows),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        peft_config=make_lora(),
        force_use_ref_model=True,
        callbacks=callbacks,
    )
    return trainer, 0.0


def train_plain(folder: Path, rows: list[dict], flags: dict, callbacks: list, stored: bool):
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer, Trainer
    from trl import DPOConfig, DPOTrainer

    class PlainTrainer(DPOTrainer):
        """trl 0.9.6 under a newer transformers: three signatures have changed. Takes the pairs as they stand."""

        get_batch_samples = Trainer.get_batch_samples

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs)

        def log(self, logs, start_time=None):
            super().log(logs)

        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset)

    trainer = PlainTrainer(
        load_policy(folder),
        args=DPOConfig(use_cpu=True, **flags),
        train_dataset=Dataset.from_list(rows),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        callbacks=callbacks,
    )
    return trainer, 0.0


def train_newest(folder: Path, rows: list[dict], flags: dict, callbacks: list, stored: bool):
    """Padded batches: its `padding_free` for pairs is switched off in trl 1.16 (trainer/dpo_trainer.py:732)."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    del flags["max_prompt_length"]  # which it no longer has: no pair here is longer than --max_length
    trainer = DPOTrainer(
        load_policy(folder),
        args=DPOConfig(use_cpu=True, bf16=False, gradient_checkpointing=False, **flags),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=callbacks,
    )
    return trainer, 0.0


def train_ours(folder: Path, rows: list[dict], flags: dict, callbacks: list, stored: bool):
    from datasets import Dataset
    from optimum.habana.trl import GaudiDPOConfig
    from transformers import AutoConfig, AutoTokenizer

    from align.training import pairs, preference, reference
    from align.upstream_fixes import gaudi_config

    args = GaudiDPOConfig(use_habana=True, use_lazy_mode=True, **flags)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts, chosen, rejected = (tokenizer([row[name] for row in rows]).input_ids for name in rows[0])
    samples = {
        "prompt_input_ids": [[tokenizer.bos_token_id, *ids] for ids in prompts],
        "chosen_input_ids": [[*ids, tokenizer.eos_token_id] for ids in chosen],
        "rejected_input_ids": [[*ids, tokenizer.eos_token_id] for ids in rejected],
        "chosen_labels": [[*ids, tokenizer.eos_token_id] for ids in chosen],
        "rejected_labels": [[*ids, tokenizer.eos_token_id] for ids in rejected],
    }
    samples = Dataset.from_dict(samples)
    lengths = {"train": pairs.measure(samples)}
    batch = args.per_device_train_batch_size
    cost = pairs.column_cost(AutoConfig.from_pretrained(folder.parent / "llama"))
    layout = pairs.share_rows(lengths, batch, preference.token_budget(args, batch), 8, cost)
    path, kept = folder / f"stored-{batch}.safetensors", None
    if stored:
        kept = reference.Stored(path, reference.load(path, len(rows)) if path.exists() else None)
    trainer = preference.PreferenceTrainer(
        model=load_policy(folder),
        ref_model=None,
        args=preference.fit_batches(args, layout),
        gaudi_config=gaudi_config(args),
        layout=layout,
        pairs={"train": pairs.PairDataset(samples, layout.rows["train"], kept)},
        tokenizer=tokenizer,
    )
    for callback in callbacks:
        trainer.add_callback(callback)
    start = time.perf_counter()
    trainer.store_reference()
    return trainer, time.perf_counter() - start


TRAINERS = {
    "optimum-habana": train_upstream,
    "trl": train_plain,
    "trl, newest": train_newest,
    "ours": train_ours,
    "ours, stored": train_ours,
}


def make_lora():
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def load_policy(folder: Path):
    """The model under the same new adapter, whoever trains it."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    return get_peft_model(model, make_lora())


def measure(variant: str, folder: Path, batch: int, steps: int, pairs: int, what: str) -> dict:
    """One training run in this process. `what` is speed (and memory), graphs, or curve (pairs that can be learnt).

    Ours leaves the order in which its curve took the pairs in `folder`, where plain trl's finds it.
    """
    from contextlib import nullcontext

    import torch
    from transformers import PrinterCallback, TrainerCallback

    ends, shapes, tokens = [], set(), []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_, model, **__):
            model.get_input_embeddings().register_forward_pre_hook(self.note)

        def note(self, _, inputs):
            if torch.is_grad_enabled():  # not a pass of the reference
                shapes.add(tuple(inputs[0].shape))
                tokens.append(inputs[0].numel())

        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    flags = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "max_prompt_length": MAX_PROMPT_LENGTH,
        "max_length": MAX_LENGTH,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    if what == "curve":
        flags["adam_epsilon"] = 1e-14  # which FusedAdamW adds before the bias correction and torch after it
    rows, order = make_rows(pairs, easy=what == "curve"), folder / "order.json"
    if what == "curve" and variant == "trl":
        rows = [rows[index] for index in json.loads(order.read_text())]
    trainer, pass_seconds = TRAINERS[variant](folder, rows, flags, [Watch()], stored="stored" in variant)
    trainer.remove_callback(PrinterCallback)
    if what == "curve" and variant == "ours":
        order.write_text(json.dumps(list(trainer._get_train_sampler())))
    counting = nullcontext()
    if what == "graphs":
        from habana_frameworks.emulator.graph_counter import count_graphs

        counting = count_graphs()
    with counting as graphs:
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "rewards/accuracies" in entry]
    return {
        "pairs a second": batch * (len(ends) - 1) / (ends[-1] - ends[0]),
        "tokens a pair": sum(tokens) / (batch * steps),
        "shapes": len(shapes),
        "graphs": graphs.distinct if graphs else None,
        "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "reference pass": pass_seconds / pairs,
        "models": 2 if variant == "optimum-habana" else 1,
        "accuracies": [entry["rewards/accuracies"] for entry in log],
        "margins": [entry["rewards/margins"] for entry in log],
    }


def run(variant: str, folder: Path, batch: int, steps: int, pairs: int, what: str, peer: Path | None = None) -> dict:
    """`measure` in a process of its own; plain trl's knows nothing of the emulator."""
    python = peer if variant == "trl, newest" else sys.executable
    order = [python, __file__, "--measure", variant, "--folder", folder, "--what", what, "--pairs", pairs]
    order += ["--batches", batch, "--steps", steps]
    autoload = "0" if variant.startswith("trl") else "1"
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(part) for part in order], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def speeds_of(rounds: list[dict[str, dict]], variant: str) -> list[float]:
    return [each[variant]["pairs a second"] for each in rounds]


def print_table(batch: int, rounds: list[dict[str, dict]]) -> None:
    """One row a variant; what is counted is the same in every round."""
    header = ["batch", "variant", "pairs/s", "times", "spread", "tokens a pair", "shapes", "graphs", "peak MB"]
    header += ["of upstream", "models"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    memory = {name: max(each[name]["MB"] for each in rounds) for name in rounds[0]}
    for variant, row in rounds[0].items():
        speeds = speeds_of(rounds, variant)
        times, spread = compare_rounds(speeds, speeds_of(rounds, "optimum-habana"))
        extra = f" + {row['reference pass']:.2f} s a pair before" if "stored" in variant else ""
        cells = [batch, variant + extra, f"{statistics.median(speeds):.2f}", f"{times:.2f}"]
        cells += [show_spread(spread), f"{row['tokens a pair']:.0f}", row["shapes"]]
        cells += ["-" if row["graphs"] is None else row["graphs"], f"{memory[variant]:.0f}"]
        cells += [f"{memory[variant] / memory['optimum-habana']:.2f}", row["models"]]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8], help="pairs a device and step")
    parser.add_argument("--timed_pairs", type=int, default=8, help="pairs of each run after its first step")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which all variants run")
    parser.add_argument("--pairs", type=int, default=128, help="synthetic pairs")
    parser.add_argument("--peer", type=Path, help="Python of an environment with benchmarks/requirements-peer.txt")
    add_json_flag(parser)
    parser.add_argument("--measure", choices=TRAINERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--what", default="speed", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds: got {args.rounds}; give 1 or more")
    if any(args.timed_pairs % batch or batch < 1 for batch in args.batches) or args.timed_pairs < 1:
        parser.error(f"--timed_pairs: got {args.timed_pairs}; give a multiple of each of --batches")
    if args.measure:
        print(json.dumps(measure(args.measure, args.folder, args.batches[0], args.steps, args.pairs, args.what)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, sizes in {"llama": LLAMA, "tiny": TINY}.items():
            make_model(Path(folder, name), sizes)
        measured, names = {}, [name for name in TRAINERS if args.peer or name != "trl, newest"]
        progress = tqdm(total=len(args.batches) * args.rounds * len(names), unit=" runs", leave=False)
        for batch in args.batches:
            model, steps = Path(folder, "llama"), 1 + args.timed_pairs // batch
            rounds = measured[batch] = []
            for _ in range(args.rounds):
                rounds.append({})
                for name in names:
                    progress.set_description(f"batch {batch}, {name}")
                    rounds[-1][name] = run(name, model, batch, steps, args.pairs, "speed", args.peer)
                    progress.update()
            for name in names:
                if not name.startswith("trl"):
                    counted = run(name, Path(folder, "tiny"), batch, args.pairs // batch, args.pairs, "graphs")
                    rounds[0][name].update(graphs=counted["graphs"], shapes=counted["shapes"])
            progress.clear()
            print_table(batch, rounds)
        progress.close()
        curves = {name: run(name, Path(folder, "tiny"), 8, 60, 480, "curve") for name in ("ours", "trl")}
    print("\nShare of pairs whose chosen answer has the higher reward, in tenths of 60 steps at batch 8")
    for name, curve in curves.items():
        values = curve["accuracies"]
        tenth = len(values) // 10
        means = [sum(values[start : start + tenth]) / tenth for start in range(0, 10 * tenth, tenth)]
        print(f"{name:5}", *(f"{mean:.2f}" for mean in means))
    for name in ("accuracies", "margins"):
        pairs = zip(*(curve[name] for curve in curves.values()), strict=True)
        print(f"largest difference of {name} at one step: {max(abs(ours - trl) for ours, trl in pairs):.2g}")
    keep(args.json, {"rounds": measured, "curves": curves})


if __name__ == "__main__":
    main()
