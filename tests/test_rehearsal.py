"""What `--rehearse` tells before there is a card. Run: pytest tests/test_rehearsal.py

Rehearsals run in processes of their own, as the dry card is chosen when torch is imported. Models are tiny.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_rows
from tiny import save_model

from align.launch.engines import ENGINES, Run
from align.rehearsal import alternatives, shrinking
from align.rehearsal.rehearse import Stage

TARGETS = ["--lora_target_modules", "q_proj", "v_proj"]
KEYS = {
    "verdict",
    "reasons",
    "memory_per_card_gb",
    "lora",
    "data",
    "graphs",
    "disk_gb",
    "seconds_per_step_at_least",
    "fits_with",
}
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i}?"},
            {"role": "assistant", "content": "It is four. " * (i % 9 + 1)},
        ]
    }
    for i in range(80)
]


def in_dry_process(code: str) -> str:
    """The output of some lines of Python on a dry card."""
    environment = os.environ | {"HABANA_EMULATOR_DRY": "1"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def rehearse(*arguments) -> tuple[int, dict, subprocess.CompletedProcess]:
    """Exit code, report and output of `gaudi_spawn.py --rehearse`."""
    command = [sys.executable, str(ROOT / "gaudi_spawn.py"), "--rehearse", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    report = Path("rehearsal/report.json")
    return ended.returncode, json.loads(report.read_text()) if report.exists() else {}, ended


def test_tensors_on_a_dry_card_have_a_place_but_no_data():
    said = in_dry_process("""if True:
        import torch
        card, host, own = torch.zeros(2, device="hpu"), torch.zeros(2), torch.zeros(2, device="meta")
        print(card.device, (card * 2).device, card.cpu().device, host.device, own.device, torch.zeros_like(own).device)
        print(torch.zeros_like(card, device="meta").device, card.to(torch.bfloat16).device, card.cpu().hpu().device)
        print(torch.empty(1 << 40).device, torch.empty(1 << 40, device="hpu").cpu().shape)

        from habana_frameworks.emulator import dry_kernels
        from habana_frameworks.torch.hpex.normalization import FusedRMSNorm
        dry_kernels.uninstall()
        with torch.autocast("hpu", torch.bfloat16):
            rows = torch.nn.functional.embedding(torch.zeros(3, dtype=torch.long, device="hpu"), card[:, None])
            print(FusedRMSNorm.apply(rows, torch.ones(1, device="hpu"), 1e-6).device)
    """)

    assert said.split("\n")[0] == "hpu:0 hpu:0 cpu cpu meta meta"
    assert said.split("\n")[1] == "meta hpu:0 hpu:0"
    assert said.split("\n")[2] == f"cpu torch.Size([{1 << 40}])"
    assert said.split("\n")[3] == "hpu:0"


def test_a_host_reads_what_it_put_there_and_else_one_zero_or_false():
    said = in_dry_process("""if True:
        import torch
        known = torch.tensor([3, 4], device="hpu")
        unknown = torch.rand(2, device="hpu")
        print(known.tolist(), (known * 2).sum().item(), known[1:].cpu().numpy())
        print(unknown.tolist(), unknown.long().sum().item(), bool((unknown > 2).any()))
        known.add_(unknown.long())
        print(known.tolist())
    """)

    assert said == "[3, 4] 14 [4]\n[1.0, 1.0] 0 False\n[0, 0]\n"


def test_a_rehearsal_reports_memory_adapter_data_graphs_and_disk():
    model = save_model(Path("model"))
    data = write_rows("data.jsonl", CHATS)
    Path("out").mkdir()
    Path("out/adapter_model.safetensors").write_text("of an earlier run")

    code, report, ended = rehearse(
        *("--no_shrunken_run", "--world_size", 4, "--use_deepspeed", ROOT / "sft.py", "--model_name_or_path", model),
        *(
            "--dataset_name",
            data,
            "--output-dir",
            "out",
            "--overwrite-output-dir",
            "--do_train",
            "--do_eval",
            "--max_steps",
            50,
            "--save_steps",
            10,
            "--push-to-hub",  # a rehearsal uploads nothing
            "--hub-model-id=me/model",
            "--report_to=none",
        ),
        *("--deepspeed", ROOT / "configs/llama2_ds_zero3_config.json", "--bf16", "--max_seq_length", 64, *TARGETS),
    )

    assert code == 0, ended.stderr
    assert report.keys() >= KEYS
    assert report["verdict"] == "go"
    memory = report["memory_per_card_gb"]
    assert memory["band"][0] < memory["peak"] < memory["band"][1]
    assert {"loading", "between_steps", "forward", "backward", "optimizer", "evaluation", "saving"} == set(
        memory["by_phase"]
    )
    assert report["lora"] == {"matched": {"q_proj": 2, "v_proj": 2}, "dead": []}
    assert report["data"]["train"]["samples"] == 76
    assert report["graphs"]["by_step"] == sorted(report["graphs"]["by_step"])
    assert report["disk_gb"]["checkpoints"] == 5
    assert "GO" in ended.stdout
    assert "Nothing leaves this machine: --push_to_hub is left out" in ended.stderr
    assert Path("out/adapter_model.safetensors").read_text() == "of an earlier run"


@pytest.mark.soak
def test_settings_that_fit_are_found_by_rehearsing_them():
    save_model(Path("model"), num_hidden_layers=4)
    write_rows("chats.jsonl", CHATS)
    flags = ["--model_name_or_path", "model", "--dataset_name", "chats.jsonl", "--output_dir", "out", "--do_train"]
    flags += ["--max_steps", 2, "--max_seq_length", 256, "--per_device_train_batch_size", 8, *TARGETS]
    code, report, ended = rehearse("--no_shrunken_run", ROOT / "sft.py", *flags)
    peak = report["memory_per_card_gb"]["peak"]
    code, report, ended = rehearse("--no_shrunken_run", "--card_memory", peak * 0.5, ROOT / "sft.py", *flags)
    assert (code, report["verdict"]) == (1, "no-go")
    assert any(each["fits"] and each["peak"] < peak * 0.5 for each in report["fits_with"]), ended.stderr
    smaller = ["--no_shrunken_run", "--no_alternatives", "--card_memory", peak * 0.5]
    assert rehearse(*smaller, ROOT / "sft.py", *flags)[1]["fits_with"] == []


def test_a_shrunken_run_takes_two_steps_however_long_the_command_would_take():
    asked = ["--num-train-epochs", "1", "--max_steps=-1", "--beta", "0.1", "--warmup-steps=10"]
    kept = alternatives.with_flags(asked, shrinking.SHORT)
    assert kept[:2] == ["--beta", "0.1"]
    assert "--max_steps=2" in kept
    assert not any("epochs" in word or "10" in word for word in kept)


def test_each_setting_is_rehearsed_in_a_folder_of_its_own(tmp_path, capsys):
    plans = []

    def run_stage(stage, plan, work, name):
        plans.append(plan["arguments"])
        return {"error": {"text": "broken"}} if len(plans) == 1 else {"peaks": {"forward": PEAK}, "steps": []}

    run = Run(ENGINES["deepspeed"], ["sft.py"], {"localhost": 8}, False, {}, None, False, 60, 60)
    arguments = ["--output_dir", "out", "--per_device_train_batch_size", "2"]
    args = argparse.Namespace(card="gaudi2", card_memory=40)
    found = alternatives.find(Stage(run), {"arguments": arguments}, tmp_path, {}, args, run_stage)
    folders = [next(word for word in plan if word.startswith("--output_dir=")) for plan in plans]
    assert len(set(folders)) == len(folders) > 2
    assert all("out" not in plan for plan in plans)
    assert [each["fits"] for each in found] == [True, True]
    assert "could not be rehearsed: broken" in capsys.readouterr().err


PEAK = {"total": 30 << 30, "by_kind": {"activations": 30 << 30}, "by_module": {}}
