"""Aligns a real model in minutes, on any machine, by the scripts' own command lines: `make demo`.

SmolLM2-135M-Instruct goes on and on. It learns to answer in a sentence or two and to stop there, from its own words
alone: questions are asked, the start of each answer is kept (sft.py), and preferred to another answer that rambles
(dpo.py). Questions that it has never seen are asked before and after; rules that stand in demo/judge.py count what
became of the answers, what of the knowledge, and the perplexity on unrelated text whether it speaks as it did.
"""

import json
import math
import os
import resource
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from align.cli import Parser, run_script
from align.errors import InputError
from demo import model, questions
from demo.judge import find_faults, is_brief, is_right, is_sane
from demo.pairs import make_data, read_rows, write_rows

# In float32: in bfloat16 this model has near-ties, so that a text may turn on the rounding
HPU = "--use_habana --use_lazy_mode --bf16 False --report_to none --save_strategy no --logging_steps 1"
HPU += " --use_flash_attention False"  # as the figures in docs/demo.md were made
LORA = "--lora_r 16 --lora_alpha 32 --lora_dropout 0 --lora_target_modules all-linear"
ASK = "--use_chat_template --use_hpu_graphs --use_kv_cache --batch_size 32 --max_new_tokens 64"
SFT = "--learning_rate 1.7e-4 --lr_scheduler_type cosine"
DPO = "--beta 0.1 --rpo_alpha 1.0 --learning_rate 1e-4 --lr_scheduler_type cosine --warmup_steps 0"
SHOWN = 3  # answers side by side


def ask(folder: Path, name: str, path: Path, prompts: list[str], flags: str = "") -> list[str]:
    """The command that asks the model in `path`, and leaves its answers in `folder`/`name`."""
    write_rows(folder / name / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    return shlex.split(
        f"run_generation.py --model_name_or_path {path} --prompt_file {folder}/{name}/prompts.jsonl "
        f"--output_dir {folder}/{name} {ASK} {flags}"
    )


def training_commands(folder: Path, data: Path, base: Path, steps: tuple[int, int], seed: int) -> dict[str, list[str]]:
    """From `base` to `folder`/aligned; `steps` are those of SFT and of DPO."""
    lines = {
        "fine-tune": f"sft.py --model_name_or_path {base} --dataset_name {data}/sft --output_dir {folder}/sft "
        f"--do_train --max_steps {steps[0]} --max_seq_length 256 --per_device_train_batch_size 2 "
        f"--gradient_accumulation_steps 2 {SFT} {LORA} {HPU}",
        "merge": f"merge_peft_adapter.py --adapter_model_name {folder}/sft --output_name {folder}/sft/merged",
        "prefer": f"dpo.py --model_name_or_path {folder}/sft/merged --dataset_name {data}/dpo "
        f"--output_dir {folder}/dpo --max_steps {steps[1]} --eval_strategy no --per_device_train_batch_size 2 "
        f"--gradient_accumulation_steps 4 --max_prompt_length 64 --max_length 128 {DPO} {LORA} {HPU}",
        "merge again": f"merge_peft_adapter.py --adapter_model_name {folder}/dpo --output_name {folder}/aligned",
    }
    seeded = {"fine-tune", "prefer"}
    return {
        stage: shlex.split(line) + (["--seed", str(seed)] if stage in seeded else []) for stage, line in lines.items()
    }


def run_stage(stage: str, command: list[str]) -> None:
    """Runs one command; the terminal sees it, its progress and its errors."""
    print(f"\n\033[1m[{stage}] python {shlex.join(command)}\033[0m", flush=True)
    # The emulator then does not tell the card's tensors from the host's, which takes as long as a small model's step
    environment = {"HABANA_EMULATOR_STRICT": "0", **os.environ}
    ended = subprocess.run([sys.executable, ROOT / command[0], *command[1:]], env=environment, check=False)
    if ended.returncode:
        sys.exit(f"demo: {stage} failed with exit code {ended.returncode}; its last lines above say why")


def measure_perplexity(folders: list[Path]) -> list[float]:
    """exp of the mean loss on the unrelated text, paragraph by paragraph, in plain transformers (float32)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    perplexities = []
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        plain = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
        loss, tokens = 0.0, 0
        for paragraph in questions.TEXT.strip().split("\n\n"):
            ids = tokenizer(" ".join(paragraph.split()), return_tensors="pt").input_ids
            with torch.no_grad():
                loss += plain(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
        perplexities.append(math.exp(loss / tokens))
    return perplexities


def split_answers(answers: list[dict]) -> tuple[list[dict], list[dict]]:
    """The answers to the untouched questions, and those to the questions about facts."""
    facts = questions.facts()
    return [each for each in answers if each["prompt"] not in facts], [
        each for each in answers if each["prompt"] in facts
    ]


def score(answers: list[dict]) -> dict[str, float]:
    untouched, factual = split_answers(answers)
    facts = questions.facts()
    return {
        "preferred_share": sum(map(is_brief, untouched)) / len(untouched),
        "sane_share": sum(map(is_sane, untouched)) / len(untouched),
        "accuracy": sum(is_right(each, facts[each["prompt"]]) for each in factual) / len(factual),
    }


def summarise(before: list[dict], after: list[list[dict]], perplexities: list[float], seeds: list[int]) -> dict:
    """The figures before (the same for all seeds) and after, a list by seed, and the texts of the first seed."""
    scores = [score(before), *map(score, after)]
    summary: dict = {"seeds": seeds}
    for name in scores[0]:
        summary[name] = {"before": [scores[0][name]] * len(seeds), "after": [each[name] for each in scores[1:]]}
    summary["perplexity"] = {"before": perplexities[:1] * len(seeds), "after": perplexities[1:]}
    texts = zip(split_answers(before)[0], split_answers(after[0])[0], strict=True)
    summary["texts"] = [{"prompt": was["prompt"], "before": was["text"], "after": now["text"]} for was, now in texts]
    return summary


def draw(summary: dict, history: list[dict], path: Path) -> None:
    """The run in one picture: shares before and after, the length of every answer, and the rewards on the way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4), layout="constrained")
    shares, lengths, rewards = figure.subplots(1, 3)
    names = {"preferred_share": "brief", "sane_share": "sane", "accuracy": "facts right"}
    for shift, when in ((-0.2, "before"), (0.2, "after")):
        heights = [100 * sum(summary[name][when]) / len(summary["seeds"]) for name in names]
        bars = shares.bar([place + shift for place in range(len(names))], heights, 0.4, label=when)
        shares.bar_label(bars, fmt="%.0f %%")
        counts = [len(text[when].split()) for text in summary["texts"]]
        lengths.hist(counts, bins=range(0, 66, 3), alpha=0.6, label=when)
    shares.set(title="Untouched questions", xticks=range(len(names)), xticklabels=names.values(), ylim=(0, 112))
    shares.set_ylabel("%")
    lengths.set(title="Length of the answers (cut at 64 tokens)", xlabel="words", ylabel="answers")
    for name in ("rewards/chosen", "rewards/rejected"):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        rewards.plot(*zip(*points, strict=True), label=name, marker="o", markersize=3)
    rewards.set(title="Learning to prefer", xlabel="step")
    for axes in (shares, lengths, rewards):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def side_by_side(left: str, right: str, width: int) -> str:
    """Two texts in two columns of `width` letters."""
    columns = [
        [line for part in text.strip().splitlines() for line in textwrap.wrap(part, width) or [""]]
        for text in (left, right)
    ]
    height = max(map(len, columns))
    lines = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    return "\n".join(f"{was:<{width}}   {now}".rstrip() for was, now in lines)


def show(summary: dict, after: list[list[dict]], folder: Path) -> None:
    """Tables, the first questions side by side, and what went wrong."""
    width = min(60, (shutil.get_terminal_size((110, 24)).columns - 3) // 2)
    for text in summary["texts"][:SHOWN]:
        print(f"\n\033[1m{text['prompt']}\033[0m\n{side_by_side('BEFORE', 'AFTER', width)}")
        print(side_by_side(text["before"], text["after"], width))
    seeds = summary["seeds"]
    print(f"\n{'':34}{'before':>9}" + "".join(f"{f'seed {seed}':>9}" for seed in seeds))
    rows = {
        f"brief, of {len(summary['texts'])} untouched questions": "preferred_share",
        "sane": "sane_share",
        "right, of questions about facts": "accuracy",
    }
    for title, name in rows.items():
        figures = summary[name]["before"][:1] + summary[name]["after"]
        print(f"{title:34}" + "".join(f"{figure:9.0%}" for figure in figures))
    figures = summary["perplexity"]["before"][:1] + summary["perplexity"]["after"]
    print(f"{'perplexity on unrelated text':34}" + "".join(f"{figure:9.2f}" for figure in figures))
    failures = [
        (each, find_faults(each)) for each in split_answers(after[0])[0] if not (is_brief(each) and is_sane(each))
    ]
    print(f"\nNot as wished, of seed {seeds[0]}:" if failures else f"\nAll as wished, of seed {seeds[0]}.")
    for answer, faults in failures:
        said = textwrap.shorten(answer["text"], 90, placeholder=" …")
        print(f"  {answer['prompt']}  {said}  ({', '.join(faults) or 'not brief'})")
    print(f"\n{summary['seconds']:.0f} s, {summary['peak_gb']:.1f} GB; {folder}/demo.png; {folder}/summary.json")
    print(f"Talk to both:  make chat MODEL={folder}/seed-{seeds[0]}/aligned COMPARE={folder}/model")
    if version("habana-torch-plugin").endswith("+cpu"):
        print("Gaudi was emulated on this CPU: the seconds say nothing about a card.")


def peak_gb() -> float:
    """The most memory that one process had, of this one and those that it started, in GB (10^9 bytes)."""
    whom = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in whom) * 1024 / 1e9


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="where everything is written")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="seeds of the training, each a run of its own"
    )
    parser.add_argument("--sft_steps", type=int, default=10, help="steps of fine-tuning, 4 rows of 256 tokens each")
    parser.add_argument("--dpo_steps", type=int, default=8, help="steps of preference tuning, 8 pairs each")
    parser.add_argument("--questions", type=int, default=0, help="only so many questions of each set, to try the demo")
    args = parser.parse()
    if args.questions < 0:
        raise InputError(f"--questions: got {args.questions}; give a number of questions, or 0 for all")
    if len(set(args.seeds)) < len(args.seeds):
        raise InputError("--seeds: one of them stands twice; each names a run of its own")

    start = time.perf_counter()
    folder, base = args.folder, args.folder / "model"
    held = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if held - {"packages", "model", ".model.partial"} and not (folder / "packages" / model.REQUIREMENTS).exists():
        raise InputError(f"--folder: {folder} holds something else; name a new folder")
    model.prepare(base, folder / "packages")
    for path in (folder / "before", folder / "sampled", folder / "data", *folder.glob("seed-*")):
        shutil.rmtree(path, ignore_errors=True)

    # The model as it is: what it answers, and from that what it shall learn
    limit = args.questions or None
    written = questions.written_answers()
    taught = [*questions.own_questions()[:limit], *list(written)[:limit]]
    untouched, facts = questions.read_lines(questions.UNTOUCHED)[:limit], list(questions.facts())[:limit]
    run_stage("ask", ask(folder, "before", base, [*taught, *untouched, *facts]))
    run_stage("sample", ask(folder, "sampled", base, taught, "--do_sample --temperature 0.8 --seed 0"))
    answers = read_rows(folder / "before" / "generations.jsonl")
    learnt, before = answers[: len(taught)], answers[len(taught) :]
    samples, pairs = make_data(learnt, read_rows(folder / "sampled" / "generations.jsonl"), written)
    write_rows(folder / "data" / "sft" / "train.jsonl", samples)
    write_rows(folder / "data" / "dpo" / "train.jsonl", pairs)
    print(f"\n{len(samples)} answers to learn, {len(pairs)} pairs to prefer by: {folder}/data")

    after = []
    for seed in args.seeds:
        run = folder / f"seed-{seed}"
        steps = args.sft_steps, args.dpo_steps
        for stage, command in training_commands(run, folder / "data", base, steps, seed).items():
            run_stage(stage, command)
        run_stage("ask again", ask(run, "answers", run / "aligned", [*untouched, *facts]))
        after.append(read_rows(run / "answers" / "generations.jsonl"))

    runs = [folder / f"seed-{seed}" for seed in args.seeds]
    perplexities = measure_perplexity([base, *(run / "aligned" for run in runs)])
    summary = summarise(before, after, perplexities, args.seeds)
    history = json.loads((runs[0] / "dpo" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    draw(summary, history, folder / "demo.png")
    summary |= {"seconds": round(time.perf_counter() - start, 1), "peak_gb": round(peak_gb(), 2)}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    show(summary, after, folder)


if __name__ == "__main__":
    run_script(main)
