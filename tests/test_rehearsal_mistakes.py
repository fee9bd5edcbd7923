"""Broken recipes, each found by a rehearsal with its reason. Run: pytest tests/test_rehearsal_mistakes.py

One dry process rehearses them one after the other, as its imports take longer than all of them.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_rows
from tiny import save_model

from align.launch.engines import ENGINES, Run
from align.rehearsal import judging
from align.rehearsal.rehearse import Stage, environment_of, find_mistake, make_plan

SFT = "sft.py --model_name_or_path model --do_train --max_steps 40 --max_seq_length 96 --dataset_name"
DPO = "dpo.py --model_name_or_path model --max_steps 4 --dataset_name pairs.jsonl"
ZERO = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto")
ZERO |= {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}}

# What is broken: the command, and the beginning of the reason
BROKEN = {
    "it does not fit": (f"{SFT} chats.jsonl", "does not fit: "),
    "it compiles for ever": (f"{SFT} chats.jsonl --packing False --num_buckets 60", "still compiling after warm-up: "),
    "a LoRA target matches nothing": (
        f"{SFT} chats.jsonl --lora_target_modules q_proj out_proj",
        "--lora_target_modules: out_proj match no module",
    ),
    "the template loses a message": (
        f"{SFT} system.jsonl --chat_template loses.jinja",
        "--chat_template: the chat template does not show the system message",
    ),
    "no room for answers": (
        f"{DPO} --max_prompt_length 96 --max_length 64",
        "--max_prompt_length 96: must be from 1 to less than --max_length 64",
    ),
    "all pairs are too long": (
        f"{DPO} --max_prompt_length 4 --max_length 8 --truncation drop",
        "--dataset_name: no row of pairs.jsonl is left",
    ),
    "ZeRO refuses the optimizer": (
        f"{SFT} chats.jsonl --deepspeed sgd.json",
        "--deepspeed sgd.json: ZeRO refuses the optimizer SGD",
    ),
    "no disk for the save": (f"{SFT} chats.jsonl --max_steps 100000000 --save_steps 1", "no disk for the save: "),
    "the batch is not divisible": (
        f"{SFT} chats.jsonl --deepspeed batch_of_7.json",
        "--deepspeed batch_of_7.json: train_batch_size is 7 there, but 16 by cards x",
    ),
    "bf16 is off in the file": (
        f"{SFT} chats.jsonl --deepspeed no_bf16.json --bf16",
        "--deepspeed no_bf16.json: --bf16 is on, but bf16.enabled is false there",
    ),
    "an unknown column": (f"{SFT} unknown.jsonl", "--dataset_name"),
}


# What is not broken, but uses what a rehearsal must find its way through
WHOLE = f"{DPO} --precompute_ref_log_probs --do_eval --sample_prompts 2 --max_prompt_length 32 --max_length 64"


def make_run(command: str, port: int | None = None) -> Run:
    script, *arguments = command.split()
    engine = ENGINES["deepspeed"]
    return Run(engine, [str(ROOT / script), *arguments], {"localhost": 2}, False, {}, port, False, 60, 60)


def write_inputs() -> None:
    save_model(Path("model"))
    chats = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Four. " * (i % 60 + 1)}]}
        for i in range(600)
    ]
    write_rows("chats.jsonl", chats)
    system = [{"messages": [{"role": "system", "content": "Be brief."}, *chat["messages"]]} for chat in chats[:20]]
    write_rows("system.jsonl", system)
    write_rows("unknown.jsonl", [{"colour": "red", "taste": "sweet"}] * 20)
    write_rows(
        "pairs.jsonl", [{"prompt": f"How are {i}?", "chosen": "Fine. " * 9, "rejected": "No. " * 9} for i in range(40)]
    )
    Path("loses.jinja").write_text(
        "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] + ': ' + m['content'] + '\n' }}"
        "{% endif %}{% endfor %}"
    )
    for name, changes in {
        "sgd": {"optimizer": {"type": "SGD", "params": {"lr": "auto"}}},
        "batch_of_7": {"train_batch_size": 7},
        "no_bf16": {"bf16": {"enabled": False}},
    }.items():
        Path(f"{name}.json").write_text(json.dumps(ZERO | changes))


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The report of each broken recipe."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("broken"))
    try:
        write_inputs()
        commands = {name: command for name, (command, _) in BROKEN.items()} | {"nothing": WHOLE}
        stages = {name: Stage(make_run(command)) for name, command in commands.items()}
        plans = {}
        for number, (name, stage) in enumerate(stages.items()):
            work = Path("work", str(number)).resolve()
            work.mkdir(parents=True)
            most = 1 if name != "it compiles for ever" else 2
            plans[name] = make_plan(stage, work, {}) | {
                "seen": str(work / "seen.json"),
                "seconds": 0,
                "most_steps": most,
            }
        Path("plans.json").write_text(json.dumps(list(plans.values())))
        command = [sys.executable, "-m", "align.rehearsal.stage", "plans.json"]
        environment = environment_of(next(iter(stages.values())))
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found = {}
        for name, stage in stages.items():
            assert Path(plans[name]["seen"]).exists(), ended.stderr
            seen = json.loads(Path(plans[name]["seen"]).read_text()) | {"asked_output": "out"}
            memory = 1e-4 if name == "it does not fit" else None
            found[name] = judging.judge(stage, seen, argparse.Namespace(card="gaudi2", card_memory=memory))
        yield found
    finally:
        os.chdir(before)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_recipe_is_found_with_its_reason(reports, name):
    report = reports[name]

    warns = name in ("it compiles for ever", "a LoRA target matches nothing")
    assert report["verdict"] == ("warnings" if warns else "no-go"), report["reasons"]
    assert any(reason.startswith(BROKEN[name][1]) for reason in report["reasons"]), report["reasons"]


def test_preferences_with_stored_references_and_samples_are_rehearsed_to_the_end(reports):
    report = reports["nothing"]

    assert report["verdict"] == "go", report["reasons"]
    assert {"forward", "backward", "optimizer", "evaluation", "saving"} <= set(report["memory_per_card_gb"]["by_phase"])


def test_a_port_in_use_is_found():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]

        mistake = find_mistake(Stage(make_run(f"{SFT} chats.jsonl", port)))

    assert mistake.startswith(f"--master_port {port} is in use")
