"""Imports run downwards, and in no circle. Run: pytest tests/test_rooms.py"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "align").rglob("*.py")}
# The rooms of align/, as CONTRIBUTING.md names them; below them stand the files beside the rooms
LEVELS = [{"rehearsal"}, {"training", "generation"}, {"models"}, {"data", "merge", "launch"}]


def find_imports(module):
    """The modules of align/ that a module imports, in functions too."""
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "align":
            for each in node.names:
                name = f"{node.module}.{each.name}"
                yield name if name in FILES else node.module


def find_level(module):
    return next((number for number, rooms in enumerate(LEVELS) if module.split(".")[1] in rooms), len(LEVELS))


def test_no_import_runs_upwards_or_into_the_room_beside():
    arrows = [(module, found) for module in FILES for found in find_imports(module) if found != "align"]
    assert len(arrows) > 100  # or nothing is read

    wrong = [
        (module, found)
        for module, found in arrows
        if find_level(module) > find_level(found)
        or (find_level(module) == find_level(found) < len(LEVELS) and module.split(".")[1] != found.split(".")[1])
    ]

    assert wrong == []


def test_no_import_makes_a_circle():
    TopologicalSorter({module: set(find_imports(module)) for module in FILES}).prepare()  # raises a CycleError
