"""The report for a terminal."""

from pathlib import Path

from align.rehearsal.judging import BAND, show

SIGNS = {"go": "GO", "warnings": "GO, with warnings", "no-go": "NO-GO"}


def render(report: dict, card_memory: float, folder: Path) -> str:
    lines = []
    for stage in report.get("stages", [report]):
        lines += [*describe_stage(stage, card_memory), ""]
    lines.append(f"{SIGNS[report['verdict']]}")
    lines += [f"  - {reason}" for reason in report["reasons"]]
    for each in report["fits_with"]:
        lines.append(f"  {describe_alternative(each)}")
    lines.append(f"Report: {folder / 'report.html'} and report.json")
    return "\n".join(lines)


def describe_alternative(each: dict) -> str:
    sign = "fits" if each["fits"] else "does not fit"
    cost = f", {each['computed_tokens']:g} times the computation" if each["computed_tokens"] else ""
    return f"{sign} with {each['change']}: {show(each['peak'])} a card{cost}"


def describe_stage(report: dict, card_memory: float) -> list[str]:
    about, memory = report["about"], report["memory_per_card_gb"]
    cards = f"{about['cards']} x {about['card']}" if about["cards"] > 1 else about["card"]
    lines = [f"{Path(about['command'][0]).name}, {cards} ({card_memory:g} GB usable)"]
    if memory["peak"]:
        low, high = memory["band"]
        lines.append(f"  memory a card      {show(memory['peak'])} at most ({show(low)} to {show(high)}, {BAND})")
        for name, size in memory["by_phase"].items():
            bar = "#" * min(40, round(40 * size / card_memory))
            lines.append(f"    {name.replace('_', ' '):16} {show(size):>10}  {bar}".rstrip())
        kinds = ", ".join(
            f"{kind} {show(size)}" for kind, size in memory["by_kind"].items() if size > memory["peak"] / 500
        )
        lines.append(f"    at the fullest   {kinds}")
    if model := about["model"]:
        share = model["trained"] / model["parameters"]
        lines.append(f"  model              {model['parameters']:,} parameters, {share:.2%} trained")
    if report["lora"]["matched"] or report["lora"]["dead"]:
        matched = ", ".join(f"{number} {name}" for name, number in report["lora"]["matched"].items())
        dead = f"; matching nothing: {', '.join(report['lora']['dead'])}" if report["lora"]["dead"] else ""
        lines.append(f"  LoRA               {matched}{dead}")
    for name, data in report["data"].items():
        parts = []
        if "samples" in data:
            parts.append(f"{data['samples']:,} samples, {data['tokens']:,} tokens")
        if data.get("dropped"):
            parts.append("dropped: " + ", ".join(f"{count} {reason}" for reason, count in data["dropped"].items()))
        if data.get("useful_share"):
            parts.append(f"{data['useful_share']:.1%} of the computed tokens useful")
        if data.get("computed_tokens"):
            parts.append(f"{data['steps']:,} steps of {data['computed_tokens_a_step']:,} tokens")
        lines.append(f"  data, {name:12} {'; '.join(parts) or 'a stream'}")
    if report["graphs"]["by_step"]:
        reads = sum(read["times"] for read in report["graphs"]["host_reads"])
        curve = ", ".join(map(str, report["graphs"]["by_step"]))
        steps = "tokens" if Path(about["command"][0]).name == "run_generation.py" else "steps"
        lines.append(f"  graphs             {curve} after the first {steps}; {reads} host reads")
    if report["disk_gb"]:
        lines.append(f"  disk               {describe_disk(report['disk_gb'])}")
    if about["host_memory_gb"]:
        lines.append(
            f"  host memory        {show(about['host_memory_gb']['loading_on_each_node'])} on each node to load"
        )
    if about["shrunken_run"] and "summary" in about["shrunken_run"]:
        lines.append(f"  small model        really trained and read back: {about['shrunken_run']['summary']}")
    if report["seconds_per_step_at_least"]:
        lines.append(f"  time               no faster than {report['seconds_per_step_at_least']:g} s a step")
    return lines


def describe_disk(disk: dict) -> str:
    """Sizes with their units; `checkpoints` is a number, `seconds` a time."""
    parts = []
    for name, value in disk.items():
        value = f"{value:,}" if name == "checkpoints" else f"{value:,.0f} s" if name == "seconds" else show(value)
        parts.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(parts)
