"""What `--rehearse` tells before there is a card. Run: pytest tests/test_rehearsal.py

Rehearsals run in processes of their own, as the dry card is chosen when torch is imported. Models are tiny.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, write_rows
from tiny import save_model

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
    """)

    assert said.split("\n")[0] == "hpu:0 hpu:0 cpu cpu meta meta"
    assert said.split("\n")[1] == "meta hpu:0 hpu:0"
    assert said.split("\n")[2] == f"cpu torch.Size([{1 << 40}])"


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

    code, report, ended = rehearse(
        *("--no_shrunken_run", "--world_size", 4, "--use_deepspeed", ROOT / "sft.py", "--model_name_or_path", model),
        *(
            "--dataset_name",
            data,
            "--output_dir",
            "out",
            "--do_train",
            "--do_eval",
            "--max_steps",
            50,
            "--save_steps",
            10,
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
    assert not Path("out").exists()
