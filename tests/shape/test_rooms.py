"""A room imports only lower floors, and itself (DESIGN section 3); read from the source, so lazy imports count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fitout"
FILES = sorted(PACKAGE.rglob("*.py"))

#: The house: what stands on which floor. A name that is missing here fails the test, so a new room must say its floor.
FLOORS = {
    "errors": 0,
    "files": 1,
    "lock": 1,
    "rundir": 2,
    "layout": 2,
    "demo": 2,  # its door: paths and probes; what made the shell runs as a script of its own
    "chat": 2,
    "data": 3,
    "model": 3,
    "objectives": 4,
    "train": 5,
    "engine": 5,
    "plan": 6,
    "evaluate": 6,
    "export": 6,
    "serve": 6,
    "config": 7,
    "trials": 7,  # processes over run directories; what they run comes in as text from verbs
    "verbs": 8,
    "cli": 9,
    "ui": 9,
    "__main__": 10,
}


def room_of(path: Path, package: Path = PACKAGE) -> str:
    first = path.relative_to(package).parts[0]
    return first.removesuffix(".py")


def imports(tree: ast.Module, module: list[str]) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of the package; blocks under `if TYPE_CHECKING:` do not run and are left out.

    `module` is the dotted path of the file, in parts, with `__init__` at the end for a package.
    """
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for part in node.body
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module[: -node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "fitout" and len(target) > 1 and not target[1].startswith("__"):
                yield node.lineno, target[1]


def violations(package: Path) -> list[str]:
    found = []
    for path in sorted(package.rglob("*.py")):
        room = room_of(path, package)
        if room == "__init__":
            continue
        module = ["fitout", *path.relative_to(package).with_suffix("").parts]
        for line, target in imports(ast.parse(path.read_text(encoding="utf-8")), module):
            if target == room:
                continue
            if FLOORS[target] >= FLOORS[room]:
                where = f"{path.relative_to(package)}:{line}"
                found.append(f"{where}: {room} (floor {FLOORS[room]}) imports {target} (floor {FLOORS[target]})")
    return found


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms <= FLOORS.keys(), f"say in FLOORS (and in the design) where {rooms - FLOORS.keys()} stands"


def test_rooms_import_only_lower_floors():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    "source",
    [
        "from ..verbs import run",
        "from .. import verbs",
        "import fitout.verbs",
        "from fitout import verbs",
        "def f():\n    from ..verbs import run",
    ],
)
def test_a_forbidden_import_is_seen(tmp_path, source):
    """The guard itself: each way of writing an import upwards is caught, and one for types only is not."""
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "bad.py").write_text(source)
    assert len(violations(tmp_path)) == 1
    (tmp_path / "chat" / "bad.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..verbs import run\n"
    )
    assert violations(tmp_path) == []


def test_a_package_door_resolves_its_relative_imports(tmp_path):
    """`from ..x` in chat/__init__.py means fitout.x, and `from .x` there means fitout.chat.x."""
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "__init__.py").write_text("from .verbs import a\nfrom ..verbs import b\n")
    assert len(violations(tmp_path)) == 1
