"""No message names a flag that its script lacks, and align/ blames none that a script declares itself.

Run: pytest tests/test_blamed_flags.py

Each function that a script's `main` leads to is searched for texts with flags; what a script leads to is read from the
names in the code, so it is rather too much than too little.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from describe_flags import SCRIPTS, TRAINERS, read_help

ROOT = Path(__file__).parent.parent
# What writes the command lines of others: upstream's example, mpirun and torchrun
OF_OTHERS = ("align.upstream_flags", "align.launch.engines")
ABSENT = {  # flags that are looked for in what was given, or not named where the script has none
    "merge_peft_adapter": {"model_name_or_path"},  # of the run that made the adapter, in its manifest
    "align.quiet": {"log"},
    "align.launch.nodes": {"hub", "push"},  # the words of --hub-token
    "align.rehearsal.page": {"no"},  # a colour
    "align.cli": {"no_", "help_all", "torch_compile", "gaudi_config_name", "deepspeed"},
    "align.models.guard": {"trust_remote_code"},
    "align.training.flags": None,  # the tables of both trainers
    "align.training.unused": None,
}
Name = tuple[str, str]  # a module and what it defines


def find_file(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def read(module: str) -> tuple[dict[str, ast.AST], dict[str, Name | str]]:
    """What a module defines at its top, and what it imports of ours: a name of a module, or a module."""
    tree = ast.parse(find_file(module).read_text(encoding="utf-8"))
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and find_file(node.module):
            for each in node.names:
                whole = f"{node.module}.{each.name}"
                imported[each.asname or each.name] = whole if find_file(whole) else (node.module, each.name)
    defined = {}
    statements = list(tree.body)
    for node in statements:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = [*getattr(node, "targets", ()), getattr(node, "target", None)]
            defined |= {name.id: node for each in filter(None, targets) for name in ast.walk(each) if is_name(name)}
        else:
            statements += getattr(node, "body", [])
    return defined, imported


def is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


def find_used(module: str, name: str) -> Iterator[Name]:
    defined, imported = read(module)
    for node in ast.walk(defined[name]) if name in defined else ():
        if is_name(node) and node.id in defined:
            yield module, node.id
        elif is_name(node) and isinstance(imported.get(node.id), tuple):
            yield imported[node.id]
        elif isinstance(node, ast.Attribute) and is_name(node.value) and isinstance(imported.get(node.value.id), str):
            yield imported[node.value.id], node.attr


def find_reached(script: str) -> set[Name]:
    reached, left = set(), [(script.removesuffix(".py"), "main")]
    while left:
        name = left.pop()
        if name not in reached:
            reached.add(name)
            left += find_used(*name)
    return reached


def find_texts(node: ast.AST) -> Iterator[str]:
    kinds = ast.FunctionDef | ast.ClassDef
    docs = [each.body[0].value for each in ast.walk(node) if isinstance(each, kinds) and ast.get_docstring(each)]
    for each in ast.walk(node):
        if isinstance(each, ast.Constant) and isinstance(each.value, str) and each not in docs:
            yield each.value


def find_flags(script: str) -> set[str]:
    groups = read_help(script, "--help_all" if script in TRAINERS else "--help")
    return {flag.name[2:] for flags in groups.values() for flag in flags}


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_message_names_a_flag_that_its_script_lacks(script):
    known = set.union(*map(find_flags, SCRIPTS if script == "gaudi_spawn.py" else [script]))
    reached = find_reached(script)
    assert len(reached) > 100  # or nothing is followed

    missing = []
    for module, name in reached:
        absent = ABSENT.get(module, set())
        if name in read(module)[0] and not module.startswith(OF_OTHERS) and absent is not None:
            for text in find_texts(read(module)[0][name]):
                named = re.findall(r"(?<!gaudi_spawn\.py )--([a-z]\w+)", text)
                missing += [(module, name, f"--{flag}") for flag in named if flag not in known | absent]

    assert missing == []


def find_declared(script: str) -> set[str]:
    """The flags that stand in the script's own file: arguments of its parser, fields of its dataclasses."""
    declared = set()
    for node in ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            names = [word.value for word in node.args if isinstance(word, ast.Constant)]
            declared |= {name[2:] for name in names if name.startswith("--")}
        elif isinstance(node, ast.ClassDef):
            declared |= {each.target.id for each in node.body if isinstance(each, ast.AnnAssign)}
    return declared


def find_blamed(tree: ast.AST) -> Iterator[str]:
    """The flags that errors begin with."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and is_name(node.func) and node.func.id in ("InputError", "ResultError"):
            text = next((part for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)), None)
            yield from re.findall(r"^--([a-z]\w+)", str(text.value)) if text else ()


def test_a_flag_that_a_script_declares_is_blamed_in_no_other_file():
    declared = {script: find_declared(script) for script in SCRIPTS}
    elsewhere = set.union(*(find_flags(script) - declared[script] for script in SCRIPTS))
    files = [path for path in (ROOT / "align").rglob("*.py") if path.name != "upstream_flags.py"]
    blamed = [(path.name, flag) for path in files for flag in find_blamed(ast.parse(path.read_text(encoding="utf-8")))]
    assert len(blamed) > 50  # or nothing is read

    of_scripts = set.union(*declared.values()) - elsewhere
    assert {"verify", "ref_model", "hostfile"} <= of_scripts
    assert [each for each in blamed if each[1] in of_scripts] == []


def test_a_flag_of_another_script_is_found():
    reached = find_reached("run_generation.py")

    assert ("align.data.loading", "load_rows") in reached  # through a function that imports it
    assert ("align.generation.keeping", "KeptAnswers") in reached
    assert ("align.data.loading", "load_splits") not in reached
