"""What answers at once imports nothing heavy: the recipe, the doors, `--help`, a mistake in a recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "tokenizers", "peft", "pyarrow", "numpy", "sacrebleu", "rouge_score", "fastapi")
DOORS = sorted(
    ".".join(("fitout", *path.parent.relative_to(ROOT / "fitout").parts))
    for path in (ROOT / "fitout").rglob("__init__.py")
)


def loaded_after(code: str) -> set[str]:
    """The top-level names of the modules that a fresh interpreter has loaded after running `code`."""
    tail = "\nimport sys, json; print('\\n' + json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + tail], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.strip().splitlines()[-1]))


def test_the_recipe_and_every_door_are_light():
    code = "\n".join(f"import {name}" for name in ("fitout.config", *DOORS))
    loaded = loaded_after(code)
    assert "pydantic" in loaded and not loaded.intersection(HEAVY)


def test_a_comparison_holds_no_torch():
    """On Linux a process starts with its parent's peak of memory: what starts the runs must stay below theirs."""
    rooms = ("verbs", "trials", "data.batches", "data.store", "evaluate.compare_page", "evaluate.outcomes")
    loaded = loaded_after("\n".join(f"import fitout.{name}" for name in rooms))
    assert not loaded.intersection({"torch", "transformers", "tokenizers"})


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["data", "--help"]])
def test_help_is_light(arguments):
    """`fitout --help` answers in under 0.3 s: nothing of ours but the command line is imported for it."""
    code = f"""
import sys
sys.argv = ["fitout", *{arguments!r}]
from fitout.cli.app import main
try:
    main()
except SystemExit as end:
    assert end.code in (0, None), end.code
"""
    assert not loaded_after(code).intersection({*HEAVY, "yaml", "jinja2"})


def test_a_wrong_recipe_is_told_without_torch(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    code = f"""
import sys
sys.argv = ["fitout", "train", {str(tmp_path / "recipe.yaml")!r}]
from fitout.cli.app import main
try:
    main()
except SystemExit as end:
    assert end.code == 2
"""
    assert not loaded_after(code).intersection(HEAVY)
