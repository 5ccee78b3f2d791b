"""The real command line, and small recipes for it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),
    "COLUMNS": "200",
}


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def fitout(*arguments: object, cwd: Path, before: Callable[[], None] | None = None, alone: bool = False) -> Done:
    """`fitout ARGUMENTS` run in `cwd`: by its entry point in this process (torch is imported once), or `alone` in
    one of its own, in which `before` is called first."""
    words = list(map(str, arguments))
    return _in_its_own_process(words, cwd, before) if alone or before else _here(words, cwd)


def _in_its_own_process(words: list[str], cwd: Path, before: Callable[[], None] | None) -> Done:
    command = [sys.executable, "-m", "fitout.cli.app", *words]
    done = subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, preexec_fn=before
    )
    return Done(done.returncode, done.stdout, done.stderr)


def _here(words: list[str], cwd: Path) -> Done:
    from fitout.cli.app import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["fitout", *words]),
        mock.patch.dict(os.environ, {"COLUMNS": "200"}),
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            traceback.print_exc()  # what the interpreter would do
            code = 1
    return Done(code, out.getvalue(), err.getvalue())


def rows(path: Path, count: int = 30) -> Path:
    """A file of questions in Alpaca's form."""
    path.write_text(
        "".join(
            json.dumps({"instruction": f"What is number {n}?", "output": f"It is {n}。"}, ensure_ascii=False) + "\n"
            for n in range(count)
        ),
        encoding="utf-8",
    )
    return path


def recipe(folder: Path, data: str = "rows.jsonl", more: str = "", *, base: str = "embedded:shell") -> Path:
    """A recipe of two steps on `data`."""
    path = folder / "recipe.yaml"
    path.write_text(
        f"""name: tiny
model: {{base: "{base}"}}
data: {{sources: [{{path: {data}}}], max_length: 64}}
method: {{kind: lora, rank: 2, alpha: 4, targets: [q_proj]}}
train: {{max_steps: 2, batch_size: 4, precision: fp32, listeners: []}}
evaluate: {{max_new_tokens: 2, limit: 2, retention: "off", samples: 100, metrics: [exact_match]}}
{more}
""",
        encoding="utf-8",
    )
    return path


def half_written(folder: Path) -> list[Path]:
    """What an interrupted write would leave."""
    return [path for path in folder.rglob("*") if path.name.endswith((".part", ".old"))]
