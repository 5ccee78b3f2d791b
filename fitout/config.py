"""Recipe: the rooms' settings put together; loading, `--set`, and every fault at once with the nearest key."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .chat import ChatSettings
from .data import DataSettings
from .errors import RecipeError, RequestError
from .evaluate import EvaluateSettings
from .export import ExportSettings
from .model import ModelSettings
from .model.methods import METHODS, LoraSettings, MethodSettings
from .objectives import OBJECTIVES, ObjectiveSettings, SftSettings
from .train import TrainSettings


class Recipe(BaseModel):
    """Everything one run needs. Each section belongs to the room of its name."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run directory, runs/NAME")
    model: ModelSettings = Field(default_factory=ModelSettings)
    data: DataSettings
    chat: ChatSettings = Field(default_factory=ChatSettings)
    method: MethodSettings = Field(default_factory=LoraSettings)
    objective: ObjectiveSettings = Field(default_factory=SftSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    export: ExportSettings = Field(default_factory=ExportSettings)

    @property
    def lr(self) -> float:
        """`train.lr`, or what is usual for the method and the objective."""
        return self.train.lr or self.method.default_lr * self.objective.pace

    def to_yaml(self) -> str:
        """The recipe with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a mapping in which a key stands twice: YAML takes the last without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` stands twice", key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError, also for what PyYAML ends in other errors with."""
    try:
        loader = _EachKeyOnce(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (ValueError, RecursionError) as error:  # no such day, a number too long, too deep
        raise yaml.YAMLError(str(error) or "nested too deeply") from None


def load(path: str | Path, changes: list[str] | None = None, *, anchor: bool = True) -> Recipe:
    """Reads a recipe and applies `--set` changes. Relative paths in it are taken from the recipe's folder, or with
    `anchor` False from the working directory alone.

    Raises RequestError when the file cannot be read, RecipeError with every fault in it at once.
    """
    path = Path(path)
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], 1)
        raise RequestError(
            "there is no such recipe",
            where=str(path),
            hint=f"Did you mean {path.parent / near[0]}?" if near else "Write one with: fitout init DATA_FILE",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the recipe cannot be read: {error}", where=str(path)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RequestError(
            f"this is not YAML that a recipe can be: {getattr(error, 'problem', error)}",
            where=where,
            hint="Check what stands there, and its indentation.",
        ) from None
    if not isinstance(raw, dict):
        raise RequestError("a recipe is a YAML mapping (name:, data:, ...)", where=str(path))
    for change in changes or []:
        _apply(raw, change)
    return build(raw, folder=path.parent if anchor else None, where=str(path))


def build(raw: dict[str, Any], *, folder: Path | None = None, where: str = "") -> Recipe:
    """A recipe from plain values, checked; relative paths that exist below `folder` are made absolute."""
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_faults(error, raw), where=where) from None
    if odd := list(_no_numbers(raw, recipe.model_dump(), "")):
        raise RecipeError(odd, where=where)
    if folder is not None:
        _anchor_paths(recipe, folder)
    return recipe


DEFAULT_KINDS = {
    key: Recipe.model_fields[key].get_default(call_default_factory=True).kind for key in ("method", "objective")
}


def _no_numbers(given: Any, taken: Any, key: str) -> Iterator[str]:
    """Where a number is none that can be counted with, or `true` was taken for 1."""
    if isinstance(given, dict) and isinstance(taken, dict):
        for name in given.keys() & taken.keys():
            yield from _no_numbers(given[name], taken[name], f"{key}.{name}".lstrip("."))
    elif isinstance(given, list) and isinstance(taken, list | tuple):
        for number, (one, other) in enumerate(zip(given, taken, strict=False)):
            yield from _no_numbers(one, other, f"{key}.{number}")
    elif isinstance(taken, float) and not math.isfinite(taken):
        yield f"{key}: {given} is no number to count with"
    elif isinstance(given, bool) and isinstance(taken, int | float) and not isinstance(taken, bool):
        yield f"{key}: {str(given).lower()} is no number"


def _apply(raw: dict[str, Any], change: str) -> None:
    """`--set a.b=c`: the value is YAML; a number in the path is a list index."""
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise RequestError(f"--set takes KEY=VALUE, not {change!r}", hint="For example: --set train.lr=1e-4")
    try:
        parsed = parse_yaml(value)
    except yaml.YAMLError:
        parsed = value
    if isinstance(parsed, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", parsed):
        parsed = float(parsed)  # YAML 1.1 reads 1e-4 as text
    *path, last = key.split(".")
    if path and path[0] in DEFAULT_KINDS and not raw.get(path[0]):
        raw[path[0]] = {"kind": DEFAULT_KINDS[path[0]]}  # a key of what is there by default
    at: Any = raw
    try:
        for step in path:
            at = at[int(step)] if isinstance(at, list) else at.setdefault(step, {})
        at[int(last) if isinstance(at, list) else last] = parsed
    except (IndexError, ValueError, AttributeError, TypeError):
        raise RequestError(
            f"--set {key}: there is no such place in the recipe",
            hint="Sections are joined by dots, list elements are counted from 0: --set data.sources.0.limit=10",
        ) from None


def _anchor_paths(recipe: Recipe, folder: Path) -> None:
    """Relative paths that exist below the recipe's folder become absolute; others are left to the working directory."""

    def anchored(value: str) -> str:
        return str((folder / value).resolve()) if not Path(value).is_absolute() and (folder / value).exists() else value

    for source in recipe.data.sources:
        source.path = anchored(source.path)
    if recipe.data.repairs:
        recipe.data.repairs = anchored(recipe.data.repairs)
    if recipe.data.benchmarks:
        recipe.data.benchmarks.files = [anchored(file) for file in recipe.data.benchmarks.files]
    if recipe.data.deduplicate.meaning:
        recipe.data.deduplicate.meaning.model = anchored(recipe.data.deduplicate.meaning.model)
    recipe.model.base = anchored(recipe.model.base)
    if recipe.model.adapter:
        recipe.model.adapter = anchored(recipe.model.adapter)
    if recipe.chat.template.endswith(".jinja"):
        recipe.chat.template = anchored(recipe.chat.template)
    if recipe.train.parallel.endswith((".json", ".yaml", ".yml")):
        recipe.train.parallel = anchored(recipe.train.parallel)
    if recipe.evaluate.retention not in ("default", "off"):
        recipe.evaluate.retention = anchored(recipe.evaluate.retention)


KINDS = {plug.model_fields["kind"].default for plug in (*METHODS, *OBJECTIVES)}  # pydantic puts them into locations


def _faults(error: ValidationError, raw: dict[str, Any]) -> list[str]:
    """One line a fault: where, what, and for a key that is not known the nearest that is."""
    lines = []
    for fault in error.errors():
        path = [p for p in fault["loc"] if p not in KINDS]
        key = ".".join(str(p) for p in path)
        if fault["type"] == "extra_forbidden":
            known = _known_keys(path[:-1], raw)
            near = difflib.get_close_matches(str(path[-1]), known, 1, cutoff=0.5)
            say = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
            lines.append(f"{key}: there is no such key; {say}")
        elif fault["type"] == "missing":
            lines.append(f"{key}: is missing")
        elif fault["type"] in ("literal_error", "union_tag_invalid"):
            expected = fault["ctx"].get("expected") or fault["ctx"].get("expected_tags")
            lines.append(f"{key}: {fault['input']!r} is not one of {expected}" if fault["type"] == "literal_error"
                         else f"{key}.kind: {fault['ctx']['tag']!r} is not one of {expected}")  # fmt: skip
        elif fault["type"] == "union_tag_not_found":
            lines.append(f"{key}: needs a kind, for example {key}: {{kind: {DEFAULT_KINDS[key]}}}")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            lines.append(f"{key or 'recipe'}: {message[0].lower()}{message[1:]} (given: {str(fault['input'])[:60]})")
    return lines


def _known_keys(path: list[Any], raw: dict[str, Any]) -> list[str]:
    """The keys that the section at `path` may have."""
    model: Any = Recipe
    at: Any = raw
    for step in path:
        if isinstance(step, int):
            at = at[step]
            continue
        at = at.get(step, {}) if isinstance(at, dict) else {}
        model = _section(model, step, at)
        if model is None:
            return []
    return list(model.model_fields)


def _section(model: Any, key: str, value: Any) -> Any:
    """The settings class behind a key: itself, a list's element, or the union's member that `kind` names."""
    from typing import get_args

    found: list[Any] = []

    def collect(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        for inner in get_args(annotation):
            collect(inner)

    collect(model.model_fields[key].annotation if key in model.model_fields else None)
    if len(found) > 1 and isinstance(value, dict):
        for member in found:
            if member.model_fields["kind"].default == value.get("kind"):
                return member
    return found[0] if found else None
