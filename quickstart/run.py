"""The whole pipeline on a small model, by the scripts' own command lines: `make quickstart`.

A random model reads about a village (sft.py --use_peft False), learns to answer questions (LoRA), is merged, learns to
answer in friendly sentences (DPO), is merged again and asked. The scores are those of generated answers to held-out
questions.
"""

import json
import logging
import shlex
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from align.quiet import quiet_imports

with quiet_imports():
    from align.cli import Parser, run_script
    from align.ranges import limit
    from quickstart.data import COURTESY, Question, make_model, write_data
    from quickstart.stages import claim_folder, read_rows, run_command

STAGES = ("pretrain", "sft", "merge_sft", "ask_sft", "dpo", "merge_dpo", "ask_dpo")
HPU = "--use_habana --use_lazy_mode --bf16 --report_to none --save_strategy no --logging_steps 20"
LORA = "--lora_r 16 --lora_alpha 16 --lora_target_modules all-linear"
ASK = "--use_hpu_graphs --use_kv_cache --bf16 --batch_size 48 --max_new_tokens 32"


def make_commands(folder: Path) -> dict[str, list[str]]:
    """Each stage's command line; the guide's flags with a small model and data of our own."""
    name = shlex.quote(str(folder))
    data = f"{name}/data"
    lines = {
        "pretrain": f"sft.py --use_peft False --model_name_or_path {name}/model --dataset_name {data}/text.jsonl "
        f"--output_dir {name}/pretrained --do_train --num_train_epochs 28 --max_seq_length 128 "
        f"--per_device_train_batch_size 8 --learning_rate 2e-3 --lr_scheduler_type cosine --warmup_ratio 0.1 {HPU}",
        "sft": f"sft.py --model_name_or_path {name}/pretrained --dataset_name {data}/questions "
        f"--output_dir {name}/sft --do_train --do_eval --eval_on_start --eval_strategy epoch --num_train_epochs 12 "
        f"--max_seq_length 128 --per_device_train_batch_size 1 --learning_rate 3e-3 --lr_scheduler_type cosine "
        f"--warmup_ratio 0.1 {LORA} --lora_dropout 0.1 {HPU}",
        "merge_sft": f"merge_peft_adapter.py --base_model_name {name}/pretrained --adapter_model_name {name}/sft "
        f"--output_name {name}/sft/final_merged_checkpoint",
        "ask_sft": f"run_generation.py --model_name_or_path {name}/sft/final_merged_checkpoint "
        f"--prompt_file {data}/held_out.jsonl --output_dir {name}/answers_sft {ASK}",
        "dpo": f"dpo.py --model_name_or_path {name}/sft/final_merged_checkpoint --dataset_name {data}/preferences "
        f"--output_dir {name}/dpo --rpo_alpha 5.0 --max_steps 60 --eval_steps 20 --learning_rate 1e-3 "
        f"--warmup_steps 4 --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --max_prompt_length 32 "
        f"--max_length 64 --do_eval {LORA} {HPU.replace('--logging_steps 20', '--logging_steps 5')}",
        "merge_dpo": f"merge_peft_adapter.py --adapter_model_name {name}/dpo --output_name {name}/aligned",
        "ask_dpo": f"run_generation.py --model_name_or_path {name}/aligned "
        f"--prompt_file {data}/held_out.jsonl --output_dir {name}/answers_dpo {ASK}",
    }
    return {stage: shlex.split(line) for stage, line in lines.items()}


def run_stage(stage: str, command: list[str], number: int) -> float:
    """Runs one stage and returns its seconds; the terminal sees the command, its progress and its errors."""
    print(f"\n\033[1m[{number}/{len(STAGES)}] python {shlex.join(command)}\033[0m", flush=True)
    start = time.perf_counter()
    run_command(f"quickstart: {stage}", command)
    return round(time.perf_counter() - start, 1)


def score_answers(answers: list[dict], questions: list[Question]) -> tuple[float, float]:
    """Shares of the answers that are right (word for word, in either style) and that are friendly."""
    by_prompt = {question.prompt: question for question in questions}
    said = [(by_prompt[answer["prompt"]], answer["text"].strip()) for answer in answers]
    right = sum(text in (question.short, question.full) for question, text in said)
    return right / len(said), sum(text.endswith(COURTESY) for _, text in said) / len(said)


def compare_logits(folder: Path) -> float:
    """Largest difference between the merged model and base plus adapter, in plain transformers and PEFT (float32)."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, merged = folder / "sft" / "final_merged_checkpoint", folder / "aligned"
    ids = AutoTokenizer.from_pretrained(merged)("Question: Where does Ada live?\n\nAnswer:", return_tensors="pt")
    with torch.no_grad():
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, torch_dtype="float32"), folder / "dpo"
        )
        expected = model(ids.input_ids).logits
        logits = AutoModelForCausalLM.from_pretrained(merged, torch_dtype="float32")(ids.input_ids).logits
    return (logits - expected).abs().max().item()


def read_history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def summarise(folder: Path, questions: list[Question], seconds: dict[str, float]) -> dict:
    answers = {stage: read_rows(folder / f"answers_{stage}" / "generations.jsonl") for stage in ("sft", "dpo")}
    (sft_right, friendly_before), (dpo_right, friendly_after) = (
        score_answers(answers[stage], questions) for stage in ("sft", "dpo")
    )
    before = next(entry["eval_loss"] for entry in read_history(folder / "sft") if "eval_loss" in entry)
    sft = json.loads((folder / "sft" / "all_results.json").read_text())
    dpo = json.loads((folder / "dpo" / "all_results.json").read_text())
    speed = json.loads((folder / "answers_dpo" / "generation_results.json").read_text())
    return {
        "sft": {
            "eval_loss_before": before,
            "eval_loss_after": sft["eval_loss"],
            "held_out_accuracy": sft_right,
        },
        "dpo": {
            "preferred_share_before": friendly_before,
            "preferred_share_after": friendly_after,
            "reward_accuracy": dpo["eval_rewards/accuracies"],
            "held_out_accuracy": dpo_right,
        },
        "merge": {"max_abs_logit_difference": compare_logits(folder)},
        "generation": {
            "prompt": answers["dpo"][0]["prompt"],
            "text": answers["dpo"][0]["text"],
            "tokens_per_second": speed["tokens_per_second"],
        },
        "seconds": seconds,
        "emulated": version("habana-torch-plugin").endswith("+cpu"),
    }


def draw(folder: Path, path: Path) -> None:
    """The run in one picture: losses of both fine-tunings, and how the preferred answers drew away."""
    from matplotlib.figure import Figure

    panels = {
        "pretrained": ("Reading about the village", ["loss"]),
        "sft": ("Learning to answer", ["loss", "eval_loss"]),
        "dpo": ("Learning the style", ["rewards/chosen", "rewards/rejected", "rewards/margins"]),
    }
    figure = Figure(figsize=(15, 4), layout="constrained")
    for axes, (stage, (title, names)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name in names:
            points = [(entry["step"], entry[name]) for entry in read_history(folder / stage) if name in entry]
            axes.plot(*zip(*points, strict=True), label=name, marker="o", markersize=3)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def show(summary: dict, folder: Path) -> None:
    """The table at the end, and one question as it was answered before and after."""
    sft, dpo = summary["sft"], summary["dpo"]
    rows = (
        ("loss on held-out questions", f"{sft['eval_loss_before']:.2f}", f"{sft['eval_loss_after']:.2f}"),
        ("right answers to held-out questions", "", f"{sft['held_out_accuracy']:.0%}"),
        ("friendly answers", f"{dpo['preferred_share_before']:.0%}", f"{dpo['preferred_share_after']:.0%}"),
        ("right answers after DPO", "", f"{dpo['held_out_accuracy']:.0%}"),
        ("merged against base + adapter, logits", "", f"{summary['merge']['max_abs_logit_difference']:.1e}"),
    )
    print(f"\n{'':40}{'before':>10}{'after':>10}")
    for name, before, after in rows:
        print(f"{name:40}{before:>10}{after:>10}")
    first = {stage: read_rows(folder / f"answers_{stage}" / "generations.jsonl")[0] for stage in ("sft", "dpo")}
    print(f"\n{first['dpo']['prompt']}\n  before DPO:{first['sft']['text']}\n  after DPO: {first['dpo']['text']}")
    print(f"\n{sum(summary['seconds'].values()):.0f} s; curves: {folder}/curves.png; numbers: {folder}/summary.json")
    if summary["emulated"]:
        print("Gaudi was emulated on this CPU: the seconds say nothing about a card.")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart"), help="where everything is written")
    parser.add_argument("--seed", type=int, default=0, help="seed of the village and of the model")
    limit(parser)
    args = parser.parse()
    logging.getLogger("transformers").setLevel(logging.ERROR)

    folder = args.folder
    claim_folder(folder, "quickstart")
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    questions = write_data(folder / "data", args.seed)
    make_model(folder / "model", folder / "data", args.seed)
    seconds = {
        stage: run_stage(
            stage, [*command, *(["--seed", str(args.seed)] if stage in ("pretrain", "sft", "dpo") else [])], i
        )
        for i, (stage, command) in enumerate(make_commands(folder).items(), 1)
    }
    summary = summarise(folder, questions, seconds)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    draw(folder, folder / "curves.png")
    show(summary, folder)


if __name__ == "__main__":
    run_script(main)
