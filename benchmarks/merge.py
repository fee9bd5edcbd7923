"""Merges synthetic LoRA adapters into a synthetic 7B-shaped Llama three ways: cp, transformers and PEFT, and ours.

python benchmarks/merge.py                  4.5 GB, three rounds, interleaved; needs 15 GB of disk
python benchmarks/merge.py --gigabytes 1 4.5 13 --rounds 1

Each row is a process of its own. Wall time includes its start and flushing to disk; memory is its peak resident set.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _figures import add_json_flag, keep

ROOT = Path(__file__).resolve().parents[1]
HIDDEN, INTERMEDIATE, VOCABULARY, RANK = 4096, 11008, 32000, 16
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
ADAPTERS = {"q, v": ("self_attn.q_proj", "self_attn.v_proj"), "all linear": tuple(LINEARS)}
LAYER_BYTES = 2 * sum(rows * columns for rows, columns in LINEARS.values())
ENDS_BYTES = 2 * 2 * VOCABULARY * HIDDEN
LLAMA_70B_GB = 138
UPSTREAM = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
"""


def make_inputs(folder: Path, layers: int) -> None:
    """A random bf16 Llama of that many 7B-sized layers in shards of about 1 GB, and the adapters of ADAPTERS."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16) * 0.02

    base = folder / "base"
    config = LlamaConfig(num_hidden_layers=layers, torch_dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(base)
    places, shard, held = {}, {}, 0

    def save_shard() -> None:
        nonlocal shard, held
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(shard, base / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard, held = {}, 0

    parts = [{"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}]
    for number in range(layers):
        layer = {f"model.layers.{number}.{name}.weight": shape for name, shape in LINEARS.items()}
        layer |= {
            f"model.layers.{number}.{norm}.weight": (HIDDEN,)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        parts.append(layer)
    parts.append({"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)})
    for part in parts:
        for name, shape in part.items():
            shard[name] = random(*shape)
            held += shard[name].nbytes
        if held > 0.9e9:
            save_shard()
    save_shard()
    index = {"metadata": {"total_size": layers * LAYER_BYTES + ENDS_BYTES}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    for title, targets in ADAPTERS.items():
        adapter = folder / title
        adapter.mkdir()
        tensors = {}
        for number in range(layers):
            for target in targets:
                module, (rows, columns) = f"base_model.model.model.layers.{number}.{target}", LINEARS[target]
                tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, columns) * 0.02
                tensors[f"{module}.lora_B.weight"] = torch.randn(rows, RANK) * 0.02
        save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}
        settings |= {"r": RANK, "lora_alpha": 24, "target_modules": [target.split(".")[-1] for target in targets]}
        (adapter / "adapter_config.json").write_text(json.dumps(settings))


def measure(command: list[str], output: Path, base: Path) -> dict[str, float]:
    """Seconds until the command has ended and `output` is on disk, seconds of CPU, and peak resident memory in MB.

    Every way starts after an untimed copy, whatever ran before it: with nothing left to write, the base in the page
    cache, and, in a virtual machine, memory for the output that the host has not taken back.
    """
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(base, output)
    os.sync()
    shutil.rmtree(output)
    subprocess.run(["cat", *base.iterdir()], stdout=subprocess.DEVNULL, check=True)
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    messages = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{messages.decode()}")
    subprocess.run(["sync", *(path for path in output.iterdir() if path.is_file())], check=True)
    seconds = time.perf_counter() - start
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": usage.ru_maxrss * 1024 / 1e6}


def count_differences(first: Path, second: Path) -> int:
    """Elements of the two checkpoints that differ, counted in a process of its own to keep this one small."""
    code = """
import sys, torch
from pathlib import Path
from safetensors import safe_open
def open_all(folder):
    files = [safe_open(file, "pt") for file in Path(folder).glob("*.safetensors")]
    return {name: file for file in files for name in file.keys()}
ours, theirs = map(open_all, sys.argv[1:])
if set(ours) != set(theirs):
    sys.exit(f"different tensors: {set(ours) ^ set(theirs)}")
print(sum((file.get_tensor(name) != theirs[name].get_tensor(name)).sum().item() for name, file in ours.items()))
"""
    result = subprocess.run([sys.executable, "-c", code, first, second], capture_output=True, check=True, text=True)
    return int(result.stdout)


def run(folder: Path, gigabytes: float, rounds: int, upstream: bool) -> list[dict]:
    layers = max(1, round((gigabytes * 1e9 - ENDS_BYTES) / LAYER_BYTES))
    size = layers * LAYER_BYTES + ENDS_BYTES
    print(f"Making a base of {layers} layers, {size / 1e9:.2f} GB", flush=True)
    subprocess.run([sys.executable, __file__, "--make_inputs", folder, str(layers)], check=True)
    base, copy, theirs, ours = (folder / name for name in ("base", "copy", "theirs", "ours"))
    ways = [("cp -r", "", copy, ["cp", "-r", base, copy])]
    for adapter in ADAPTERS:
        inputs = ("--base_model_name", base, "--adapter_model_name", folder / adapter)
        if upstream:
            command = [sys.executable, "-c", UPSTREAM, base, folder / adapter, theirs]
            ways.append(("transformers and PEFT", adapter, theirs, command))
        command = [sys.executable, "merge_peft_adapter.py", *inputs, "--output_name", ours]
        ways.append(("merge_peft_adapter.py", adapter, ours, command))
    rows = [{"gigabytes": size / 1e9, "way": way, "adapter": adapter, "runs": []} for way, adapter, _, _ in ways]
    for _ in range(rounds):
        for row, (way, adapter, output, command) in zip(rows, ways, strict=True):
            row["runs"].append(measure([str(part) for part in command], output, base))
            print("  {:22} {:10} {:7.1f} s {:7.1f} s of CPU {:6.0f} MB".format(way, adapter, *row["runs"][-1].values()))
            if output == ours and upstream and (differing := count_differences(ours, theirs)):
                sys.exit(f"{differing} elements differ between the two merges of {adapter}")
            for done in {copy, ours, theirs} - ({theirs} if output == theirs else set()):
                shutil.rmtree(done, ignore_errors=True)
    for row in rows:
        for figure in ("seconds", "cpu_seconds", "peak_mb"):
            row[figure] = min(one[figure] for one in row["runs"])  # other work on the host only ever adds
        row["times_cp"] = row["seconds"] / rows[0]["seconds"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[4.5], help="sizes of the base model")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds, of which the fastest counts")
    parser.add_argument("--skip_upstream", action="store_true", help="leave out the way that loads the whole model")
    parser.add_argument("--folder", help="where to work, about three times the size (default: the temporary folder)")
    add_json_flag(parser)
    parser.add_argument("--make_inputs", nargs=2, help=argparse.SUPPRESS)  # in a process of its own: peaks stay apart
    args = parser.parse_args()
    if args.make_inputs:
        make_inputs(Path(args.make_inputs[0]), int(args.make_inputs[1]))
        return
    rows = []
    for gigabytes in args.gigabytes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows += run(Path(folder), gigabytes, args.rounds, not args.skip_upstream)
    print(f"\n{'GB':>5}  {'way':22} {'adapter':10} {'seconds':>8} {'CPU s':>7} {'peak MB':>8} {'x cp':>6}")
    line = "{gigabytes:5.2f}  {way:22} {adapter:10} {seconds:8.1f} {cpu_seconds:7.1f} {peak_mb:8.0f} {times_cp:6.2f}"
    for row in rows:
        print(line.format(**row))
    last = rows[-1]
    print(
        f"\nAt the rate of the last row Llama-2-70B ({LLAMA_70B_GB} GB) takes "
        f"{last['seconds'] / last['gigabytes'] * LLAMA_70B_GB / 60:.0f} minutes and {last['peak_mb']:.0f} MB."
    )
    keep(args.json, rows)


if __name__ == "__main__":
    main()
