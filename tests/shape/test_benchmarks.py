"""Every command of benchmarks/ still finds what it measures."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import benchmarks

ELSEWHERE = {"benchmarks.side_torchtune"}  # runs in an environment of its own
MODULES = [one.name for one in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.") if one.name not in ELSEWHERE]


@pytest.mark.parametrize("name", MODULES)
def test_it_imports(name):
    importlib.import_module(name)
