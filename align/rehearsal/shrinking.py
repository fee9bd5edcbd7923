"""The shrunken run beside a rehearsal: the same command with a small model of the same kind, really computed.

A dry card has no values. So whether losses are finite, ranks agree, an adapter is whole and a model keeps samples in
one row apart is seen on a model of the same architecture with few narrow layers, the same tokenizer and DeepSpeed file,
and the first rows of the real data, on at most two ranks.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from align.errors import InputError, one_line
from align.launch.engines import ROOT, clean_environment
from align.rehearsal.alternatives import with_flags

SECONDS = 280  # after which it is given up
SHORT: dict[str, str | None] = {
    "--max_steps": "2",
    "--num_train_epochs": None,  # refused beside --max_steps
    "--save_steps": "2",
    "--logging_steps": "1",
    "--eval_steps": "2",
    "--warmup_steps": "0",
    "--max_train_samples": "64",
    "--max_eval_samples": "8",
    "--num_workers": "1",
}


@dataclass
class Shrunken:
    process: subprocess.Popen
    output: Path
    command: list[str]
    stage: object


def start(stage, plan: dict, work: Path) -> Shrunken | None:
    """Begins the run in the background; None for scripts that train nothing."""
    if stage.script not in ("sft.py", "dpo.py"):
        return None
    ranks = min(2, stage.run.world_size)
    model, output = work / "small model", work / "small run"
    flags = {**SHORT, "--model_name_or_path": str(model.resolve()), "--output_dir": str(output.resolve())}
    arguments = with_flags(plan["arguments"], flags)
    engine = {"deepspeed": ["--use_deepspeed"], "mpi": ["--use_mpi"], "torch": []}[stage.run.engine.key]
    launcher = [str(ROOT / "gaudi_spawn.py"), "--world_size", str(ranks), *engine]
    command = [sys.executable, *launcher, plan["script"], *arguments]
    make = [sys.executable, "-m", "align.rehearsal.shrinking", json.dumps(plan["arguments"]), str(model)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**clean_environment(os.environ), **stage.environment, "PYTHONPATH": path, "HABANA_EMULATOR_DRY": "0"}
    both = f"{_quoted(make)} && exec {_quoted(command)}"
    with open(work / "shrunken.log", "w") as log:
        process = subprocess.Popen(["bash", "-c", both], env=environment, stdout=log, stderr=subprocess.STDOUT)
    return Shrunken(process, output, command, stage)


def _quoted(words: list[str]) -> str:
    import shlex

    return shlex.join(words)


def finish(shrunken: Shrunken, work: Path) -> dict:
    """Waits for the run and judges it: `stops`, `warnings` and what it was (`about`)."""
    try:
        code = shrunken.process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        shrunken.process.terminate()
        return {"stops": [], "warnings": [f"the shrunken run was given up after {SECONDS} s"], "about": None}
    said = (work / "shrunken.log").read_text(errors="replace").splitlines()
    if code:
        line = next((line for line in reversed(said) if "error: " in line), (said or ["no reason given"])[-1])
        return {
            "stops": [f"the shrunken run ended with exit code {code}: {line}"],
            "warnings": [],
            "about": {"code": code},
        }
    stops, losses = [], []
    for entry in json.loads((shrunken.output / "trainer_state.json").read_text())["log_history"]:
        losses += [entry[name] for name in ("loss", "eval_loss") if name in entry]
    if not losses or not all(math.isfinite(loss) for loss in losses):
        stops.append(f"the shrunken run's losses are not finite: {losses}")
    stops += check_saved(shrunken.output)
    ours = f"{len(losses)} losses from {losses[0]:.3f} to {losses[-1]:.3f}" if losses else "no loss"
    warnings = [line.removeprefix("WARNING ") for line in said if line.startswith("WARNING packing:")]
    return {"stops": stops, "warnings": warnings, "about": {"losses": losses, "saved": "read back", "summary": ours}}


def check_saved(output: Path) -> list[str]:
    """What was saved is read back: whole, and finite."""
    from safetensors.torch import load_file

    files = sorted(output.glob("*.safetensors"))
    if not files:
        return [f"the shrunken run saved no weights in {output.name}"]
    for file in files:
        for name, values in load_file(file).items():
            if values.numel() == 0 or not values.isfinite().all():
                return [f"the shrunken run saved {name} empty or not finite"]
    return []


def shrink(arguments: list[str], folder: Path) -> None:
    """Saves a small random model of the kind that the arguments name, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from align.models.guard import find_model, load_config, load_tokenizer
    from align.rehearsal.judging import flag_values

    name = flag_values(arguments, "--model_name_or_path")[0]
    config = load_config(find_model(name, "--model_name_or_path"), "--model_name_or_path")
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    group = heads // kv_heads if kv_heads else 1
    small = {"num_hidden_layers": 2, "hidden_size": 64 * 4, "num_attention_heads": 4, "intermediate_size": 256}
    if kv_heads:
        small["num_key_value_heads"] = max(1, 4 // group)
    if getattr(config, "head_dim", None):
        small["head_dim"] = 64
    if getattr(config, "layer_types", None):
        small["layer_types"] = config.layer_types[:2]
    for name_, value in small.items():
        if hasattr(config, name_):
            setattr(config, name_, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer = (flag_values(arguments, "--tokenizer_name_or_path") or [name])[0]
    flag = "--tokenizer_name_or_path"
    load_tokenizer(find_model(tokenizer, flag), flag).save_pretrained(folder)


if __name__ == "__main__":
    try:
        shrink(json.loads(sys.argv[1]), Path(sys.argv[2]))
    except (OSError, ValueError, IndexError, InputError) as error:
        sys.exit(f"error: no small model could be made: {one_line(error)}")
