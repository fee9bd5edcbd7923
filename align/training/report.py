"""What a run leaves to be read: report.html, and a model card with the same facts.

Every figure of a card is of this run; what nobody measured is left out.
"""

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import ModelCardData
from peft import PeftModel

from align.data.packing import read_numbers
from align.data.preparing import CUT, Prepared
from align.launch.nodes import split_tokens
from align.page import escape, frame
from align.training import checkpoints
from align.whole import write_file

PAGE, CARD = "report.html", "README.md"
COLORS = ("#3b5bdb", "#e8590c", "#2f9e44", "#862e9c")
MEMORY = ("memory_allocated (GB)", "max_memory_allocated (GB)")
ALWAYS = {"Learning rate": ["learning_rate"], "Gradient norm": ["grad_norm"], "Memory of a card, GB": MEMORY}
POINTS = 400  # of a curve, at most
LEFT, WIDTH, TOP, HEIGHT = 56, 440, 10, 150  # of the plane of a curve
# What a table of results shows, and how; the rest is in all_results.json.
FIGURES = {
    "train_loss": ("training loss, mean", "{:.4f}"),
    "eval_loss": ("evaluation loss", "{:.4f}"),
    "perplexity": ("perplexity", "{:.4g}"),
    "eval_rewards/accuracies": ("chosen above rejected, held out", "{:.1%}"),
    "eval_rewards/margins": ("reward margin, held out", "{:.4f}"),
    "train_runtime": ("seconds of training", "{:,.1f}"),
    "train_samples_per_second": ("rows a second", "{:,.4g}"),
    "train_steps_per_second": ("steps a second", "{:,.4g}"),
}


def write_report(trainer: Any, panels: Mapping[str, Sequence[str]]) -> None:
    """Writes both (rank 0). `panels` names the metrics of each set of curves."""
    if trainer.is_world_process_zero():
        folder, facts = Path(trainer.args.output_dir), collect(trainer)
        write_file(folder / PAGE, render(facts, trainer.state.log_history, {**panels, **ALWAYS}))
        write_file(folder / CARD, make_card(facts))


def collect(trainer: Any) -> dict[str, Any]:
    """The facts of a run that has ended."""
    state, args, flags = trainer.state, trainer.args, trainer.run.flags
    results = {name: value for entry in state.log_history for name, value in entry.items() if name in FIGURES}
    if "eval_loss" in results and "perplexity" not in results and trainer.run.facts["script"] == "sft.py":
        results["perplexity"] = math.exp(min(results["eval_loss"], 700))
    peaks = [entry[MEMORY[1]] for entry in state.log_history if MEMORY[1] in entry]
    names = flags["dataset_name"]
    return {
        "script": trainer.run.facts["script"],
        "model": flags["model_name_or_path"],
        "reference": flags.get("ref_model"),
        "datasets": [names] if isinstance(names, str) else list(names),
        "is_adapter": isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel),
        "output": Path(args.output_dir).resolve().name,
        "steps": state.global_step,
        "epochs": state.epoch,
        "ranks": args.world_size,
        "sharing": trainer.run.facts["--deepspeed"],
        "results": {label: text.format(results[name]) for name, (label, text) in FIGURES.items() if name in results},
        "peak_gb": max(peaks, default=None),
        "data": {split: summarise(part) for split, part in trainer.prepared.items()},
        "gate": describe_gate(trainer.passed),
        "left_out": trainer.nonfinite_steps,
        "resumed": str(trainer.resumed_from) if trainer.resumed else None,
        "command": shlex.join(split_tokens(sys.argv)[0]),
        "flags": {name: value for name, value in sorted(flags.items()) if value not in (None, [], {}, "")},
        "versions": {**checkpoints.software(), "python": sys.version.split()[0]},
        "prompts": trainer.samples.prompts,
        "answers": trainer.samples.answers,
    }


def describe_gate(passed: Mapping[str, int] | None) -> str:
    """Says what the check of the saved weights has looked at."""
    if not passed:
        return "nothing was saved"
    text = f"{passed['tensors']:,} tensors with {passed['elements']:,} values read back: whole, finite, equal to memory"
    if "changed" in passed:
        text += f"; {passed['changed']:,} of {passed['trained']:,} trained weights have changed"
    return text


def summarise(prepared: Prepared) -> dict[str, str]:
    """What became of the rows of a split: used, left out, cut, told."""
    if prepared.parts:
        parts = {name: summarise(part) for name, part in prepared.parts.items()}
        summed = {f"{name}: {what}": text for name, part in parts.items() for what, text in part.items()}
        return {**summed, **(_count(prepared.rows, "all together: ") if isinstance(prepared.rows, Dataset) else {})}
    if not isinstance(prepared.rows, Dataset):
        return {"rows": "a stream, counted by nobody; what was left out or cut is in the log"}
    told = {"left out": _list(prepared.dropped or {})}
    cuts = {note.removeprefix(CUT): count for note, (count, _) in prepared.notes.items() if note.startswith(CUT)}
    told["cut"] = _list(cuts)
    notes = {note: found for note, found in prepared.notes.items() if not note.startswith(CUT)}
    others = {note: f"{count:,}, first {at}" for note, (count, at) in notes.items()}
    return {**_count(prepared.rows), **told, **others}


def _count(rows: Dataset, before: str = "") -> dict[str, str]:
    tokens = int(read_numbers(rows, "length").sum())
    counted = {f"{before}samples": f"{len(rows):,}", f"{before}tokens": f"{tokens:,}"}
    if "trained" in rows.column_names:
        counted[f"{before}trained on"] = f"{read_numbers(rows, 'trained').sum() / tokens:.1%} of the tokens"
    return counted


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items()) or "none"


# ---------------------------------------------------------------- the page


def render(facts: Mapping[str, Any], history: Sequence[Mapping], panels: Mapping[str, Sequence[str]]) -> str:
    title = f"{facts['output']}: {facts['script']}"
    charts = [chart(name, find_curves(history, metrics)) for name, metrics in panels.items()]
    charts = [f"<section>{each}</section>" for each in charts if each]
    pairs = [f'<div class="two">{"".join(charts[place : place + 2])}</div>' for place in range(0, len(charts), 2)]
    data = "".join(f"<h3>{escape(split)}</h3>{table(rows)}" for split, rows in facts["data"].items())
    flags = f"<details><summary>All flags of the run</summary>{table(facts['flags'])}</details>"
    parts = [
        head(facts),
        *pairs,
        f"<section><h2>Data</h2>{data}</section>",
        samples(facts),
        f'<div class="two"><section><h2>Results</h2>{table(find_results(facts))}</section>'
        f"<section><h2>Software</h2>{table(facts['versions'])}</section></div>",
        f"<section><h2>Command</h2><pre>{escape(facts['command'])}</pre>{flags}</section>",
    ]
    return frame(title, "".join(parts))


def head(facts: Mapping[str, Any]) -> str:
    kind = "An adapter for" if facts["is_adapter"] else "All weights of"
    lines = [f"{kind} {facts['model']}, {describe_steps(facts)}."]
    if facts["reference"]:
        lines.append(f"The reference is {facts['reference']}.")
    if facts["resumed"]:
        lines.append(f"It went on from {facts['resumed']}.")
    if facts["left_out"]:
        lines.append(f"{facts['left_out']} steps were not finite and not taken: bad_batch.jsonl.")
    shown = list(find_results(facts).items())[:6]
    cells = "".join(
        f'<div class="figure"><b>{escape(value)}</b><span class="soft">{escape(what)}</span></div>'
        for what, value in shown
    )
    sign = ("warnings", "With bad steps") if facts["left_out"] else ("go", "Checked")
    return (
        f'<header><div class="top"><div><h1>{escape(facts["output"])}</h1>'
        f'<p class="soft">{escape(" ".join(lines))}</p></div><span class="verdict {sign[0]}">{sign[1]}</span></div>'
        f'<div class="figures">{cells}</div><p class="soft gate">Saved weights: {escape(facts["gate"])}.</p></header>'
    )


def describe_steps(facts: Mapping[str, Any]) -> str:
    cards = "one card" if facts["ranks"] == 1 else f"{facts['ranks']} cards"
    shared = "" if facts["sharing"] == "none" else f" under {facts['sharing']}"
    epochs = f", {facts['epochs']:.2f} epochs" if facts["epochs"] else ""
    return f"{facts['steps']:,} steps{epochs} of {facts['script']} on {cards}{shared}"


def find_results(facts: Mapping[str, Any]) -> dict[str, str]:
    peak = {} if facts["peak_gb"] is None else {"GB of a card's memory at most": f"{facts['peak_gb']:.2f}"}
    return {**facts["results"], **peak}


def table(rows: Mapping[str, Any]) -> str:
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return f"<table>{cells}</table>"


def samples(facts: Mapping[str, Any]) -> str:
    """Each prompt with what the model said before and after; nothing where nobody asked."""
    answers = facts["answers"]
    said = "".join(
        f'<h3>{number}</h3><pre>{escape(prompt)}</pre><div class="two">'
        + "".join(
            f'<div><h3>{when}</h3><p class="said">{escape(answers[when][number - 1])}</p></div>' for when in answers
        )
        + "</div>"
        for number, prompt in enumerate(facts["prompts"], 1)
    )
    how = "--do_eval --sample_prompts 3 shows here what the model answers before and after training."
    inside = said or f'<p class="soft">{how}</p>'
    return f"<section><h2>Answers to held-out prompts</h2>{inside}</section>"


# ---------------------------------------------------------------- curves

Curve = list[tuple[float, float]]


def find_curves(history: Sequence[Mapping], metrics: Sequence[str]) -> dict[str, Curve]:
    """Steps and values of each metric, of training and of evaluation; every n-th point of long curves."""
    curves = {}
    for name in [f"{part}{name}" for name in metrics for part in ("", "eval_")]:
        points = [(entry["step"], entry[name]) for entry in history if name in entry and math.isfinite(entry[name])]
        if points:
            every = math.ceil(len(points) / POINTS)
            curves[name] = points[::-every][::-1]  # with the last one
    return curves


def chart(title: str, curves: Mapping[str, Curve]) -> str:
    if not curves:
        return ""
    steps, values = zip(*(point for curve in curves.values() for point in curve), strict=True)
    across, up = Axis(steps, LEFT, LEFT + WIDTH), Axis(values, TOP + HEIGHT, TOP)
    grid = "".join(
        f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        for tick in up.ticks
    )
    grid += "".join(
        f'<text x="{across(tick):.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{tick:.6g}</text>'
        for tick in across.ticks
    )
    lines, legend = "", ""
    kinds = list(dict.fromkeys(name.removeprefix("eval_") for name in curves))
    for name, curve in curves.items():
        color = COLORS[kinds.index(name.removeprefix("eval_")) % len(COLORS)]
        dash = ' stroke-dasharray="5 3"' if name.startswith("eval_") else ""
        points = " ".join(f"{across(step):.1f},{up(value):.1f}" for step, value in curve)
        lines += f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.8"{dash}/>'
        if len(curve) <= 60:
            lines += "".join(
                f'<circle cx="{across(step):.1f}" cy="{up(value):.1f}" r="2.4" fill="{color}">'
                f"<title>{escape(name)}, step {step}: {value:.6g}</title></circle>"
                for step, value in curve
            )
        legend += f'<span><i style="background:{color}"></i>{escape(name)} {curve[-1][1]:.4g}</span>'
    size = f"0 0 {LEFT + WIDTH + 14} {TOP + HEIGHT + 24}"
    label = f"{escape(title)} by step"
    return (
        f'<h2>{escape(title)}</h2><svg viewBox="{size}" role="img" aria-label="{label}"><g class="grid">{grid}</g>'
        f'{lines}</svg><div class="legend">{legend}</div>'
    )


class Axis:
    """From values to places between `start` and `end`, with a few round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float, wanted: int = 5):
        low, high = min(values), max(values)
        if high - low <= 1e-9 * max(abs(high), abs(low), 1e-30):  # all alike
            low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
        self.low, self.high, self.start, self.end = low, high, start, end
        rough = (high - low) / wanted
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * times for times in (1, 2, 5, 10) if size * times >= rough)
        first = math.ceil(low / step)
        self.ticks = [tick * step for tick in range(first, first + 2 * wanted) if tick * step <= high]

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)


# ---------------------------------------------------------------- the card


def is_on_hub(name: str) -> bool:
    return name.count("/") == 1 and not Path(name).exists() and not name.startswith((".", "/", "~"))


def make_card(facts: Mapping[str, Any]) -> str:
    """README.md with a header for the Hub, which takes names on the Hub alone, and no folders."""
    is_preference = facts["script"] == "dpo.py"
    data = ModelCardData(
        base_model=facts["model"] if is_on_hub(facts["model"]) else None,
        library_name="peft" if facts["is_adapter"] else "transformers",
        pipeline_tag="text-generation",
        datasets=[name for name in facts["datasets"] if is_on_hub(name)] or None,
        tags=["gaudi", "dpo" if is_preference else "sft", *(["lora"] if facts["is_adapter"] else [])],
    )
    method = "preference tuning (DPO)" if is_preference else "supervised fine-tuning"
    kind = "A LoRA adapter for" if facts["is_adapter"] else "A model made from"
    loss = f", loss `{facts['flags']['loss_type']}`" if is_preference else ""
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {facts['output']}\n",
        f"{kind} `{facts['model']}`, by {method}{loss}: {describe_steps(facts)}, with optimum-habana on Intel Gaudi.\n",
        "## Use\n",
        _usage(facts),
        "## Results\n",
        _rows(find_results(facts)),
        f"The saved weights were checked: {facts['gate']}.\n" if facts["gate"] else "",
        f"{facts['left_out']} steps were not finite and not taken.\n" if facts["left_out"] else "",
        "## Data\n",
        *(f"{split}:\n\n{_rows(rows)}" for split, rows in facts["data"].items()),
        "## How it was trained\n",
        _quote(facts["command"]),
        _rows(facts["versions"]),
    ]
    for number, prompt in enumerate(facts["prompts"], 1):
        said = [f"{when}:\n\n{_quote(answers[number - 1])}" for when, answers in facts["answers"].items()]
        parts += ["## Answers to held-out prompts\n" if number == 1 else "", _quote(prompt), *said]
    return "\n".join(part for part in parts if part)


def _usage(facts: Mapping[str, Any]) -> str:
    if facts["is_adapter"]:
        loading = (
            "from peft import AutoPeftModelForCausalLM\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{facts["output"]}")'
        )
    else:
        loading = (
            "from transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{facts["output"]}")'
        )
    return f"```python\n{loading}\n```\n"


def _rows(rows: Mapping[str, Any]) -> str:
    cells = (f"| {_cell(name)} | {_cell(value)} |\n" for name, value in rows.items())
    return f"| | |\n|---|---|\n{''.join(cells)}"


def _cell(value: object) -> str:
    """As text: a `<s>` in a note would strike out what follows."""
    return escape(" ".join(str(value).split())).replace("|", "\\|")


def _quote(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines() or [""])
