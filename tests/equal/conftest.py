"""One uninterrupted run of the command line, which several equalities compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

from .small import call, write_shell_recipe


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory) -> tuple[Path, Path]:
    """(recipe, run directory) of 30 LoRA steps on the embedded model, evaluated, not merged."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_shell_recipe(folder)
    call("run", recipe, "--out", folder / "run", "--set", "export.merge=false")
    return recipe, folder / "run"
