"""Every command of benchmarks/ still finds what it measures."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import benchmarks

ELSEWHERE = {"benchmarks.side_torchtune"}  # runs in an environment of its own
MODULES = [one.name for one in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.") if one.name not in ELSEWHERE]


@pytest.mark.parametrize("name", MODULES)
def test_it_imports(name):
    importlib.import_module(name)


@pytest.mark.parametrize("name", MODULES)
def test_what_it_takes_from_the_package_within_functions_is_there(name):
    """Most import late, so that what they measure is what counts."""
    tree = ast.parse(Path(importlib.import_module(name).__file__).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("fitout"):
            module = importlib.import_module(node.module)
            for one in node.names:
                assert hasattr(module, one.name) or importlib.import_module(f"{node.module}.{one.name}")
