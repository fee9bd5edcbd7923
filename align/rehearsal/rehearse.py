"""`gaudi_spawn.py --rehearse`: runs each stage of a command or recipe on dry cards, judges it, looks for what fits."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from align.cli import SWITCH, with_underscores
from align.errors import InputError
from align.launch.engines import ROOT, Run, clean_environment
from align.launch.nodes import choose_port
from align.rehearsal import alternatives, judging, page, shrinking, table

MEMORY_LIMIT = 12  # GB of address space of a rehearsal; about 2 of them are used
STAGE_SECONDS = 45  # training steps are rehearsed for about that long, the first one in any case
PROBE = {"earlier_moved": 0, "row_differs": 0}  # of a model that is right: the shrunken run tries real values
OUTPUT_FLAGS = ("--output_dir", "--output_name")
PATH_FLAGS = (
    *("--model_name_or_path", "--tokenizer_name_or_path", "--ref_model", "--peft_model", "--dataset_name"),
    *("--base_model_name", "--adapter_model_name"),
)
# Nothing of a rehearsal leaves the machine
OUTWARD_FLAGS = ("--push_to_hub", "--report_to")
HUB_FLAGS = tuple(f"--{name}" for name in ("hub_model_id", "hub_private_repo", "hub_always_push", "hub_revision"))
SCRIPTS = ("sft.py", "dpo.py", "merge_peft_adapter.py", "run_generation.py")


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rehearsal")
    group.add_argument("--rehearse", **SWITCH, help="tell what would happen, without a card or weights")
    group.add_argument("--rehearsal_dir", default="rehearsal", metavar="FOLDER", help="for report.json and report.html")
    group.add_argument("--card", choices=judging.CARDS, default="gaudi2", help="which card it is for (default: gaudi2)")
    group.add_argument("--card_memory", type=float, metavar="GB", help="memory of that card, where yours has another")
    group.add_argument("--strict", **SWITCH, help="warnings end in exit code 1 as well")
    group.add_argument("--no_shrunken_run", **SWITCH, help="leave out the real run of a shrunken model")
    group.add_argument("--no_alternatives", **SWITCH, help="do not look for settings that fit")


@dataclass
class Stage:
    """One command of the rehearsal. `line` is where it stands in the recipe."""

    run: Run
    environment: dict[str, str] = field(default_factory=dict)
    line: int | None = None

    def __post_init__(self):
        self.run = replace(self.run, script=with_underscores(self.run.script))

    @property
    def script(self) -> str:
        return Path(self.run.script[0]).name


def rehearse(args: argparse.Namespace, parse: Callable[[list[str]], Run]) -> int:
    """Rehearses and reports; `parse` makes a `Run` of gaudi_spawn.py's own arguments. Returns the exit code."""
    if args.card_memory is not None and args.card_memory <= 0:
        raise InputError(f"--card_memory {args.card_memory:g}: give the gigabytes of a card, more than 0")
    folder = Path(args.rehearsal_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--rehearsal_dir {folder} is a file; name a folder")
    is_recipe = args.script[0].endswith(".sh")
    stages = read_recipe(args.script[0], parse) if is_recipe else [Stage(parse(sys.argv[1:]))]
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)  # what an earlier rehearsal left there
    work.mkdir(parents=True)
    produced: dict[Path, Path] = {}
    reports = []
    for number, stage in enumerate(stages, 1):
        name = f"{number}-{Path(stage.script).stem}"
        print(f"Rehearsing {describe(stage)}", file=sys.stderr)
        reports.append(rehearse_stage(stage, args, work / name, produced))
    report = judging.join(reports) if is_recipe else reports[0]
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "report.html").write_text(page.render(report, judging.card_memory(args), judging.CARDS[args.card]))
    print(table.render(report, judging.card_memory(args), folder))
    return 1 if report["verdict"] == "no-go" or (args.strict and report["verdict"] == "warnings") else 0


def describe(stage: Stage) -> str:
    run = stage.run
    where = f"{run.world_size} cards" if run.world_size > 1 else "one card"
    return f"{stage.script} on {where}"


# Recipes


def read_recipe(path: str, parse: Callable[[list[str]], Run]) -> list[Stage]:
    """The commands of a shell file, one after the other: `[NAME=value] python [gaudi_spawn.py ...] script.py ...`."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    stages = []
    for number, line in logical_lines(text):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        if not words or words[0] in ("set", "cd", "export") or words == ["#!"]:
            if words and words[0] == "cd":
                raise InputError(f"{path}, line {number}: `cd` is not followed; start the rehearsal in that folder")
            if words and words[0] == "export":
                raise InputError(f"{path}, line {number}: write the variable before the command that needs it")
            continue
        environment = {}
        while words and re.fullmatch(r"\w+=.*", words[0], re.DOTALL):
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        if len(words) < 2 or Path(words[0]).name not in ("python", "python3") or not words[1].endswith(".py"):
            raise InputError(f"{path}, line {number}: `{' '.join(words[:2])}` is not a command of a recipe")
        script = Path(words[1]).name
        if script not in (*SCRIPTS, "gaudi_spawn.py"):
            raise InputError(f"{path}, line {number}: only {', '.join(SCRIPTS)} are rehearsed, not {words[1]}")
        run = parse(words[2:] if script == "gaudi_spawn.py" else words[1:])
        stages.append(Stage(run, environment, number))
    if not stages:
        raise InputError(f"{path} holds no command")
    return stages


def logical_lines(text: str) -> list[tuple[int, str]]:
    """Lines of a shell file with the number where each begins; a backslash at the end joins the next one to it."""
    lines, start, joined = [], 1, ""
    for number, line in enumerate(text.splitlines(), 1):
        start = start if joined else number
        joined += line
        if joined.endswith("\\"):
            joined = joined[:-1] + " "
            continue
        lines.append((start, joined))
        joined = ""
    return lines + ([(start, joined)] if joined else [])


# One stage


def rehearse_stage(stage: Stage, args: argparse.Namespace, work: Path, produced: dict[Path, Path]) -> dict:
    """Rehearses one command and returns its report."""
    work.mkdir(parents=True)
    plan = make_plan(stage, work, produced)
    if error := find_mistake(stage):
        return judging.judge(stage, {"error": {"kind": "input", "text": error}}, args)
    started = None if args.no_shrunken_run else shrinking.start(stage, plan, work)
    seen = run_stage(stage, plan, work, "rehearsal")
    shrunken = shrinking.finish(started, work) if started else None
    report = judging.judge(stage, seen, args, shrunken)
    if not args.no_alternatives and report["about"]["fits"] is False:
        report["fits_with"] = alternatives.find(stage, plan, work, seen, args, run_stage)
    return report


def make_plan(stage: Stage, work: Path, produced: dict[Path, Path]) -> dict:
    """What a stage's process is to run; where it would write is noted in `produced`."""
    given = {word.partition("=")[0] for word in stage.run.script}
    left_out = OUTWARD_FLAGS + (HUB_FLAGS if "--push_to_hub" in given else ())  # without it the script refuses them
    arguments = alternatives.with_flags(stage.run.script[1:], dict.fromkeys(left_out))
    if dropped := [
        flag for flag in OUTWARD_FLAGS if flag in given and judging.flag_values(stage.run.script, flag) != ["none"]
    ]:
        print(f"Nothing leaves this machine: {', '.join(dropped)} is left out", file=sys.stderr)
    asked, arguments = redirect(arguments, work / "files", produced)
    if stage.script in ("sft.py", "dpo.py") and asked is None:
        asked = "results" if stage.script == "dpo.py" else "trainer_output"  # as the scripts do
        arguments += ["--output_dir", str(work / "files" / asked)]
    return {
        "script": str(Path(stage.run.script[0]).resolve()),
        "arguments": arguments,
        "asked_output": asked,
        "seconds": STAGE_SECONDS,
        "memory_limit_gb": MEMORY_LIMIT,
        "models": str(work / "models"),
        "probe": PROBE,
    }


def find_mistake(stage: Stage) -> str | None:
    """What is wrong before anything runs."""
    if stage.script not in SCRIPTS:
        return f"only {', '.join(SCRIPTS)} are rehearsed, not {stage.run.script[0]}"
    try:
        choose_port(stage.run.master_port)
    except InputError as error:
        return str(error)
    return None


def redirect(arguments: list[str], files: Path, produced: dict[Path, Path]) -> tuple[str | None, list[str]]:
    """Arguments that write into `files` and read what earlier stages would have written, and the output asked for."""
    asked, redirected, flag = None, [], None
    for argument in arguments:
        name, equals, value = argument.partition("=") if argument.startswith("--") else (flag, "", argument)
        if argument.startswith("--") and not equals:
            redirected.append(argument)
            flag = argument
            continue
        if name in OUTPUT_FLAGS:
            asked, wanted = value, Path(value).resolve()
            inside = find_produced(wanted, produced)
            value = str(inside or (files / wanted.name))
            produced[wanted] = Path(value)
        elif name in PATH_FLAGS and (inside := find_produced(Path(value).resolve(), produced)):
            value = str(inside)
        redirected.append(f"{name}={value}" if equals else value)
        flag = None if name not in ("--lora_target_modules", "--prompt") else flag
    return asked, redirected


def find_produced(path: Path, produced: dict[Path, Path]) -> Path | None:
    """Where the rehearsal keeps what an earlier stage would have written to `path`."""
    for wanted in (path, *path.parents):
        if wanted in produced:
            return produced[wanted] / path.relative_to(wanted)
    return None


def run_stage(stage: Stage, plan: dict, work: Path, name: str) -> dict:
    """Runs a plan in a process of its own; what it said is in `name`.log. Returns what was seen."""
    work.mkdir(parents=True, exist_ok=True)
    path, seen = work / f"{name}.plan.json", work / f"{name}.seen.json"
    path.write_text(json.dumps({**plan, "seen": str(seen.resolve())}, indent=1))
    command = [sys.executable, "-m", "align.rehearsal.stage", str(path.resolve())]
    with open(work / f"{name}.log", "w") as log:
        environment = environment_of(stage)
        code = subprocess.run(command, env=environment, check=False, stdout=log, stderr=subprocess.STDOUT).returncode
    if not seen.exists():
        said = (work / f"{name}.log").read_text().strip().splitlines() or ["no reason given"]
        return {"error": {"kind": "crash", "text": f"the rehearsal ended with exit code {code}: {said[-1]}"}}
    return {**json.loads(seen.read_text()), "asked_output": plan["asked_output"]}


def environment_of(stage: Stage) -> dict[str, str]:
    """Rank 0 of the run's world, on a dry card."""
    run = stage.run
    world = {"HABANA_EMULATOR_DRY": "1", "HABANA_EMULATOR_DEVICES": str(max(8, *run.nodes.values()))}
    if not run.is_direct or run.engine.key == "deepspeed":
        world |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(run.world_size), "MASTER_ADDR": "127.0.0.1"}
        world |= {"LOCAL_WORLD_SIZE": str(next(iter(run.nodes.values()))), "MASTER_PORT": "29500"}
    # On a Gaudi host too it is the emulator that is loaded, by stage.py and not by torch, which would ask the plugin
    world["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "emulator"), os.environ.get("PYTHONPATH")]))
    return {**clean_environment(os.environ), **stage.environment, **world, "PYTHONPATH": path}
