"""python -m pytest tests/test_emulator_training.py: optimum-habana's own trainer and DeepSpeed on the emulator."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import zero3_ranks
from tiny import save_model

from habana_frameworks.emulator.graph_counter import count_graphs
from habana_frameworks.torch.hpex.kernels import FusedSDPA, RotaryPosEmbeddingHelperV2
from habana_frameworks.torch.hpex.normalization import FusedClipNorm, FusedRMSNorm
from habana_frameworks.torch.hpex.optimizers import FusedAdamW

TESTS = Path(__file__).parent
WITHOUT_EMULATOR = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
LAYERS, STEPS = 2, 6
# A step trains on all of them, so that their order does not matter. The first label is never predicted, but
# optimum-habana 1.21.2 would count it (transformers/trainer.py:2807).
ROWS = [list(range(5 + number, 17 + 5 * number)) for number in range(4)]
SAMPLES = [
    {"input_ids": row, "attention_mask": [1] * len(row), "labels": [-100] * prompt + row[prompt:]}
    for row, prompt in zip(ROWS, (1, 4, 1, 7), strict=True)
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), tokenizer="chatml-base")


@pytest.fixture(scope="module")
def plain_losses(model_folder):
    """Plain transformers on the CPU, in a process that optimum-habana has not patched."""
    samples, losses = model_folder / "samples.json", model_folder / "losses.json"
    samples.write_text(json.dumps(SAMPLES))
    command = [sys.executable, TESTS / "plain_trainer.py", model_folder, samples, str(STEPS), losses]
    subprocess.run(command, capture_output=True, check=True)
    return json.loads(losses.read_text())


def train(model_folder, use_flash_attention=False, resume_from=None, **flags):
    """Losses of SFT by optimum-habana in lazy mode with its fused kernels; `flags` are further training arguments."""
    from datasets import Dataset
    from optimum.habana import GaudiConfig
    from optimum.habana.trl import GaudiSFTConfig, GaudiSFTTrainer
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

    defaults = {
        "use_habana": True,
        "use_lazy_mode": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": len(SAMPLES),
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-12,  # FusedAdamW adds it before the bias correction, torch after it
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "max_seq_length": 64,
        "packing": False,
    }
    arguments = GaudiSFTConfig(output_dir="out", **{**defaults, **flags})
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    gaudi_config = GaudiConfig()
    gaudi_config.use_fused_adam = gaudi_config.use_fused_clip_norm = True
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.generation_config.use_flash_attention = use_flash_attention
    trainer = GaudiSFTTrainer(
        model=model,
        args=arguments,
        gaudi_config=gaudi_config,
        train_dataset=Dataset.from_list(SAMPLES),
        tokenizer=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train(resume_from_checkpoint=resume_from)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of each fused kernel."""
    counter = Counter()
    methods = [(FusedSDPA, "apply"), (FusedRMSNorm, "apply"), (RotaryPosEmbeddingHelperV2, "apply")]
    for owner, method in [*methods, (FusedClipNorm, "clip_norm"), (FusedAdamW, "step")]:
        native = getattr(owner, method)

        def counting(*args, native=native, name=owner.__name__, **kwargs):
            counter[name] += 1
            return native(*args, **kwargs)

        monkeypatch.setattr(owner, method, counting if owner in (FusedClipNorm, FusedAdamW) else staticmethod(counting))
    return counter


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        ({}, 1e-4),
        ({"use_flash_attention": True}, 1e-4),
        ({"gradient_checkpointing": True, "use_hpu_graphs_for_training": True}, 1e-4),
        ({"bf16": True}, 4e-3),  # softmax and norms too are computed in bfloat16
    ],
    ids=["float32", "fused attention", "checkpointing and graphs", "bfloat16"],
)
def test_sft_has_the_losses_of_plain_transformers(model_folder, plain_losses, calls, flags, tolerance):
    losses = train(model_folder, **flags)

    assert losses == pytest.approx(plain_losses, abs=tolerance)
    assert losses[-1] < losses[0] - 0.05
    steps = 1 if "use_hpu_graphs_for_training" in flags else STEPS  # of which Python runs the model's code
    forward_passes = steps * (2 if "gradient_checkpointing" in flags else 1)
    assert calls["FusedRMSNorm"] == forward_passes * 2 * LAYERS + steps
    assert calls["RotaryPosEmbeddingHelperV2"] == forward_passes * 2 * LAYERS
    assert calls["FusedSDPA"] == (forward_passes * LAYERS if "use_flash_attention" in flags else 0)
    assert calls["FusedClipNorm"] == calls["FusedAdamW"] == STEPS


def test_training_goes_on_from_a_checkpoint(model_folder, plain_losses):
    train(model_folder, save_strategy="steps", save_steps=4)

    losses = train(model_folder, resume_from="out/checkpoint-4")

    assert losses == pytest.approx(plain_losses, abs=1e-4)
    code = "import torch; print(*(torch.load(f'out/checkpoint-4/{name}', weights_only=False) for name in FILES))"
    code = code.replace("FILES", "('optimizer.pt', 'scheduler.pt', 'rng_state.pth')")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=WITHOUT_EMULATOR)


def test_one_shape_needs_no_new_graph_after_the_first_steps(model_folder):
    counts = []
    for steps in (3, 6):
        with count_graphs() as graphs:
            train(model_folder, max_steps=steps)
        counts.append((graphs.distinct, graphs.launches))

    (few, launches), (as_few, more_launches) = counts
    assert few == as_few
    assert more_launches > launches


def assert_hccl_is_a_cards(said):
    """Of both ranks: numbers are reduced in float32, which lacks 2**24 + 1, and what a card refuses is refused."""
    rounded = [2**24, 2**24]
    assert said[0]["integers"] == {"all_reduce": rounded, "reduce": rounded, "reduce_scatter_tensor": [2**24 + 1] * 2}
    assert said[1]["integers"] == said[0]["integers"]
    for rank, facts in enumerate(said):
        assert facts["half"] == [2.0, 2.0]
        assert facts["highest"] == [2.0, 2.0]
        assert facts["still"] == [rank + 1.0] * 2
        assert facts["objects"] == [{"rank": 0}, {"rank": 1}]
        assert "all_reduce: expected all tensors on hpu, got one of shape [2] on cpu" in facts["host"]
        assert "zero3_ranks.py" in facts["host"]
        assert "send: expected all tensors on hpu" in facts["host sent"]
        assert facts["mean"] == facts["bits"] == "Unsupported ReduceOp for HCCL process group"
        assert "does not support allgather_coalesced" in facts["lists"]
        assert "does not support recv" in facts["any sender"]
        for how in ("short", "short moved"):
            assert "not supported for HCCL process group: torch.int16" in facts[how]


def test_two_ranks_share_their_work_under_zero3(tmp_path):
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", TESTS / "zero3_ranks.py", tmp_path]
    subprocess.run([sys.executable, "-m", *command], check=True)  # pytest shows what it printed if it fails

    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]

    model = zero3_ranks.make_model().to("hpu")
    optimizer = torch.optim.AdamW(model.parameters(), **zero3_ranks.ADAMW)
    for step in range(zero3_ranks.STEPS):
        optimizer.zero_grad()
        zero3_ranks.loss_of(model, step, slice(None)).backward()
        optimizer.step()
    said = [facts.pop("hccl") for facts in ranks]
    assert ranks[0] == ranks[1]
    assert (ranks[0]["backend"], ranks[0]["total"], set(ranks[0]["held"])) == ("hccl", 3.0, {0})
    assert [facts["unwaited"] for facts in ranks] == [2_000_000, 2_000_000]
    assert_hccl_is_a_cards(said)
    for got, expected in zip(ranks[0]["weights"], model.parameters(), strict=True):
        assert got == pytest.approx(expected.flatten().tolist(), abs=1e-5)
