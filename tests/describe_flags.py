"""Writes docs/flags.md from what the scripts' --help says: `make flags`.

python tests/describe_flags.py docs/flags.md
"""

import contextlib
import importlib
import io
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

SCRIPTS = ["sft.py", "dpo.py", "merge_peft_adapter.py", "run_generation.py", "gaudi_spawn.py"]
TRAINERS = SCRIPTS[:2]
HEAD = """# Flags

What `--help` of each script says; `make flags` writes this page. `sft.py` and `dpo.py` take every flag of
optimum-habana's `GaudiSFTConfig` and `GaudiDPOConfig` as well (`--help_all` shows them), and refuse those that would
have no effect. A flag may be written with dashes or underscores. `--x False` and `--no_x` turn a switch off.
[Commands of upstream's examples](upstream.md) have a page of their own.
"""


class Flag(NamedTuple):
    name: str
    takes: str
    text: str
    default: str


def read_help(script: str, word: str = "--help") -> dict[str, list[Flag]]:
    """The flags that a script's help shows, by the title of their group."""
    module = importlib.import_module(script.removesuffix(".py"))
    printed = io.StringIO()
    wide = {"COLUMNS": "1000"}  # nothing is wrapped
    with (
        mock.patch.object(sys, "argv", [script, word]),
        mock.patch.dict(os.environ, wide),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        module.main()
    groups: dict[str, list[Flag]] = {}
    for line in re.sub(r"\n {20,}", "  ", printed.getvalue()).splitlines():
        if title := re.fullmatch(r"(\w.*):", line):
            groups[title[1]] = shown = []
        elif flag := re.match(r"  (--\w+)(?: (\S+))?(?:  +(.*))?$", line):
            name, takes, text = (part or "" for part in flag.groups())
            default = re.search(r" ?\(default: ([^()]*)\)\.?$", text)
            text, default = (text[: default.start()], default[1]) if default else (text, "")
            shown.append(Flag(name, takes, text, default))
    return groups


def describe() -> str:
    lines = [HEAD]
    for script in SCRIPTS:
        lines.append(f"## {script}\n")
        groups = read_help(script)
        if script in TRAINERS:
            from align.training.flags import RARE

            others = read_help(script, "--help_all")["Others"]
            groups["Rarely needed"] = [flag for flag in others if flag.name[2:] in RARE]
        for title, flags in groups.items():
            if title == "Help":
                continue
            lines += [f"**{title[0].upper()}{title[1:]}**\n", "| flag | what it does | default |", "|---|---|---|"]
            for flag in flags:
                cells = f"`{f'{flag.name} {flag.takes}'.strip()}`", flag.text, flag.default
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    Path(sys.argv[1]).write_text(describe(), encoding="utf-8")
