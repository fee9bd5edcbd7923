"""How well a rehearsal foretells memory: the same settings on dry cards and really computed, with the same ledger.

    python benchmarks/rehearsal.py            # all settings, about 15 minutes on 2 cores
    python benchmarks/rehearsal.py llama-lora # one of them
    python benchmarks/rehearsal.py --write    # and keep the error band in align/rehearsal/calibration.json

The settings were written down before any of them was looked at. Both sides run the emulator's own kernels, since
that is what can be measured here: what Gaudi's fused kernels keep was read in their source
(emulator/habana_frameworks/emulator/dry_kernels.py).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
GPT2 = {"vocab_size": 4096, "n_embd": 512, "n_layer": 6, "n_head": 8, "n_positions": 1024}
LORA = "--lora_target_modules q_proj v_proj"
FULL = "--use_peft False"
SFT = "--max_seq_length 256 --per_device_train_batch_size 4 --per_device_eval_batch_size 4"
DPO = "--max_prompt_length 96 --max_length 256 --per_device_train_batch_size 4 --gradient_accumulation_steps 1"

# name: script, family, ranks, ZeRO stage or None, flags
SETTINGS = {
    "llama-lora": ("sft.py", "llama", 1, None, f"{SFT} {LORA} --bf16"),
    "llama-lora-checkpointing": ("sft.py", "llama", 1, None, f"{SFT} {LORA} --bf16 --gradient_checkpointing"),
    "llama-lora-buckets": ("sft.py", "llama", 1, None, f"{SFT} {LORA} --bf16 --packing False --num_buckets 3"),
    "llama-full-float32": ("sft.py", "llama", 1, None, f"{SFT} {FULL}"),
    "llama-full-bf16": ("sft.py", "llama", 1, None, f"{SFT} {FULL} --bf16"),
    "llama-lora-accumulation": ("sft.py", "llama", 1, None, f"{SFT} {LORA} --gradient_accumulation_steps 3"),
    "qwen2-lora": ("sft.py", "qwen2", 1, None, f"{SFT} {LORA} --bf16"),
    "gpt2-full": ("sft.py", "gpt2", 1, None, f"{SFT} {FULL}"),
    "llama-dpo-lora": ("dpo.py", "llama", 1, None, f"{DPO} {LORA}"),
    "llama-dpo-full": ("dpo.py", "llama", 1, None, f"{DPO} {FULL} --bf16 False"),
    "qwen2-dpo-lora-checkpointing": ("dpo.py", "qwen2", 1, None, f"{DPO} {LORA} --gradient_checkpointing"),
    "llama-dpo-padded": ("dpo.py", "llama", 1, None, f"{DPO} {LORA} --share_prompts False"),
    "llama-ddp-lora": ("sft.py", "llama", 2, None, f"{SFT} {LORA} --bf16"),
    "llama-ddp-full": ("sft.py", "llama", 2, None, f"{SFT} {FULL}"),
    "llama-zero1-full": ("sft.py", "llama", 2, 1, f"{SFT} {FULL} --bf16"),
    "llama-zero2-full": ("sft.py", "llama", 2, 2, f"{SFT} {FULL} --bf16"),
    "llama-zero2-lora": ("sft.py", "llama", 2, 2, f"{SFT} {LORA} --bf16"),
    "llama-zero3-full": ("sft.py", "llama", 2, 3, f"{SFT} {FULL} --bf16"),
    "llama-zero3-lora": ("sft.py", "llama", 2, 3, f"{SFT} {LORA} --bf16"),
    "qwen2-zero3-dpo-lora": ("dpo.py", "qwen2", 2, 3, f"{DPO} {LORA}"),
}
STEPS = 3
PHASES = ("forward", "backward", "optimizer", "evaluation")
STATES = ("weights", "adapter", "gradients", "optimizer", "reference")


def write_inputs(folder: Path) -> None:
    from tiny import save_model

    for family in {family for _, family, *_ in SETTINGS.values()}:
        sizes = GPT2 if family == "gpt2" else SIZES
        save_model(folder / family, family, "gpt2" if family == "gpt2" else "llama-3", **sizes)
    number = random.Random(0).randint
    chats, pairs = [], []
    for i in range(400):
        answer = "It is four. " * number(1, 30)
        chats.append([{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": answer}])
        chosen, rejected = ("Fine, thank you. " * number(1, 12), "No idea at all. " * number(1, 12))
        pairs.append({"prompt": f"How are {i}? " * number(1, 8), "chosen": chosen, "rejected": rejected})
    (folder / "chats.jsonl").write_text(
        "".join(json.dumps({"prompt": c[0]["content"], "completion": c[1]["content"]}) + "\n" for c in chats)
    )
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for stage in (1, 2, 3):
        zero = {"stage": stage, "overlap_comm": False, "contiguous_gradients": False}
        zero |= {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
        config = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "auto")
        config |= {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}
        (folder / f"zero{stage}.json").write_text(json.dumps({**config, "zero_optimization": zero}))


def plan(name: str, folder: Path, side: str) -> dict:
    script, family, _, stage, flags = SETTINGS[name]
    output = folder / side / name
    output.mkdir(parents=True)
    flags = [*flags.split(), *(["--deepspeed", str(folder / f"zero{stage}.json")] if stage else [])]
    data = folder / ("chats.jsonl" if script == "sft.py" else "pairs.jsonl")
    arguments = ["--model_name_or_path", folder / family, "--dataset_name", data, "--output_dir", output / "out"]
    arguments += ["--do_train", "--do_eval", "--max_steps", STEPS, "--eval_strategy", "no", "--num_workers", 1]
    arguments += ["--use_flash_attention", False]  # a CPU's kernel keeps less than a card's
    return {
        "script": str(ROOT / script),
        "arguments": [*map(str, arguments), *flags],
        "seen": str(output / "seen.json"),
        "models": str(folder / "models"),
        "steps": STEPS,
        "own_kernels": True,
        "probe": {"earlier_moved": 0, "row_differs": 0},
    }


def run_side(names: list[str], folder: Path, side: str, ranks: int) -> None:
    """All settings of one number of ranks in one process a rank: their imports take longer than their steps."""
    if not names:
        return
    path = folder / f"{side}-{ranks}.json"
    path.write_text(json.dumps([plan(name, folder, side) for name in names]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HABANA_EMULATOR_DRY": "1" if side == "predicted" else "0"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "align.rehearsal.stage", str(path)]
    if ranks > 1 and side == "predicted":
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    elif ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [*launcher, *command[1:]]
    with open(folder / f"{side}-{ranks}.log", "w") as log:
        subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)


def compare(name: str, folder: Path) -> dict:
    predicted, measured = (
        json.loads((folder / side / name / "seen.json").read_text()) for side in ("predicted", "measured")
    )
    for side, seen in (("predicted", predicted), ("measured", measured)):
        if "error" in seen:
            return {"error": f"{side}: {seen['error']['text']}"}
    phases = {}
    for phase in PHASES:
        if phase in predicted["peaks"] and phase in measured["peaks"]:
            phases[phase] = [side["peaks"][phase]["total"] for side in (predicted, measured)]
    phases["between steps"] = [side["steps"][-1]["total"] for side in (predicted, measured)]
    states = {kind: [side["steps"][-1]["live"].get(kind, 0) for side in (predicted, measured)] for kind in STATES}
    peaks = [max(phases[phase][side] for phase in phases) for side in (0, 1)]
    return {"peak": peaks, "ratio": peaks[0] / peaks[1], "phases": phases, "states": states}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="setting", help=f"of {', '.join(SETTINGS)}; default all")
    parser.add_argument("--write", action="store_true", help="keep the figures in align/rehearsal/calibration.json")
    parser.add_argument("--folder", type=Path, help="where to work; default a temporary folder")
    args = parser.parse_args()
    names = args.names or list(SETTINGS)
    if unknown := [name for name in names if name not in SETTINGS]:
        parser.error(f"no such setting: {unknown[0]}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_inputs(folder)
        for side in ("predicted", "measured"):
            for ranks in (1, 2):
                run_side([name for name in names if SETTINGS[name][2] == ranks], folder, side, ranks)
        results = {name: compare(name, folder) for name in names}
    for name, result in results.items():
        if "error" in result:
            print(f"{name:30} {result['error']}")
            continue
        parts = " ".join(
            f"{phase} {first / second:.4f}" for phase, (first, second) in result["phases"].items() if second
        )
        print(f"{name:30} peak {result['peak'][1] / 1e6:8.1f} MB, predicted / measured {result['ratio']:.4f}: {parts}")
    measured = {name: round(result["ratio"], 4) for name, result in results.items() if "ratio" in result}
    if args.write:
        kept = ROOT / "align" / "rehearsal" / "calibration.json"
        settings = {**json.loads(kept.read_text())["settings"], **measured}  # a setting run alone replaces itself
        band = {"low": min(0.98, 1 / max(settings.values())), "high": max(1.02, 1 / min(settings.values()))}
        band = {name: round(edge, 3) for name, edge in band.items()}  # what a prediction is multiplied by
        kept.write_text(json.dumps({**band, "settings": settings}, indent=2) + "\n")
    if len(measured) < len(results):
        raise SystemExit("not every setting could be compared")


if __name__ == "__main__":
    main()
