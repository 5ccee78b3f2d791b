"""Every recipe key is read by something: an attribute of its name is taken outside the class that defines it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from fitout.config import Recipe
from fitout.serve import ServeSettings

PACKAGE = Path(__file__).parents[2] / "fitout"


def classes(model: type[BaseModel]) -> set[type[BaseModel]]:
    """The settings classes below (and with) a model."""
    found = {model}

    def collect(annotation) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.update(classes(annotation))
        for inner in get_args(annotation):
            collect(inner)

    for field in model.model_fields.values():
        collect(field.annotation)
    return found


KEYS = sorted(
    (settings.__name__, key)
    for settings in classes(Recipe) | classes(ServeSettings)
    for key in settings.model_fields
    if key != "kind"  # the tag of a union; pydantic and `create` read it
)


@cache
def reads() -> frozenset[str]:
    """Names that the package reads as an attribute (`x.name`, not assigned to), outside settings classes."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        settings = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and (node.name.endswith("Settings") or node.name == "Recipe")
        ]
        inside = {id(inner) for node in settings for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if id(node) in inside:
                continue
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return frozenset(names)


@pytest.mark.parametrize(("settings", "key"), KEYS)
def test_a_key_is_read(settings, key):
    # The shares of SplitSettings are read by their part's name: getattr(settings, part).
    if settings == "SplitSettings":
        assert "getattr(settings, part)" in (PACKAGE / "data" / "split.py").read_text(encoding="utf-8")
    else:
        assert key in reads(), f"{settings}.{key} is accepted and then read by nothing"


def test_the_keys_are_all_found():
    """The guard itself: it knows the sections, and a key that nobody reads would be missed by no accident."""
    assert len({settings for settings, _ in KEYS}) >= 8 and len(KEYS) > 40
    assert "no_such_key_anywhere" not in reads()


def test_every_key_is_strict():
    for settings in classes(Recipe) | classes(ServeSettings):
        assert settings.model_config.get("extra") == "forbid", settings
