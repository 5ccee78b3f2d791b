"""A small run of the real command line with a shim between it and the disk."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from ..small import ROOT, environment, recipe

STEPS, SAVE_EVERY = 8, 2
RECIPE = recipe(
    "disk",
    "rank: 4, alpha: 8, dropout: 0.05",
    f"max_steps: {STEPS}, lr: 1.0e-3, save_every: {SAVE_EVERY}, evaluate_every: 4",
)


def build(work: Path) -> Path:
    """Compiles the shim; returns the library."""
    work.mkdir(parents=True, exist_ok=True)
    library = work / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl", "-lpthread"], check=True)
    (work / "recipe.yaml").write_text(RECIPE)
    return library


def fitout(work: Path, run: Path, changes: tuple[str, ...] = (), **shim: str | int | Path) -> tuple[int, str]:
    """`fitout run` into `run`, with what the shim is told (SHIM_ is put before each name); exit code and output."""
    told = {f"SHIM_{name.upper()}": str(value) for name, value in shim.items()}
    if shim:
        told |= {"LD_PRELOAD": str(work / "shim.so"), "SHIM_ROOT": str(run)}
    sets = [word for change in changes for word in ("--set", change)]
    command = [sys.executable, "-m", "fitout.cli.app", "run", str(work / "recipe.yaml"), "--out", str(run), *sets]
    done = subprocess.run(
        command, env=environment(COLUMNS="400", **told), capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    return done.returncode, done.stdout + done.stderr


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "nothing"


def adapter(run: Path) -> str:
    """The hash of what a run ended with."""
    return sha256(run / "adapter" / "adapter_model.safetensors")


def half_written(run: Path) -> list[str]:
    return sorted(str(p.relative_to(run)) for p in run.rglob(".*") if p.name.endswith((".part", ".old")))
