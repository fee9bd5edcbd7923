"""The rehearsal's report as a page."""

import shlex
from pathlib import Path

from align.page import escape, frame
from align.rehearsal.judging import BAND, show

COLORS = {
    "weights": "#3b5bdb",
    "adapter": "#15aabf",
    "gradients": "#f08c00",
    "optimizer": "#862e9c",
    "activations": "#2f9e44",
    "logits": "#e8590c",
    "gathered": "#74c0fc",
    "reference": "#5c7cfa",
    "inputs": "#adb5bd",
    "buffers": "#868e96",
    "cache": "#0ca678",
}
VERDICTS = {"go": "Go", "warnings": "Go, with warnings", "no-go": "No-go"}


def render(report: dict, card_memory: float, card: dict) -> str:
    stages = report.get("stages", [report])
    title = "Rehearsal: " + ", ".join(Path(stage["about"]["command"][0]).name for stage in stages)
    body = [header(report, stages)]
    for number, stage in enumerate(stages, 1):
        heading = f"{number}. {Path(stage['about']['command'][0]).name}" if len(stages) > 1 else ""
        body += [part for part in describe(stage, card_memory, heading) if part]
    body.append(footer(report))
    return frame(title, "".join(body))


def header(report: dict, stages: list[dict]) -> str:
    about = report["about"]
    cards = f"{about['cards']} × {about['card']}" if about["cards"] > 1 else f"one {about['card']}"
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in report["reasons"])
    name = " → ".join(Path(stage["about"]["command"][0]).name for stage in stages)
    return (
        f'<header><div class="top"><div><h1>{escape(name)} on {escape(cards)}</h1>'
        f'<p class="soft">A rehearsal: no card and no weights were used.</p></div>'
        f'<span class="verdict {report["verdict"]}">{VERDICTS[report["verdict"]]}</span></div>'
        f"{f'<ul>{reasons}</ul>' if reasons else ''}{figures(report) if len(stages) == 1 else ''}"
        f"{command(report) if len(stages) == 1 else ''}</header>"
    )


def command(report: dict) -> str:
    flags: list[list[str]] = []  # a flag with its values breaks as one, where lines end
    for word in report["about"]["command"]:
        if word.startswith("--") or not flags:
            flags.append([])
        flags[-1].append(word)
    shown = (f'<span class="flag">{escape(shlex.join(words))}</span>' for words in flags)
    return f"<pre>{' '.join(shown)}</pre>"


def figures(report: dict) -> str:
    memory, about = report["memory_per_card_gb"], report["about"]
    shown = []
    if memory["peak"]:
        low, high = memory["band"]
        shown.append(
            (
                show(memory["peak"]),
                f"a card at most ({show(low)} to {show(high)}, {BAND}), of {about['card_memory_gb']:g} GB",
            )
        )
    if memory["between_steps"]:
        shown.append((show(memory["between_steps"]), "a card between steps"))
    if model := about["model"]:
        share = model["trained"] / model["parameters"]
        shown.append((short(model["parameters"]), f"parameters, {share:.2%} trained"))
    if report["seconds_per_step_at_least"]:
        shown.append((f"{report['seconds_per_step_at_least']:.3g} s", "a step, no faster than that"))
    if report["disk_gb"].get("needed"):
        shown.append((show(report["disk_gb"]["needed"]), f"of disk, {show(report['disk_gb'].get('free', 0))} free"))
    cells = "".join(
        f'<div class="figure"><b>{value}</b><span class="soft">{what}</span></div>' for value, what in shown
    )
    return f'<div class="figures">{cells}</div>' if cells else ""


def short(number: int) -> str:
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return str(number)


def describe(report: dict, card_memory: float, heading: str) -> list[str]:
    parts = []
    if heading:
        sign = f'<span class="verdict {report["verdict"]}">{VERDICTS[report["verdict"]]}</span>'
        inside = f'<div class="top"><h1>{escape(heading)}</h1>{sign}</div>{figures(report)}{command(report)}'
        parts.append(f"<section>{inside}</section>")
    parts += [alternatives(report), memory_bars(report, card_memory)]
    parts.append(f'<div class="two">{shapes(report)}{graphs(report)}</div>' if report["graphs"]["by_step"] else "")
    parts.append(f'<div class="two">{data(report)}{files(report)}</div>' if report["data"] or report["disk_gb"] else "")
    return parts


def bar(name: str, sizes: dict[str, float], widest: float, limit: float, colors: dict[str, str]) -> str:
    total = sum(sizes.values())
    pieces = "".join(
        f'<i style="width:{100 * size / widest:.3f}%;background:{colors.get(kind, "#868e96")}" '
        f'title="{escape(kind)} {show(size)}"></i>'
        for kind, size in sizes.items()
    )
    mark = f'<span class="limit" style="left:{100 * limit / widest:.2f}%"></span>' if limit <= widest else ""
    name = escape(name).replace("_", "_<wbr>")
    return (
        f'<div class="row"><span class="name">{name}</span><span class="bar">{pieces}{mark}</span>'
        f'<span class="value">{show(total)}</span></div>'
    )


def memory_bars(report: dict, card_memory: float) -> str:
    phases = report["about"]["by_phase_and_kind_gb"]
    if not phases:
        return ""
    biggest = max(sum(kinds.values()) for kinds in phases.values())
    widest = max(biggest, card_memory) * 1.02 if biggest > card_memory / 8 else biggest * 1.02
    order = {name: {kind: kinds[kind] for kind in [*COLORS, *kinds] if kind in kinds} for name, kinds in phases.items()}
    bars = "".join(bar(name.replace("_", " "), kinds, widest, card_memory, COLORS) for name, kinds in order.items())
    used = [kind for kind in COLORS if any(kinds.get(kind, 0) > widest / 2000 for kinds in phases.values())]
    legend = "".join(f'<span><i style="background:{COLORS[kind]}"></i>{kind}</span>' for kind in used)
    line = f'<span><i style="background:var(--no-go);width:2px"></i>{card_memory:g} GB, what a card has</span>'
    modules = {name: size for name, size in report["about"]["by_module_gb"].items() if size > biggest / 500}
    most = max(modules.values(), default=1) * 1.02
    parts = "".join(bar(name, {name: size}, most, most * 2, {}) for name, size in modules.items())
    return (
        f"<section><h2>Memory of a card</h2>{bars}"
        f"<div class='legend'>{legend}{line if card_memory <= widest else ''}</div>"
        f"<h3>By the part of the model that made it, at the fullest moment</h3>{parts}</section>"
    )


def alternatives(report: dict) -> str:
    if not report["fits_with"]:
        return ""
    rows = "".join(
        f"<tr><td>{escape(each['change'])}</td><td class='n'>{show(each['peak'])}</td>"
        f"<td class='n'>{'× ' + format(each['computed_tokens'], 'g') if each['computed_tokens'] else '-'}</td>"
        f"<td class='{'ok' if each['fits'] else 'no'}'>{'fits' if each['fits'] else 'does not fit'}</td></tr>"
        for each in report["fits_with"]
    )
    head = "<tr><th>Change</th><th class='n'>a card</th><th class='n'>computation</th><th></th></tr>"
    return f"<section><h2>What fits, rehearsed</h2><table>{head}{rows}</table></section>"


def shapes(report: dict) -> str:
    rows = "".join(f"<tr><td>{escape(list(shape))}</td></tr>" for shape in report["graphs"].get("shapes", [])[:12])
    share = next((part["useful_share"] for part in report["data"].values() if part.get("useful_share")), None)
    padding = f"<p>{share:.1%} of the computed tokens are useful, the rest is padding.</p>" if share else ""
    steps = shape_steps(report["about"].get("rows_by_micro_batch", []))
    return f"<section><h2>Shapes of micro-batches</h2>{padding}{steps}<table>{rows}</table></section>"


def shape_steps(lengths: list[int]) -> str:
    """Columns of each micro-batch, in their order."""
    if not lengths:
        return ""
    top = max(lengths)
    width = 410 / len(lengths)
    bars = "".join(
        f'<rect x="{50 + number * width:.1f}" y="{110 - 100 * length / top:.1f}" width="{max(0.6, width - 0.6):.1f}" '
        f'height="{100 * length / top:.1f}" fill="#4c6ef5"/>'
        for number, length in enumerate(lengths)
    )
    text = f'<text x="0" y="16">{top}</text><text x="0" y="110">0</text>'
    text += f'<text x="50" y="128">first {len(lengths)} micro-batches</text>'
    return f'<svg viewBox="0 0 460 130" role="img" aria-label="columns of each micro-batch">{bars}{text}</svg>'


def graphs(report: dict) -> str:
    curve, reads = report["graphs"]["by_step"], report["graphs"]["host_reads"]
    top, number = max(curve), len(curve)
    unit = "token" if Path(report["about"]["command"][0]).name == "run_generation.py" else "step"
    points = [(60 + 390 * (i + 0.5) / number, 110 - 82 * count / top) for i, count in enumerate(curve)]
    dots = "".join(
        f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4" fill="#e8590c"/><text x="{x - 6:.0f}" y="{y - 8:.0f}">{count}</text>'
        f'<text x="{x - 3:.0f}" y="128">{i}</text>'
        for i, ((x, y), count) in enumerate(zip(points, curve, strict=True), 1)
    )
    line = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
    svg = (
        f'<svg viewBox="0 0 460 132" role="img" aria-label="distinct graphs after each {unit}"><polyline '
        f'points="{line}" fill="none" stroke="#e8590c" stroke-width="2"/>{dots}<text x="0" y="128">{unit}</text></svg>'
    )
    if number == 1:
        svg = f"<p>{top:,}, of one {unit} that was rehearsed</p>"
    rows = "".join(
        f"<tr><td>{escape(read['file'])}:{read['line']} ({escape(read['function'])})</td>"
        f"<td class='n'>{read['times']}</td></tr>"
        for read in reads[:8]
    )
    table = f"<h3>Where the host reads from the card</h3><table>{rows}</table>" if rows else ""
    cost = '<p class="soft">A card compiles each of them: seconds to minutes.</p>'
    return f"<section><h2>Distinct graphs after each {unit}</h2>{cost}{svg}{table}</section>"


def data(report: dict) -> str:
    rows = ""
    for name, part in report["data"].items():
        for what, value in part.items():
            if isinstance(value, dict):
                value = ", ".join(f"{count:,} {reason}" for reason, count in value.items())
            if what in ("shapes", "useful_share") or value == "":
                continue
            value = f"{value:,}" if isinstance(value, int) else f"{value:.1%}" if isinstance(value, float) else value
            rows += (
                f"<tr><td>{escape(name)}: {escape(what.replace('_', ' '))}</td><td class='n'>{escape(value)}</td></tr>"
            )
    lora = report["lora"]
    for name, number in lora["matched"].items():
        rows += f"<tr><td>LoRA: {escape(name)}</td><td class='n'>{number} modules</td></tr>"
    for name in lora["dead"]:
        rows += f"<tr><td>LoRA: {escape(name)}</td><td class='n no'>matches nothing</td></tr>"
    return f"<section><h2>Data and adapter</h2><table>{rows}</table></section>"


def files(report: dict) -> str:
    rows = "".join(
        f"<tr><td>{escape(name.replace('_', ' '))}</td>"
        f"<td class='n'>{size if name == 'checkpoints' else show(size)}</td></tr>"
        for name, size in report["disk_gb"].items()
        if name != "seconds"
    )
    host = report["about"]["host_memory_gb"]
    if host:
        rows += (
            f"<tr><td>host memory to load, each node</td><td class='n'>{show(host['loading_on_each_node'])}</td></tr>"
        )
    shrunken = report["about"]["shrunken_run"]
    more = f"<h3>Shrunken run</h3><p>{escape(shrunken.get('summary', 'failed'))}</p>" if shrunken else ""
    return f"<section><h2>Disk and host</h2><table>{rows}</table>{more}</section>"


def footer(report: dict) -> str:
    rows = "".join(
        f"<tr><td>{escape(how)}</td><td>{escape(', '.join(what).replace('_gb', '').replace('_', ' '))}</td></tr>"
        for how, what in report["about"]["certainty"].items()
    )
    return f"<section><h2>How sure is that?</h2><table>{rows}</table></section>"
