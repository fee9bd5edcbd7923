"""What a head in blocks and the fused attention save: the same training with and without, counted by the rehearsal.

    python benchmarks/memory.py          # about 8 minutes on 2 cores

Memory is of a dry card (benchmarks/rehearsal.py shows how exact that is): Llamas of 4 layers and hidden size 4096,
LoRA, rows [2, 1024]; "a step" is what lives at its fullest moment beyond what lives between steps. Time is of a smaller
model's forward and backward passes, really computed, the two sides taking turns.

- blocks: as the scripts run by default.
- whole: the model's own head, logits of the whole row, and a loss that is computed from them.
- upstream: whole, and attention as optimum-habana computes it by default (--use_flash_attention False).
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _figures import add_json_flag, keep

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
GB = 1 << 30
MODEL = {"num_hidden_layers": 4, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
MODEL |= {"num_key_value_heads": 8, "max_position_embeddings": 2048, "architectures": ["LlamaForCausalLM"]}
SMALL = {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}
SMALL |= {"num_key_value_heads": 4, "max_position_embeddings": 2048, "vocab_size": 32000}
VOCABULARIES = (128256, 32000)
COMMON = "--do_train --bf16 --lora_target_modules q_proj v_proj --num_workers 1 --gradient_accumulation_steps 1"
PAIR = "--max_prompt_length 512 --max_length 1024 --share_prompts False --per_device_train_batch_size 1"  # two rows
SCRIPTS = {
    "SFT": f"sft.py --dataset_name chats.jsonl --max_seq_length 1024 --per_device_train_batch_size 2 {COMMON}",
    "DPO": f"dpo.py --dataset_name pairs.jsonl {PAIR} {COMMON}",
}
SIDES = {"blocks": [], "whole": [], "upstream": ["--use_flash_attention", "False"]}
ROUNDS, TIMED = 3, 3  # turns of each side, and steps of a turn beside its first one


def write_inputs() -> None:
    from tiny import make_config, make_tokenizer, save_model

    tokenizer = make_tokenizer("llama-3")
    for vocabulary in VOCABULARIES:
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = make_config("llama", **MODEL, **ids, vocab_size=vocabulary, torch_dtype="bfloat16")
        config.save_pretrained(f"llama-{vocabulary}")
        tokenizer.save_pretrained(f"llama-{vocabulary}")
    save_model(Path("small"), **SMALL)
    chat = {"prompt": "What is it? " * 90, "completion": "It is four. " * 90}
    pair = {"prompt": "How are you? " * 60, "chosen": "Fine, thank you. " * 90, "rejected": "No idea at all. " * 90}
    Path("chats.jsonl").write_text(f"{json.dumps(chat)}\n" * 200)
    Path("pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 200)


def arguments_of(script: str, model: str, side: str, output: str, steps: int) -> list[str]:
    flags = ["--model_name_or_path", model, "--output_dir", output, "--max_steps", str(steps), "--save_strategy", "no"]
    return [*SCRIPTS[script].split()[1:], *flags, *SIDES[side], *"--disable_tqdm True --log_level error".split()]


# Memory


def count_memory() -> dict[tuple[str, int, str], dict]:
    """What was seen of each script, vocabulary and side; in one process, as its imports take longer than a step."""
    plans = {}
    for script, command in SCRIPTS.items():
        for vocabulary in VOCABULARIES:
            for side in SIDES:
                work = Path(f"{script}-{vocabulary}-{side}").resolve()
                work.mkdir()
                plans[script, vocabulary, side] = {
                    "script": str(ROOT / command.split()[0]),
                    "arguments": arguments_of(script, f"llama-{vocabulary}", side, str(work / "out"), 1),
                    "seen": str(work / "seen.json"),
                    "models": str(Path("models").resolve()),
                    "steps": 1,
                    "whole_logits": side != "blocks",
                    "probe": {"earlier_moved": 0, "row_differs": 0},
                }
    Path("plans.json").write_text(json.dumps(list(plans.values())))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "HABANA_EMULATOR_DRY": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "align.rehearsal.stage", "plans.json"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = {}
    for key, plan in plans.items():
        seen = json.loads(Path(plan["seen"]).read_text()) if Path(plan["seen"]).exists() else {"error": "did not run"}
        if "error" in seen:
            raise SystemExit(f"{key}: {seen['error']}\n{ended.stderr[-2000:]}")
        found[key] = seen
    return found


def fullest(seen: dict) -> dict:
    return max((seen["peaks"][phase] for phase in ("forward", "backward")), key=lambda peak: peak["total"])


def activations(seen: dict) -> float:
    """GB at the fullest moment of a step beyond what lives between steps."""
    return (fullest(seen)["total"] - min(step["total"] for step in seen["steps"])) / GB


def show_memory(seen: dict[tuple[str, int, str], dict]) -> list[dict]:
    rows = []
    print(f"{'a step, GB':12}{'vocabulary':>11}{'blocks':>9}{'whole':>9}{'upstream':>10}", end="")
    print(f"{'/ whole':>10}{'/ upstream':>12}")
    for script in SCRIPTS:
        for vocabulary in VOCABULARIES:
            blocks, whole, upstream = (activations(seen[script, vocabulary, side]) for side in SIDES)
            print(f"{script:12}{vocabulary:>11,}{blocks:>9.2f}{whole:>9.2f}{upstream:>10.2f}", end="")
            print(f"{blocks / whole:>10.2f}{blocks / upstream:>12.2f}")
            rows.append({"script": script, "vocabulary": vocabulary, "blocks": blocks, "whole": whole})
            rows[-1]["upstream"] = upstream
    print("\nWhat is left in blocks, GB by the module that made it")
    for (script, vocabulary, side), each in seen.items():
        modules = {name: size / GB for name, size in fullest(each)["by_module"].items() if name}
        parts = [f"{name} {size:.2f}" for name, size in modules.items() if size > 0.04]
        if side == "blocks":
            print(f"{script:12}{vocabulary:>11,}  {', '.join(parts)}")
    return rows


# Time


def take_turns(script: str, answer) -> None:
    """Sends the seconds of forward and backward passes by side; to be run in a process of its own."""
    from align.rehearsal.watching import put_aside
    from align.training import preference, supervised

    name = SCRIPTS[script].split()[0].removesuffix(".py")
    module = {"SFT": supervised, "DPO": preference}[script]
    trainer = supervised.SupervisedTrainer if script == "SFT" else preference.PreferenceTrainer
    seconds: dict[str, list[float]] = {side: [] for side in ("blocks", "whole")}
    find_head, step = module.find_head, trainer.training_step

    for turn in range(ROUNDS):
        for side, taken in seconds.items():
            steps: list[float] = []

            def timed(*args, steps=steps, **kwargs):
                began = time.monotonic()
                loss = step(*args, **kwargs)
                steps.append(time.monotonic() - began)
                return loss

            trainer.training_step = timed
            module.find_head = find_head if side == "blocks" else lambda *_: None
            sys.argv = [f"{name}.py", *arguments_of(script, "small", side, f"{script}-{side}-{turn}", TIMED + 1)]
            with contextlib.ExitStack() as stack:
                put_aside(stack)
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # it holds the table alone
                importlib.import_module(name).main()
            taken += steps[1:]
    answer.send(seconds)


def show_time() -> list[dict]:
    rows = []
    print(f"\n{'a pass, s':12}{'vocabulary':>11}{'blocks':>9}{'whole':>9}{'/ whole':>20}")
    # The emulator then does not tell the card's tensors from the host's, which takes as long as a small model's step
    os.environ |= {"HABANA_EMULATOR_STRICT": "0", "HABANA_EMULATOR_DRY": "0", "OMP_NUM_THREADS": "1"}
    context = multiprocessing.get_context("spawn")
    for script in SCRIPTS:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=take_turns, args=(script, there))
        process.start()
        there.close()
        try:
            blocks, whole = map(statistics.median, here.recv().values())
        except EOFError:
            raise SystemExit(f"{script}: the timed run ended with an error, see above") from None
        process.join()
        print(f"{script:12}{SMALL['vocab_size']:>11,}{blocks:>9.2f}{whole:>9.2f}{blocks / whole:>20.2f}", flush=True)
        rows.append({"script": script, "blocks": blocks, "whole": whole})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_flag(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_inputs()
        figures = {"gb": show_memory(count_memory()), "seconds": show_time()}
        os.chdir(ROOT)
    keep(args.json, figures)


if __name__ == "__main__":
    main()
