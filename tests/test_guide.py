"""The README's recipes, letter by letter, from the first fine-tuning to the answer. Run: pytest tests/test_guide.py

Small models and data lie where the names in the commands find them. The runs are on fewer cards and, in `make test`,
end after a few steps.
"""

import json
import random
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, write_rows
from safetensors.torch import load_file
from test_readme import README
from tiny import PUBLISHED, save_model, save_stand_in

SCRIPTS = "gaudi_spawn.py sft.py merge_peft_adapter.py dpo.py run_generation.py configs".split()
GUIDE = README.partition("## Many cards")[2]  # its recipes stand in this part
BLOCKS = re.findall(r"^```bash\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]
# Where the README says how a recipe of the guide differs from another one
MIXTRAL = {
    "--world_size 8": "--world_size 4",
    "meta-llama/Llama-2-70b-hf": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    '"lvwerra/stack-exchange-paired"': "philschmid/dolly-15k-oai-style --subset 'data/' --streaming False",
    "--per_device_train_batch_size=1": "--max_seq_length 512 --per_device_train_batch_size=2",
    '--output_dir="./sft"': '--output_dir="./model_mixtral"',
}


def change(command: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert old in command, old
        command = command.replace(old, new)
    return command


SFT = next(line for line in LINES if "sft.py" in line)
RECIPES = [change(SFT, MIXTRAL), change(SFT, {"--use_deepspeed": "--use_mpi"})]
RECIPES += [line for line in LINES if re.search(r"python \w+\.py", line)]


@pytest.fixture
def world():
    """What the recipes' names stand for, in the current folder."""
    save_model(Path("mistralai/Mixtral-8x7B-Instruct-v0.1"), "mixtral", "mistral", max_position_embeddings=2048)
    save_model(Path("meta-llama/Llama-2-70b-hf"), "llama", "llama-2", max_position_embeddings=2048)
    write_data()


def write_data() -> None:
    for name in SCRIPTS:
        Path(name).symlink_to(ROOT / name)
    number = random.Random(0).randint
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} and {i}? "},
                {"role": "assistant", "content": "It is four. " * number(1, 9)},
            ]
        }
        for i in range(200)
    ]
    write_rows("philschmid/dolly-15k-oai-style/data/train.jsonl", chats)
    for folder in ("finetune", "rl", "evaluation"):
        pairs = [
            {"question": f"How are {i}?", "response_j": "Fine. " * number(1, 9), "response_k": "No. " * number(1, 9)}
            for i in range(200)
        ]
        write_rows(f"lvwerra/stack-exchange-paired/data/{folder}/train.jsonl", pairs)


def run(command: str, steps: int | None) -> subprocess.CompletedProcess:
    """Runs a recipe on 2 cards in place of 8. A second way to the same folder replaces what the first one made."""
    command = re.sub("--world_size [48]", "--world_size 2", command)
    if steps and re.search("sft.py|dpo.py", command):
        command += f" --max_steps {steps}"
    if 'output_dir="./sft"' in command and Path("sft").exists():
        command += " --overwrite_output_dir"
    if 'output_name="stack-llama-2"' in command and Path("stack-llama-2").exists():
        command += " --overwrite"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{command}\n{ended.stderr}"
    return ended


def trained_modules(folder: str) -> set[str]:
    """Names of the modules that have an adapter, which is whole."""
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    assert all(tensor.numel() and tensor.isfinite().all() for tensor in tensors.values())
    return {key.split(".lora_")[0].rpartition(".")[2] for key in tensors}


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("steps", [2, pytest.param(None, marks=pytest.mark.soak)])
def test_every_recipe_runs_as_it_is_written(world, steps):
    said = [run(command, steps) for command in RECIPES]

    assert trained_modules("model_mixtral") == trained_modules("sft") == {"q_proj", "v_proj"}
    assert trained_modules("dpo") == {"q_proj", "k_proj", "v_proj"}
    dpo = next(each for each, command in zip(said, RECIPES, strict=True) if "dpo.py" in command)
    assert "out_proj, fc_in, fc_out, wte match no module of this llama model" in dpo.stderr
    assert "Here is my prompt" in said[-1].stdout


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_every_recipe_rehearses_at_its_published_size_within_five_minutes_and_two_gigabytes():
    write_data()
    for name in PUBLISHED:
        save_stand_in(Path(name), name)
    commands = [command for command in RECIPES if "--use_mpi" not in command]  # the same ranks a second time
    commands = [re.sub('(output_name="stack-llama-2")(?=\\s*$)', r"\1 --overwrite", command) for command in commands]
    Path("guide.sh").write_text("\n".join(commands))

    ended = subprocess.run(
        ["python", "gaudi_spawn.py", "--rehearse", "guide.sh"], capture_output=True, text=True, check=False
    )

    report = json.loads(Path("rehearsal/report.json").read_text())
    other = [reason for reason in report["reasons"] if "no disk for the merge: it needs 1" not in reason]  # 128 GB
    assert [reason.partition(":")[2] for reason in other] == [
        " --lora_target_modules: out_proj, fc_in, fc_out, wte match no module; nothing is trained there"
    ], ended.stdout + ended.stderr
    assert len(report["stages"]) == len(commands) == 7
    for stage in report["stages"]:
        assert stage["about"]["rehearsal"]["seconds"] < 300, stage["about"]
        assert stage["about"]["rehearsal"]["memory_gb"] < 2, stage["about"]
    peaks = {stage["about"]["command"][0]: stage["memory_per_card_gb"]["peak"] for stage in report["stages"]}
    assert 40 < peaks["sft.py"] < 45  # 73 without the fused attention, which is the default
    assert 16 < peaks["run_generation.py"] < 20
