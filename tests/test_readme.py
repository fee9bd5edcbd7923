"""Every command in the README is understood by the script that it names. Run: pytest tests/test_readme.py"""

import importlib
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from describe_flags import TRAINERS, read_help

from align import cli

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks/README.md",
]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
BLOCKS = [
    block for text in TEXTS.values() for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
]
BLOCKS = [block for block in BLOCKS if not block.startswith("#!")]  # a whole script has a test of its own
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def parse(arguments: list[str], monkeypatch) -> None:
    """Gives the arguments of `python script.py …` to that script's own parser."""
    script, *flags = arguments
    monkeypatch.setattr(sys, "argv", arguments)
    module = importlib.import_module(script.removesuffix(".py"))
    if script == "gaudi_spawn.py":
        parse(module.parse_arguments().script, monkeypatch)
    elif script in ("sft.py", "dpo.py"):
        parser = cli.make_parser(module.ARGUMENTS, module.__doc__, module.RECIPE)
        parsed, unknown = parser.parse_known_args(flags)
        assert unknown == []
        assert parsed.deepspeed is None or (ROOT / parsed.deepspeed).is_file()
    else:
        module.parse_arguments(flags)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[:60])
def test_a_command_is_understood_as_it_stands(command, monkeypatch):
    words = shlex.split(command, comments=True)
    while re.fullmatch(r"[A-Z0-9_]+=\S*", words[0]):
        words.pop(0)
    if words[0] == "python":
        parse(words[1:], monkeypatch)
    elif words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    else:
        assert words[0] in ("pip", "source", "cat", "mkdir", "export"), f"nobody checks {words[0]}"


def test_each_promise_names_a_test_that_there_is():
    names = [word for word in re.findall(r"`([a-z0-9_]+)`", TEXTS["docs/reliability.md"]) if word.count("_") > 2]
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(names) > 35
    assert set(names) <= set(re.findall(r"^def test_(\w+)", tests, re.MULTILINE))


def test_the_guide_has_all_its_recipes_here():
    scripts = [
        word for command in COMMANDS for word in shlex.split(command, comments=True) if re.fullmatch(r"\w+\.py", word)
    ]
    assert {"sft.py", "dpo.py", "merge_peft_adapter.py", "run_generation.py", "gaudi_spawn.py"} <= set(scripts)
    assert scripts.count("sft.py") >= 2


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250


@pytest.mark.parametrize("page", TEXTS)
def test_each_link_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", TEXTS[page])
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert missing == []


def test_each_file_that_the_readme_names_is_there():
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, re.DOTALL)[1]
    names = re.findall(r"(?:^| )(\w+(?:\.py|/))(?= |$)", re.sub(r"   .*", "", tree, flags=0), re.MULTILINE)
    assert len(names) > 10
    for name in names:
        assert (ROOT / name).exists() or list((ROOT / "align").rglob(name)), name


@pytest.mark.parametrize("script", ["sft.py", "dpo.py", "merge_peft_adapter.py", "run_generation.py", "gaudi_spawn.py"])
def test_help_describes_every_flag(script):
    groups = read_help(script, "--help_all" if script in TRAINERS else "--help")
    flags = [flag for group in groups.values() for flag in group]
    assert len(flags) > (200 if script in TRAINERS else 8)
    assert [flag.name for flag in flags if not flag.text or "%(" in flag.text] == []
