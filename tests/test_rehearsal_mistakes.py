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
    "an unknown column": (f"{SFT} unknown.jsonl", "--dataset_name: the columns colour, taste make no known format"),
    # the same mistakes in other places
    "an evaluation does not fit": (f"{SFT} chats.jsonl --do_eval --per_device_eval_batch_size 64", "does not fit: "),
    "rows of pairs compile for ever": (
        "dpo.py --model_name_or_path model --max_steps 60 --dataset_name varied.jsonl --share_prompts False "
        "--num_buckets 60 --max_prompt_length 64 --max_length 200 --gradient_accumulation_steps 1",
        "still compiling after warm-up: ",
    ),
    "no LoRA target matches": (
        f"{SFT} chats.jsonl --lora-target-modules c_attn",
        "--lora_target_modules: none of c_attn is a module of this llama model",
    ),
    "the template loses a turn": (
        f"{SFT} turns.jsonl --chat_template first.jinja",
        "--chat_template: the chat template does not show the user message, first turns.jsonl, row 1",
    ),
    "bf16 is off in the file and on by default": (
        f"{DPO} --max_prompt_length 32 --max_length 64 --deepspeed no_bf16.json",
        "--deepspeed no_bf16.json: --bf16 is on, but bf16.enabled is false there",
    ),
    "fp16 in the file": (f"{SFT} chats.jsonl --deepspeed fp16.json --bf16", "--deepspeed fp16.json: fp16.enabled is"),
    "no room for answers in SFT": (
        f"{SFT} chats.jsonl --max_seq_length 4",
        "--dataset_name: no row of chats.jsonl is left; dropped: 600 nothing left to learn",
    ),
    "all samples are too long": (
        f"{SFT} chats.jsonl --max_seq_length 6 --truncation drop",
        "--dataset_name: no row of chats.jsonl is left; dropped: 600 longer than --max_seq_length",
    ),
    "an optimizer that Gaudi lacks": (
        f"{SFT} chats.jsonl --deepspeed lion.json",
        "--deepspeed lion.json: DeepSpeed has no Lion for Gaudi; name one of adagrad, adam, adamw there",
    ),
    "no disk for the whole model": (
        f"{SFT} chats.jsonl --use_peft False --max-steps 2000000000 --save-steps 1",
        "no disk for the save: 2000000000 checkpoints of ",
    ),
    "the micro-batch is another": (
        f"{SFT} chats.jsonl --deepspeed micro_of_3.json",
        "--deepspeed micro_of_3.json: train_micro_batch_size_per_gpu is 3 there, but 8",
    ),
    "pairs without a rejected answer": (
        "dpo.py --model_name_or_path model --max_steps 4 --dataset_name chosen.jsonl",
        "--dataset_name: the columns prompt, chosen make no known format",
    ),
    "a column that is not there": (
        f"{SFT} unknown.jsonl --columns prompt=question,completion=taste",
        "--columns: unknown.jsonl has no column 'question'",
    ),
}
WARNS = ("it compiles for ever", "rows of pairs compile for ever", "a LoRA target matches nothing")
TOO_SMALL = {"it does not fit": 1e-4, "an evaluation does not fit": 1e-2}  # GB of a card


# What is not broken, but uses what a rehearsal must find its way through
WHOLE = {
    "stored references": f"{DPO} --precompute_ref_log_probs --do_eval --sample_prompts 2 --max_prompt_length 32 "
    "--max_length 64 --warmup_steps 0",
    "a mix": f"{SFT} chats.jsonl other.jsonl --dataset_mix 0.7 0.3",
    "fused": f"{SFT} chats.jsonl --max_steps -1 --num_train_epochs 2 --save_strategy epoch",
    "kept softmax": f"{SFT} chats.jsonl --use_flash_attention",
    "upstream": f"{SFT} chats.jsonl --use_flash_attention False",
}


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
    more = [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": "More."}]
    write_rows("turns.jsonl", [{"messages": [*chat["messages"], *more]} for chat in chats[:20]])
    Path("first.jinja").write_text(
        "{% for m in messages[:2] %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    )
    write_rows("other.jsonl", [{"question": f"Why {i}?", "answer": "So. " * (i % 5 + 1)} for i in range(60)])
    write_rows("chosen.jsonl", [{"prompt": "Why?", "chosen": "So."}] * 20)
    answers = [("Fine. " * (i * 7 % 40 + 1), "No. " * (i * 11 % 40 + 1)) for i in range(400)]
    write_rows(
        "varied.jsonl", [{"prompt": "How?", "chosen": chosen, "rejected": rejected} for chosen, rejected in answers]
    )
    for name, changes in {
        "lion": {"optimizer": {"type": "Lion", "params": {"lr": "auto"}}},
        "micro_of_3": {"train_micro_batch_size_per_gpu": 3},
        "fp16": {"fp16": {"enabled": True}},
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
        commands = {name: command for name, (command, _) in BROKEN.items()} | WHOLE
        stages = {name: Stage(make_run(command)) for name, command in commands.items()}
        plans = {}
        for number, (name, stage) in enumerate(stages.items()):
            work = Path("work", str(number)).resolve()
            work.mkdir(parents=True)
            most = 2 if "compile" in name else 1
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
            card = argparse.Namespace(card="gaudi2", card_memory=TOO_SMALL.get(name))
            found[name] = judging.judge(stage, seen, card)
        yield found
    finally:
        os.chdir(before)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_recipe_is_found_with_its_reason(reports, name):
    report = reports[name]

    assert report["verdict"] == ("warnings" if name in WARNS else "no-go"), report["reasons"]
    assert report["reasons"][0].startswith(BROKEN[name][1]), report["reasons"]
    if name == "an evaluation does not fit":
        assert "a card in evaluation" in report["reasons"][0]


def test_preferences_with_stored_references_and_samples_are_rehearsed_to_the_end(reports):
    report = reports["stored references"]

    assert report["verdict"] == "go", report["reasons"]
    assert {"forward", "backward", "optimizer", "evaluation", "saving"} <= set(report["memory_per_card_gb"]["by_phase"])


def test_a_mix_of_data_sets_is_rehearsed_with_the_rows_of_each(reports):
    report = reports["a mix"]

    assert report["verdict"] == "go", report["reasons"]
    assert [report["data"][f"train of {name}.jsonl"]["samples"] for name in ("chats", "other")] == [600, 60]
    assert report["data"]["train"]["samples"] == 200  # all of the smaller one, and 7 to 3 of the other
    assert report["data"]["train"]["steps"] == 40


def test_epochs_are_counted_in_steps_and_in_the_checkpoints_that_the_disk_must_hold(reports):
    report = reports["fused"]
    train = report["data"]["train"]

    assert train["steps"] > 0
    assert train["steps"] % 2 == 0
    assert train["computed_tokens"] == pytest.approx(train["steps"] * train["computed_tokens_a_step"], rel=0.01)
    assert train["computed_tokens"] > 1.9 * train["tokens"]  # both epochs, and what pads the last rows
    assert report["disk_gb"]["checkpoints"] == 2


def test_the_default_attention_takes_less_memory_than_a_softmax_that_is_kept(reports):
    names = ("fused", "kept softmax", "upstream")
    fused, *others = (reports[name]["about"]["by_module_gb"]["self_attn"] for name in names)

    assert fused < 0.6 * min(others)


def test_a_port_in_use_is_found():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]

        mistake = find_mistake(Stage(make_run(f"{SFT} chats.jsonl", port)))

    assert mistake.startswith(f"port {port} is in use")
