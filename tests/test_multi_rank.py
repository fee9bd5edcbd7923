"""sft.py and dpo.py on several ranks train what one process trains. Run: pytest tests/test_multi_rank.py

Each engine is launched once and trains one model after the other, in fp32; the full grid is for `make soak`.
"""

import json
import random
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_rows
from launches import ENGINES
from safetensors.torch import load_file
from tiny import save_model

CONFIGS = {"zero1": "ds_zero1_config", "zero2": "ds_zero2_config", "zero3": "{family}_ds_zero3_config"}
GLOBAL_BATCH = 4
FLAGS = "--do_train --do_eval --max_steps 3 --logging_steps 1 --learning_rate 5e-3 --lr_scheduler_type constant".split()
FLAGS += "--warmup_steps 0 --bf16 False --disable_tqdm True --validation_split_percentage 20 --seed 3".split()
FLAGS += ["--lora_dropout", "0"]  # ranks drop other weights than one process
SCRIPTS = {"sft": "--max_seq_length 64".split(), "dpo": "--max_prompt_length 32 --max_length 64 --eval_steps 3".split()}
SCRIPTS["dpo-padded"] = [*SCRIPTS["dpo"], "--share_prompts", "False"]
LAUNCHES = ENGINES | {"alone": []}

# What each engine trains in `make test`: script, model, adapter or all weights, and how ranks share the work
FEW = {
    "deepspeed": ["sft llama lora zero3", "dpo mixtral lora zero3", "sft mixtral full zero2", "dpo llama full zero1"],
    "mpi": ["sft mixtral lora ddp", "dpo llama full zero3"],
    "torch": ["dpo llama lora ddp", "sft llama full ddp"],
}
SHARING = {"deepspeed": ["zero1", "zero2", "zero3"], "mpi": ["ddp", "zero3"], "torch": ["ddp"]}


def every_run(engine: str, ranks: int) -> list[str]:
    """With one pair to a step and rank no row is shared, so one process would make other batches of shared rows."""
    scripts = ("sft", "dpo" if ranks < GLOBAL_BATCH else "dpo-padded")
    return [" ".join(run) for run in product(scripts, ("llama", "mixtral"), ("lora", "full"), SHARING[engine])]


GRID = [pytest.param(engine, 2, FEW[engine]) for engine in ENGINES]
GRID += [
    pytest.param(engine, ranks, every_run(engine, ranks), marks=pytest.mark.soak)
    for engine in ENGINES
    for ranks in (2, 4)
]


class Laboratory:
    """Trains in one folder and remembers what one process has trained."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.alone: set[str] = set()
        for family in ("llama", "mixtral"):
            save_model(folder / family, family)
        number = random.Random(0).randint
        rows = [
            {"question": f"{i}?", "response_j": "It is four. " * number(1, 3), "response_k": "No. " * number(1, 4)}
            for i in range(60)
        ]
        write_rows(folder / "pairs.jsonl", rows)
        for path in (ROOT / "configs").glob("*.json"):
            config = json.loads(path.read_text())
            config["bf16"]["enabled"] = False
            if config["zero_optimization"]["stage"] == 3:  # else the parameters of small models stay whole
                config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            (folder / path.name.replace("llama2", "llama")).write_text(json.dumps(config))

    def train(self, engine: str, ranks: int, runs: list[str]) -> None:
        """`runs` are "script model weights sharing"; each trains into a folder of that name, engine and ranks."""
        described = []
        for run in runs:
            script, family, weights, sharing = run.split()
            name = f"{run} {engine} {ranks}"
            flags = ["--model_name_or_path", family, "--dataset_name", "pairs.jsonl", "--output_dir", name]
            flags += ["--use_peft", str(weights == "lora"), *FLAGS, *SCRIPTS[script]]
            flags += ["--per_device_train_batch_size", str(GLOBAL_BATCH // ranks), "--gradient_accumulation_steps", "1"]
            if sharing in CONFIGS:
                flags += ["--deepspeed", CONFIGS[sharing].format(family=family) + ".json"]
            described.append([name, f"{script[:3]}.py", flags])
        path = self.folder / "runs.json"
        path.write_text(json.dumps(described))
        command = [
            *[sys.executable, ROOT / "gaudi_spawn.py", "--world_size", str(ranks), *LAUNCHES[engine]],
            *[ROOT / "tests" / "training_ranks.py", path],
        ]
        ended = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr

    def train_alone(self, runs: list[str]) -> None:
        """The same runs in one process, without DeepSpeed."""
        runs = {run.rpartition(" ")[0] + " -" for run in runs} - self.alone
        if runs:
            self.train("alone", 1, sorted(runs))
        self.alone |= runs

    def losses(self, name: str) -> list[float]:
        """The loss of each step and of the evaluation."""
        results = json.loads((self.folder / name / "all_results.json").read_text())
        history = json.loads((self.folder / name / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry] + [results["eval_loss"]]

    def weights(self, name: str, rank: int) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.{rank}.safetensors")

    def saved(self, name: str) -> dict[str, torch.Tensor]:
        """What the script left behind, under the names that the parameters have."""
        adapter = self.folder / name / "adapter_model.safetensors"
        if not adapter.exists():
            return load_file(self.folder / name / "model.safetensors")
        return {key.replace(".weight", ".default.weight"): value for key, value in load_file(adapter).items()}


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    return Laboratory(tmp_path_factory.mktemp("ranks"))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("engine", "ranks", "runs"), GRID)
def test_ranks_train_what_one_process_trains(engine, ranks, runs, laboratory):
    laboratory.train_alone(runs)
    laboratory.train(engine, ranks, runs)
    for run in runs:
        alone, name = run.rpartition(" ")[0] + " - alone 1", f"{run} {engine} {ranks}"
        assert laboratory.losses(name) == pytest.approx(laboratory.losses(alone), abs=1e-4), run
        held = laboratory.weights(name, 0)
        saved = laboratory.saved(name)
        assert held.keys() <= saved.keys()
        for key, weight in held.items():
            assert weight.numel() > 0
            assert weight.isfinite().all()
            assert torch.equal(saved[key].float(), weight), f"{run}: {key} was saved otherwise than it was trained"
            for rank in range(1, ranks):
                assert torch.equal(laboratory.weights(name, rank)[key], weight), f"{run}: rank {rank} has another {key}"
