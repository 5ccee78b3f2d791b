"""The READMEs are true: their commands parse, the files they name exist, their tables say what the code says."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from fitout.cli.app import app
from fitout.config import build, load
from fitout.errors import FitoutError, RequestError, Stopped
from fitout.rundir import RunDir

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README.zh.md")
PAGES = (*READMES, "CONTRIBUTING.md")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of one language ("" for those without)."""
    return [body for kind, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if kind == language]


def inline(text: str) -> list[str]:
    """What stands between single backticks outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def commands(text: str, program: str) -> list[str]:
    """Commands of `program`, from lines of blocks and from inline code."""
    lines = [line.strip() for body in blocks(text) for line in body.splitlines()] + inline(text)
    return [line.removeprefix("$ ") for line in lines if re.match(rf"(\$ )?{program} \S", line)]


def named_tables(text: str) -> list[list[str]]:
    """The first cells of each table that has its first cells in backticks."""
    tables: list[list[str]] = [[]]
    for line in text.splitlines():
        cell = re.match(r"\| `([^`]+)` \|", line)
        if cell:
            tables[-1].append(cell.group(1))
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def parse(command: Any, arguments: list[str], name: str) -> None:
    """Parses as the command line does, without running: an unknown verb, option or value raises."""
    context = command.make_context(name, list(arguments))
    if hasattr(command, "commands"):
        inner, found, rest = command.resolve_command(context, context._protected_args + context.args)
        parse(found, rest, inner)


def verbs() -> set[str]:
    root: Any = typer.main.get_command(app)
    inner = {f"{n} {m}" for n, c in root.commands.items() if hasattr(c, "commands") for m in c.commands}
    return {name for name, command in root.commands.items() if not hasattr(command, "commands")} | inner


@pytest.mark.parametrize("name", PAGES)
def test_every_command_parses(name):
    found = commands(page(name), "fitout")
    assert found or name not in READMES
    for command in found:
        if command.removeprefix("fitout ") not in verbs():  # a bare verb is its name, not a call
            parse(typer.main.get_command(app), shlex.split(command)[1:], "fitout")


def test_a_wrong_command_would_be_noticed():
    root = typer.main.get_command(app)
    for wrong in ("fitout tune x", "fitout run r.yaml --faster", "fitout data chek f", "fitout serve x --port 99999"):
        with pytest.raises(Exception) as caught:
            parse(root, shlex.split(wrong)[1:], "fitout")
        assert getattr(caught.value, "exit_code", None) == 2  # a usage error, not a fault of this test


@pytest.mark.parametrize("name", PAGES)
def test_every_make_target_exists(name):
    targets = re.search(r"^\.PHONY: (.+)$", page("Makefile"), re.M).group(1).split()
    assert set(targets) == set(re.findall(r"^([a-z]+):", page("Makefile"), re.M))
    found = commands(page(name), "make")
    assert found
    assert {shlex.split(command)[1] for command in found} <= set(targets)


@pytest.mark.parametrize("name", PAGES)
def test_every_file_named_exists(name):
    """Links, and inline code that begins like a path of the repository."""
    text = page(name)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if ":" not in link]
    tops = r"(\.ci|benchmarks|docs|examples|fitout|tests)/\S*|[\w.]+\.(md|toml|txt)|Makefile"
    paths = [code for code in inline(text) if re.fullmatch(tops, code)]
    assert paths
    missing = [path for path in {*links, *paths} if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("name", READMES)
def test_verbs_table_lists_exactly_the_verbs(name):
    table = next(t for t in named_tables(page(name)) if t[0].startswith("fitout "))
    listed = [re.sub(r"( [A-Z_]+)+$", "", cell.removeprefix("fitout ")) for cell in table]
    assert set(listed) == verbs() and len(listed) == len(set(listed))


@pytest.mark.parametrize("name", READMES)
def test_dependency_tables_list_exactly_the_dependencies(name):
    tables = named_tables(page(name))
    required = [re.match(r"[A-Za-z0-9-]+", line).group() for line in PROJECT["dependencies"]]
    assert required in tables
    assert list(PROJECT["optional-dependencies"]) in tables


@pytest.mark.parametrize("name", READMES)
def test_run_directory_and_exit_codes(name):
    text = page(name)
    run = RunDir(Path("RUN"))
    places = [getattr(run, key) for key, value in vars(RunDir).items() if isinstance(value, property)]
    listing = next(body for body in blocks(text) if "run.json" in body)
    assert not [str(place) for place in places if place != run.lock_file and place.name not in listing]
    assert (FitoutError.exit_code, RequestError.exit_code, Stopped.exit_code) == (1, 2, 3)
    assert re.search(r"0 .+1 .+2 .+3 .+SIGTERM", text, re.S)


def test_both_languages_show_the_same():
    english, chinese = map(page, READMES)
    assert blocks(english, "yaml") == blocks(chinese, "yaml")
    for program in ("fitout", "make"):
        assert set(commands(english, program)) == set(commands(chinese, program))
    assert named_tables(english) == named_tables(chinese)
    assert english.count("\n## ") == chinese.count("\n## ")


@pytest.mark.parametrize("name", READMES)
def test_recipes_in_the_readme_are_recipes(name):
    for body in blocks(page(name), "yaml"):
        build(yaml.safe_load(body))


def test_example_recipes_load():
    examples = sorted((ROOT / "examples").glob("*.yaml"))
    assert {load(path).model.base for path in examples} >= {"Qwen/Qwen3-0.6B", "meta-llama/Meta-Llama-3-8B-Instruct"}
    for path in examples:  # the commands in their comments too
        for command in re.findall(r"^#.*?(fitout [a-z].*?)(?: {2,}|`|$)", path.read_text(encoding="utf-8"), re.M):
            parse(typer.main.get_command(app), shlex.split(command)[1:], "fitout")
            for named in re.findall(r"examples/\S+", command):
                assert (ROOT / named).exists()


def test_constraints_hold_every_dependency():
    """Everything the Makefile installs is pinned, torch to the version it installs first."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", page("constraints.txt"), re.M))
    known = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    names = {re.match(r"[\w-]+", line).group().lower().replace("_", "-") for line in wanted}
    assert names <= known
    assert f"TORCH ?= torch=={pins['torch']}" in page("Makefile")
