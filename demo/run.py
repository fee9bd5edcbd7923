"""Aligns a real model in minutes, on any machine, by the scripts' own command lines: `make demo`.

SmolLM2-135M-Instruct goes on and on. It learns to answer in a sentence or two and to stop there, from its own words
alone: questions are asked, the start of each answer is kept (sft.py), and preferred to another answer that rambles
(dpo.py). Questions that it has never seen are asked before and after; rules that stand in demo/judge.py count what
became of the answers, what of the knowledge, and the perplexity on unrelated text whether it speaks as it did.
"""

import json
import math
import shlex
import shutil
import sys
import textwrap
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from align.cli import Parser, run_script
from align.errors import InputError
from align.ranges import COUNT, COUNT_OR_NONE, SEED, limit
from align.whole import replace_file, write_file
from demo import model, questions
from demo.judge import find_faults, is_brief, is_right, is_sane
from demo.pairs import make_data, write_rows
from quickstart.stages import Progress, Stage, claim_folder, peak_gb, read_rows

# In float32: in bfloat16 this model has near-ties, so that a text may turn on the rounding
HPU = "--use_habana --use_lazy_mode --bf16 False --report_to none --save_strategy no --logging_steps 1"
HPU += " --use_flash_attention False"  # as the figures in docs/demo.md were made
LORA = "--lora_r 16 --lora_alpha 32 --lora_dropout 0 --lora_target_modules all-linear"
ASK = "--use_chat_template --use_hpu_graphs --use_kv_cache --batch_size 32 --max_new_tokens 64"
SFT = "--learning_rate 1.7e-4 --lr_scheduler_type cosine"
DPO = "--beta 0.1 --rpo_alpha 1.0 --learning_rate 1e-4 --lr_scheduler_type cosine --warmup_steps 0"
FLAGS = {"seeds": SEED, "sft_steps": COUNT, "dpo_steps": COUNT, "questions": COUNT_OR_NONE}
SHOWN = 3  # answers side by side
MODEL_GB, SEED_GB = 0.7, 1.2  # on the disk: the model, with the packages that it comes from, and the run of a seed


def quote(path: Path) -> str:
    return shlex.quote(str(path))


def ask(name: str, path: Path, prompts: Path, answers: Path, flags: str = "") -> Stage:
    """Asks the model in `path` what stands in `prompts`, and leaves its answers in `answers`."""
    folders = f"--model_name_or_path {quote(path)} --prompt_file {quote(prompts)} --output_dir {quote(answers)}"
    return Stage(name, shlex.split(f"run_generation.py {folders} {ASK} {flags}"), answers, prompts, resumes=True)


def training_stages(folder: Path, data: Path, base: Path, steps: tuple[int, int], seed: int) -> list[Stage]:
    """From `base` to `folder`/aligned; `steps` are those of SFT and of DPO."""
    run, rows = quote(folder), quote(data)
    fine_tune = (
        f"sft.py --model_name_or_path {quote(base)} --dataset_name {rows}/sft --output_dir {run}/sft "
        f"--do_train --max_steps {steps[0]} --max_seq_length 256 --per_device_train_batch_size 2 "
        f"--gradient_accumulation_steps 2 {SFT} {LORA} {HPU} --seed {seed}"
    )
    prefer = (
        f"dpo.py --model_name_or_path {run}/sft/merged --dataset_name {rows}/dpo "
        f"--output_dir {run}/dpo --max_steps {steps[1]} --eval_strategy no --per_device_train_batch_size 2 "
        f"--gradient_accumulation_steps 4 --max_prompt_length 64 --max_length 128 {DPO} {LORA} {HPU} --seed {seed}"
    )
    merge = f"merge_peft_adapter.py --adapter_model_name {run}/sft --output_name {run}/sft/merged"
    merge_again = f"merge_peft_adapter.py --adapter_model_name {run}/dpo --output_name {run}/aligned"
    return [
        Stage("fine-tune", shlex.split(fine_tune), folder / "sft", data / "sft" / "train.jsonl"),
        Stage("merge", shlex.split(merge), folder / "sft" / "merged"),
        Stage("prefer", shlex.split(prefer), folder / "dpo", data / "dpo" / "train.jsonl"),
        Stage("merge again", shlex.split(merge_again), folder / "aligned"),
    ]


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
    with replace_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


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


def check_space(folder: Path, base: Path, runs: list[Path]) -> None:
    """Refuses a disk that has too little room for the model and the runs, before anything is installed."""
    sizes = {base: MODEL_GB} | dict.fromkeys(runs, SEED_GB)
    held = sum(file.stat().st_size for path in sizes for file in path.rglob("*") if file.is_file()) / 1e9
    free, needed = shutil.disk_usage(folder).free / 1e9, sum(sizes.values()) - held
    if free < needed:
        raise InputError(
            f"--folder: the disk of {folder} has {free:.1f} GB left, {needed:.1f} GB are needed; make room"
        )


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="where everything is written")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="seeds of the training, each a run of its own"
    )
    parser.add_argument("--sft_steps", type=int, default=10, help="steps of fine-tuning, 4 rows of 256 tokens each")
    parser.add_argument("--dpo_steps", type=int, default=8, help="steps of preference tuning, 8 pairs each")
    parser.add_argument("--questions", type=int, default=0, help="only so many questions of each set, to try the demo")
    limit(parser, FLAGS)
    args = parser.parse()
    if len(set(args.seeds)) < len(args.seeds):
        raise InputError("--seeds: one of them stands twice; each names a run of its own")

    start = time.perf_counter()
    folder, base, data = args.folder, args.folder / "model", args.folder / "data"
    runs = [folder / f"seed-{seed}" for seed in args.seeds]
    claim_folder(folder, "demo")
    check_space(folder, base, runs)
    model.prepare(base, folder / "packages")
    progress = Progress(folder, "demo")

    # The model as it is: what it answers, and from that what it shall learn
    size = args.questions or None
    written = questions.written_answers()
    taught = [*questions.own_questions()[:size], *list(written)[:size]]
    unseen = [*questions.read_lines(questions.UNTOUCHED)[:size], *list(questions.facts())[:size]]
    prompts = {name: data / "prompts" / f"{name}.jsonl" for name in ("all", "taught", "unseen")}
    for path, asked in zip(prompts.values(), ([*taught, *unseen], taught, unseen), strict=True):
        write_rows(path, [{"prompt": prompt} for prompt in asked])
    answers, sampled = folder / "before", folder / "sampled"
    progress.run([ask("ask", base, prompts["all"], answers)])
    progress.run([ask("sample", base, prompts["taught"], sampled, "--do_sample --temperature 0.8 --seed 0")])
    said = read_rows(answers / "generations.jsonl")
    learnt, before = said[: len(taught)], said[len(taught) :]
    samples, pairs = make_data(learnt, read_rows(sampled / "generations.jsonl"), written)
    write_rows(data / "sft" / "train.jsonl", samples)
    write_rows(data / "dpo" / "train.jsonl", pairs)
    print(f"\n{len(samples)} answers to learn, {len(pairs)} pairs to prefer by: {data}")

    after = []
    for seed, run in zip(args.seeds, runs, strict=True):
        steps = args.sft_steps, args.dpo_steps
        asked_again = ask("ask again", run / "aligned", prompts["unseen"], run / "answers")
        progress.run([*training_stages(run, data, base, steps, seed), asked_again])
        after.append(read_rows(run / "answers" / "generations.jsonl"))

    perplexities = measure_perplexity([base, *(run / "aligned" for run in runs)])
    summary = summarise(before, after, perplexities, args.seeds)
    history = json.loads((runs[0] / "dpo" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    draw(summary, history, folder / "demo.png")
    seconds = time.perf_counter() - start + sum(stage["seconds"] for stage in progress.kept)
    peak = max([peak_gb(), *(stage["peak_gb"] for stage in progress.kept)])
    summary |= {"seconds": round(seconds, 1), "peak_gb": round(peak, 2)}
    write_file(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    show(summary, after, folder)


if __name__ == "__main__":
    run_script(main)
