"""The nearest settings that fit, found by rehearsing them, cheapest first."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from align.rehearsal import judging

ENOUGH = 2  # settings that fit


def find(stage, plan: dict, work: Path, seen: dict, args: argparse.Namespace, run_stage: Callable) -> list[dict]:
    """Rehearses one setting after the other until some fit. `run_stage` is rehearse.py's."""
    found = []
    for number, (change, flags, cards) in enumerate(candidates(stage, plan, seen, work), 1):
        run = stage.run
        nodes = {"localhost": cards} if cards != run.world_size else run.nodes
        other = replace(stage, run=replace(run, nodes=nodes))
        print(f"It does not fit; rehearsing {change}", file=sys.stderr)
        own = {"--output_dir": str(work / f"alternative-{number}")}  # the run that did not fit has written into its own
        has_output = bool(judging.flag_values(plan["arguments"], "--output_dir"))
        arguments = with_flags(plan["arguments"], {**flags, **(own if has_output else {})})
        again = run_stage(
            other, {**plan, "arguments": arguments, "steps": 1, "seconds": 0}, work, f"alternative-{number}"
        )
        memory = judging.memory_of(again)
        if "error" in again or not memory["peak"]:
            reason = again.get("error", {}).get("text", "nothing was measured")
            print(f"{change} could not be rehearsed: {reason}", file=sys.stderr)
            continue
        fits = memory["band"][1] <= judging.card_memory(args)
        found.append(
            {
                "change": change,
                "flags": flags,
                "cards": cards,
                "peak": memory["peak"],
                "fits": fits,
                "computed_tokens": cost(seen, again, run.world_size, cards),
            }
        )
        if sum(each["fits"] for each in found) == ENOUGH:
            break
    return sorted(found, key=lambda each: not each["fits"])


def cost(seen: dict, again: dict, cards_before: int, cards: int) -> float | None:
    """What all cards compute for a step, as a multiple of before; None where the run has no step."""
    if not seen.get("steps") or not again.get("steps"):
        return None
    first, other = seen["steps"][0]["flops"], again["steps"][0]["flops"]
    return round(other * cards / (first * cards_before), 2) if first else None


def candidates(stage, plan: dict, seen: dict, work: Path) -> list[tuple[str, dict[str, str], int]]:
    """What to change, as flags to set and a number of cards."""
    arguments, cards = plan["arguments"], stage.run.world_size
    if stage.script == "run_generation.py":
        size = int((judging.flag_values(arguments, "--batch_size") or ["1"])[0])
        smaller = [(f"--batch_size {size // 2}", {"--batch_size": str(size // 2)}, cards)] if size > 1 else []
        return [*smaller, (f"{2 * cards} cards", {}, 2 * cards)]
    found: list[tuple[str, dict[str, str], int]] = []
    is_off = judging.flag_values(arguments, "--use_flash_attention") == ["False"]  # else it is on where it can be
    flash = {"--use_flash_attention": "True"} if is_off else {}
    checkpointing = {"--gradient_checkpointing": "True"}
    kinds = max(seen.get("peaks", {}).values(), key=lambda peak: peak["total"], default={"by_kind": {}})["by_kind"]
    if "reference" in kinds:
        found.append(("--precompute_ref_log_probs True", {"--precompute_ref_log_probs": "True"}, cards))
    size = int((judging.flag_values(arguments, "--per_device_train_batch_size") or ["1"])[0])
    fewer: dict[str, str] = {}
    if size > 1:
        steps = int((judging.flag_values(arguments, "--gradient_accumulation_steps") or ["1"])[0])
        fewer = {"--per_device_train_batch_size": "1", "--gradient_accumulation_steps": str(steps * size)}
        found.append((show(fewer), fewer, cards))
    has = {name: is_on(arguments, name) for name in (*flash, *checkpointing)}
    for change in (flash, checkpointing, {**flash, **checkpointing}):
        change = {flag: value for flag, value in change.items() if not has[flag]}
        if change and not any(change == each[1] for each in found):
            found.append((show(change), change, cards))
    file = (judging.flag_values(arguments, "--deepspeed") or [""])[0]
    if file and Path(file).is_file():
        config = json.loads(Path(file).read_text())
        stage_now = config.get("zero_optimization", {}).get("stage", 0)
        if stage_now < 3:
            config.setdefault("zero_optimization", {})["stage"] = 3
            path = work / "zero3.json"
            path.write_text(json.dumps(config, indent=2))
            found.append((f"ZeRO stage 3 in place of {stage_now} in {file}", {"--deepspeed": str(path)}, cards))
    everything = {**{flag: "True" for flag in has if not has[flag]}, **fewer}
    if len(everything) > 1:
        found.append((show(everything), everything, cards))
    found.append((f"{2 * cards} cards", {}, 2 * cards))
    if everything:
        found.append((f"{2 * cards} cards and {show(everything)}", everything, 2 * cards))
    return found


def show(flags: dict[str, str]) -> str:
    """Flags as one types them."""
    return " ".join(flag if value == "True" else f"{flag} {value}" for flag, value in flags.items())


def is_on(arguments: list[str], flag: str) -> bool:
    values = judging.flag_values(arguments, flag)
    given = flag in arguments or any(word.startswith(f"{flag}=") for word in arguments)
    return given and values != ["False"]


def with_flags(arguments: list[str], flags: Mapping[str, str | None]) -> list[str]:
    """The arguments with these flags in place of those of the same name; a flag that is None is left out."""
    kept, skipping = [], False
    for word in arguments:
        if word.startswith("--"):
            skipping = "--" + word[2:].partition("=")[0].replace("-", "_") in flags
        if not skipping:
            kept.append(word)
    return [*kept, *(f"{flag}={value}" for flag, value in flags.items() if value is not None)]
