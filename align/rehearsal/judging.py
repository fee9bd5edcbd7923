"""Makes a report and a verdict from what a rehearsal has seen."""

import argparse
import json
import math
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from align import __version__
from align.launch.engines import ROOT

GB = 1 << 30  # as optimum-habana and hl-smi count them
# Usable memory in GB, bfloat16 products in TFLOP/s, and links to other cards in GB/s (Intel's data sheets)
CARDS: dict[str, dict[str, Any]] = {
    "gaudi2": {"name": "Gaudi 2", "memory": 94.6, "tflops": 432, "links": 262},
    "gaudi3": {"name": "Gaudi 3", "memory": 126.0, "tflops": 1835, "links": 525},
}

CALIBRATION = json.loads(Path(__file__).with_name("calibration.json").read_text())
BAND = "measured" if CALIBRATION["settings"] else "assumed, not measured"  # what the error band of memory is
PHASES = ("loading", "between_steps", "forward", "backward", "optimizer", "evaluation", "saving", "generation")
WARM_UP = 20  # steps after which no new graph should appear


def card_memory(args: argparse.Namespace) -> float:
    return args.card_memory or CARDS[args.card]["memory"]


def judge(stage, seen: dict, args: argparse.Namespace, shrunken: dict | None = None) -> dict:
    """The report of one stage: its keys are those of report.json."""
    stops, warnings = [], []
    if error := seen.get("error"):
        stops.append(error["text"])
    stops += seen.get("stops", [])
    memory = memory_of(seen)
    usable, fits = card_memory(args), None
    if memory["peak"]:
        low, high = memory["band"]
        fits = low <= usable
        fullest = max(memory["by_phase"], key=memory["by_phase"].get)
        told = f"{show(memory['peak'])} a card in {fullest.replace('_', ' ')} ({show(low)} to {show(high)}, {BAND})"
        if low > usable:
            stops.append(f"does not fit: {told}, and a card has {usable:g} GB")
        elif high > usable:
            warnings.append(f"may not fit: {told}, and a card has {usable:g} GB")
    lora = lora_of(stage.run.script, seen)
    if lora["dead"] and "--lora_target_modules" not in (error or {}).get("text", ""):
        warnings.append(f"--lora_target_modules: {', '.join(lora['dead'])} match no module; nothing is trained there")
    graphs, late = graphs_of(seen)
    warnings += late
    disk, short = disk_of(stage, seen)
    stops += short
    warnings += [text for text in seen.get("warnings", []) if not (lora["dead"] and "lora_target_modules" in text)]
    if shrunken is not None:
        stops += shrunken["stops"]
        warnings += shrunken["warnings"]
    verdict = "no-go" if stops else "warnings" if warnings else "go"
    return {
        "verdict": verdict,
        "reasons": stops + warnings,
        "memory_per_card_gb": memory,
        "lora": lora,
        "data": data_of(seen),
        "graphs": graphs,
        "disk_gb": disk,
        "seconds_per_step_at_least": seconds_of(seen, CARDS[args.card]),
        "fits_with": [],
        "about": {
            "command": stage.run.script,
            "cards": stage.run.world_size,
            "card": CARDS[args.card]["name"],
            "card_memory_gb": usable,
            "fits": fits,
            "by_module_gb": modules_of(seen),
            "by_phase_and_kind_gb": kinds_of(seen),
            "rows_by_micro_batch": [batch["shapes"][-1] for batch in seen.get("shapes", []) if batch["shapes"]],
            "model": seen.get("model"),
            "host_memory_gb": host_of(stage, seen),
            "rehearsal": seen.get("host"),
            "version": __version__,
            "shrunken_run": shrunken and shrunken["about"],
            "certainty": CERTAINTY,
        },
    }


CERTAINTY = {
    "exact": ["data", "lora", "disk_gb of checkpoints", "shapes"],
    "exact for the emulator": ["memory_per_card_gb", "graphs"],
    "a bound": ["seconds_per_step_at_least"],
    "guessed": ["host_memory_gb", "seconds of a merge"],
}


def gb(size: float) -> float:
    return float(f"{size / GB:.4g}")


def show(size: float) -> str:
    """A size of so many GB, with a unit that suits it."""
    units = {"GB": 1, "MB": 1 << 10, "kB": 1 << 20}
    unit = next((unit for unit, factor in units.items() if size * factor >= 1), "kB")
    size *= units[unit]
    return f"{size:,.{1 if size < 100 else 0}f} {unit}"


def memory_of(seen: dict) -> dict:
    phases = seen.get("peaks", {})
    steps = seen.get("steps", [])
    between = max((step["total"] for step in steps), default=0)
    by_phase = {name: gb(phases[name]["total"]) for name in PHASES if name in phases}
    if between:
        by_phase["between_steps"] = gb(between)
    fullest: dict[str, Any] = max(phases.values(), key=lambda peak: peak["total"], default={"total": 0, "by_kind": {}})
    peak = fullest["total"]
    low, high = CALIBRATION["low"], CALIBRATION["high"]
    return {
        "peak": gb(peak),
        "between_steps": gb(between),
        "band": [gb(peak * low), gb(peak * high)],
        "by_phase": {name: by_phase[name] for name in PHASES if name in by_phase},
        "by_kind": {kind: gb(size) for kind, size in fullest["by_kind"].items()},
    }


def modules_of(seen: dict) -> dict:
    fullest = max(seen.get("peaks", {}).values(), key=lambda peak: peak["total"], default={"by_module": {}})
    return {name or "outside the layers": gb(size) for name, size in fullest["by_module"].items()}


def kinds_of(seen: dict) -> dict:
    """What lives at the fullest moment of each phase, in GB."""
    phases = {name: peak["by_kind"] for name, peak in seen.get("peaks", {}).items()}
    if seen.get("steps"):
        phases["between_steps"] = max(seen["steps"], key=lambda step: step["total"])["live"]
    return {name: {kind: size / GB for kind, size in phases[name].items()} for name in PHASES if name in phases}


def flag_values(command: list[str], flag: str) -> list[str]:
    """What follows a flag on a command line, where it is given last."""
    for number, word in reversed(list(enumerate(command))):
        if word.startswith(f"{flag}="):
            return [word.partition("=")[2]]
        if word == flag:
            rest = command[number + 1 :]
            stop = next((index for index, each in enumerate(rest) if each.startswith("--")), len(rest))
            return rest[:stop]
    return []


def lora_of(command: list[str], seen: dict) -> dict:
    adapted = (seen.get("model") or {}).get("adapted", {})
    wanted = flag_values(command, "--lora_target_modules")
    names = [target for target in wanted if re.fullmatch(r"[\w.]+", target)]
    dead = [name for name in names if adapted and name.rpartition(".")[2] not in adapted]
    if not adapted and (match := re.search(r"none of (.+) is a module", (seen.get("error") or {}).get("text", ""))):
        dead = match[1].split(", ")
    return {"matched": adapted, "dead": dead}


def data_of(seen: dict) -> dict:
    data = {name: dict(about) for name, about in seen.get("data", {}).items()}
    for name, share in seen.get("useful", {}).items():
        data.setdefault(name, {})["useful_share"] = share
    run, steps = seen.get("run"), seen.get("steps", [])
    if run and steps and "train" in data:
        tokens = [batch["tokens"] for batch in seen["shapes"]]
        a_step = sum(tokens) / len(tokens) * run["accumulation"] * run["world_size"]
        total = run["max_steps"]
        data["train"] |= {
            "shapes": sorted({tuple(batch["shapes"]) for batch in seen["shapes"]}),
            "steps": total,
            "computed_tokens_a_step": round(a_step),
            "computed_tokens": round(a_step * total),
        }
    return data


def graphs_of(seen: dict) -> tuple[dict, list[str]]:
    """Distinct graphs after each step, and warnings where they go on to grow."""
    by_step = [step["graphs"] for step in seen.get("steps", [])] or seen.get("graphs_by_pass", [])
    reads = [{**read, "file": shorten(read["file"])} for read in seen.get("host_reads", [])]
    run, warnings = seen.get("run"), []
    shapes, late = [], []
    if run and seen.get("shapes"):
        for number, batch in enumerate(seen["shapes"]):
            if batch["shapes"] not in shapes:
                shapes.append(batch["shapes"])
                step = number // run["accumulation"] + 1
                if step > WARM_UP:
                    late.append((step, batch["shapes"]))
    if len(late) > 0:
        step, shape = late[-1]
        warnings.append(
            f"still compiling after warm-up: {len(late)} new shapes between steps {WARM_UP} and {step}, the last one "
            f"{shape}; each is a compilation of seconds to minutes (fewer --num_buckets, or packing)"
        )
    return {"by_step": by_step, "host_reads": reads, "shapes": shapes}, warnings


def shorten(path: str) -> str:
    return path.partition("site-packages/")[2] or path.removeprefix(f"{ROOT}/")


def disk_of(stage, seen: dict) -> tuple[dict, list[str]]:
    """What the run writes, in GB, and what is wrong with that."""
    if merge := seen.get("merge"):
        return disk_of_merge(merge, seen)
    run = seen.get("run")
    files = seen.get("files", {})
    if not run or not files:
        return {}, []
    output = Path(run["output_dir"]).resolve()
    world = stage.run.world_size
    checkpoint = final = 0
    for path, size in files.items():
        if not Path(path).is_relative_to(output):
            continue
        size *= world if re.search(r"rank_0|rng_state_0", Path(path).name) else 1
        if "checkpoint-" in Path(path).relative_to(output).parts[0]:  # unfinished-checkpoint-N while it is written
            checkpoint += size
        else:
            final += size
    number = math.ceil(run["max_steps"] / run["save_steps"]) if run["save_steps"] else 1
    if run["save_total_limit"]:
        number = min(number, run["save_total_limit"] + 1)  # the oldest goes when the newest is there
    needed = checkpoint * number + final
    place, free = free_disk(seen)
    disk = {
        "checkpoint": gb(checkpoint),
        "checkpoints": number,
        "final": gb(final),
        "needed": gb(needed),
        "free": gb(free),
    }
    if needed > free:
        text = (
            f"no disk for the save: {number} checkpoints of {show(checkpoint / GB)} and {show(final / GB)} at the end"
        )
        more = f" are {show(needed / GB)}, {place} has {show(free / GB)} free (see --save_total_limit)"
        return disk, [text + more]
    return disk, []


def free_disk(seen: dict) -> tuple[Path, int]:
    """Where the run would write, and the bytes that are free there."""
    wanted = Path(seen.get("asked_output") or ".").resolve()
    place = next(folder for folder in (wanted, *wanted.parents) if folder.is_dir())
    return place, shutil.disk_usage(place).free


def disk_of_merge(merge: dict, seen: dict) -> tuple[dict, list[str]]:
    """A merge's disk, and how long it takes where the disk is as fast as this one."""
    place, free = free_disk(seen)
    seconds = round(merge["moved"] / disk_rate(place))
    disk = {"needed": gb(merge["bytes"]), "free": gb(free), "seconds": seconds}
    if merge["bytes"] > free:
        return disk, [
            f"no disk for the merge: it needs {show(merge['bytes'] / GB)}, {place} has {show(free / GB)} free"
        ]
    return disk, []


def disk_rate(place: Path, size: int = 64 << 20) -> float:
    """Bytes a second that this disk writes, and is taken to read."""
    block, began = os.urandom(1 << 20), time.monotonic()
    with tempfile.TemporaryFile(dir=place) as file:
        for _ in range(size >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return size / (time.monotonic() - began)


def host_of(stage, seen: dict) -> dict | None:
    """Host memory that loading takes on each node.

    Under ZeRO-3 rank 0 holds one file at a time, no more than 10 GB where models come in parts. Else all ranks map the
    same files, and each holds what is in another number format on its card.
    """
    if not seen.get("loaded"):
        return None
    ranks = max(stage.run.nodes.values())
    sizes = [
        min(model["file"], 10 * GB) if model["in_parts"] else model["shared"] + model["own"] * ranks
        for model in seen["loaded"]
    ]
    return {"loading_on_each_node": gb(max(sizes))}


def seconds_of(seen: dict, card: dict) -> float | None:
    """No step is faster than its products at the card's peak, nor than its bytes through the card's links."""
    steps = seen.get("steps", [])
    if not steps:
        return seen.get("seconds_at_least")
    before = steps[-2] if len(steps) > 1 else seen["before"]
    flops = steps[-1]["flops"] - before["flops"]
    sent = steps[-1]["bytes_sent"] - before["bytes_sent"]
    return float(f"{max(flops / (card['tflops'] * 1e12), sent / (card['links'] * 1e9)):.3g}")


def join(reports: list[dict]) -> dict:
    """The report of a recipe: its fullest stage, with all stages in `stages`."""
    order = ("go", "warnings", "no-go")
    fullest = max(reports, key=lambda report: report["memory_per_card_gb"]["peak"])
    verdict = max((report["verdict"] for report in reports), key=order.index)
    reasons = [
        f"{Path(report['about']['command'][0]).name}: {reason}" for report in reports for reason in report["reasons"]
    ]
    return {**fullest, "verdict": verdict, "reasons": reasons, "stages": reports}
