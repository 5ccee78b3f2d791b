"""Small trainings for the equalities: prepared parts out of ids, jobs around a tiny model, the command line."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fitout.chat.types import Origin, Tokens
from fitout.data.batches import Batches
from fitout.data.store import Part, PartWriter, write_part
from fitout.files import read_jsonl
from fitout.model import methods
from fitout.model.load import load_base
from fitout.model.methods import (
    AdapterSettings,
    DoraSettings,
    FullSettings,
    LoraSettings,
    LowRankSettings,
    QloraSettings,
    SparseSettings,
)
from fitout.objectives import SftSettings, create
from fitout.rundir import RunDir
from fitout.train import TrainSettings
from fitout.train.backend import Backend
from fitout.train.listeners import JsonLog
from fitout.train.loop import Job, Progress, fit
from tests.conftest import random_samples, tiny_llama

CPU = torch.device("cpu")
LOW_RANK: dict[str, LowRankSettings] = {
    "lora": LoraSettings(rank=4, alpha=8),
    "patterns": LoraSettings(
        rank=4, alpha=8, rslora=True, rank_pattern={"q_proj": 2, r"1\.mlp\..*": 6}, alpha_pattern={"down_proj": 3},
        lr_ratio=4, train_also=["norm", "lm_head"],
    ),
    "pissa": LoraSettings(rank=4, alpha=8, init="pissa"),
    "dora": DoraSettings(rank=4, alpha=8),
    "qlora": QloraSettings(rank=4, alpha=8),
    "qdora": QloraSettings(rank=4, alpha=8, quant="fp4", double_quant=False, dora=True, init="olora"),
}  # fmt: skip
METHODS_UNDER_TEST: dict[str, methods.AnySettings] = {
    # resumed = uninterrupted, packed = unpacked, accumulated = one batch, two ranks = one: for each
    **LOW_RANK,
    "full": FullSettings(),
    "last layer": FullSettings(last_layers=1, freeze=["*norm*"]),
    "adapter": AdapterSettings(style="houlsby", reduction=4, activation="gelu"),
    "parallel": AdapterSettings(style="parallel", reduction=8, scale=2.0),
    "sparse": SparseSettings(density=0.02, select="gradient", redraw_every=3),
    "sparse random": SparseSettings(density=0.05, select="random", redraw_every=4, targets=["q_proj", "down_proj"]),
}
SHELL_RECIPE = """\
name: small
model: {base: "embedded:shell"}
data:
  sources: [{path: rows.jsonl}]
  split: {train: 0.8, validation: 0.1, test: 0.1}
  max_length: 64
method: {kind: lora, rank: 4, alpha: 8}
train: {max_steps: 30, batch_size: 4, lr: 1.0e-3, precision: fp32, save_every: 5, evaluate_every: 10, listeners: []}
evaluate: {metrics: [exact_match], retention: "off", max_new_tokens: 4}
"""


def part_of(folder: Path, ids, train_on, *, name: str = "train", groups=None) -> Part:
    """Samples written as prepared data, each a group of its own unless said."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.arrow"
    write_part(
        path,
        (
            (groups[i] if groups else i, Tokens(one.tolist(), bytes(map(bool, on)), Origin("rows", i + 1)))
            for i, (one, on) in enumerate(zip(ids, train_on, strict=True))
        ),
    )
    return Part(path)


def random_part(folder: Path, count: int, *, seed: int = 0, name: str = "train", **how) -> Part:
    return part_of(folder, *random_samples(count, seed=seed, **how), name=name)


def pair_part(folder: Path, count: int, *, seed: int = 0, name: str = "train", end: int | None = None) -> Part:
    """Pairs over some prompts, short and long, each with two answers (which end with the token `end`)."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, last = np.random.default_rng(seed), [] if end is None else [end]
    prompts = [draw.integers(3, 97, size) for size in (3, 9, 17, 24, 40)]
    best: dict[int, list[int]] = {}
    with PartWriter(folder / f"{name}.arrow") as writer:
        for pair in range(count):
            prompt = prompts[pair % len(prompts)]
            for rejected in (False, True):
                answer = [*draw.integers(3, 97, int(draw.integers(1, 12))), *last]
                if not rejected:  # the same in some pairs of a prompt, as where one is better than many
                    answer = best.setdefault(pair % len(prompts), answer) if pair % 2 else answer
                ids, train_on = [*prompt, *answer], b"\0" * len(prompt) + b"\1" * len(answer)
                tokens = Tokens([int(i) for i in ids], train_on, Origin("pairs", pair + 1))
                writer.add(pair, tokens, rejected=rejected)
    return Part(folder / f"{name}.arrow")


@cache
def tiny_base() -> str:
    """The folder of a tiny model, for what has to be loaded (4-bit weights are made while loading)."""
    folder = tempfile.mkdtemp(prefix="fitout-tiny-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tiny_llama(packed=False).save_pretrained(folder)
    return folder


def adapted(settings, *, seed: int = 5, base: str | None = None, packed: bool = True, **model_kwargs):
    """A tiny model with its method; what adapters begin with as zero is random, so that all gradients are there."""
    method = methods.create(settings)
    if model_kwargs:
        model = tiny_llama(packed=packed, **model_kwargs)
    else:
        model = load_base(base or tiny_base(), packed=packed, extra=method.load_kwargs(torch.float32))
    torch.manual_seed(seed)
    method.apply(model)
    if isinstance(settings, LowRankSettings):
        method.begin(model, iter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith(("lora_B", "adapter.up.weight")):
                parameter.add_(0.02 * torch.randn_like(parameter))
            if name.endswith("magnitude_vector"):
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return model, method


class Around:
    """An objective around another."""

    objective: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)


def job_of(
    folder: Path, model, part: Part, *, total: int, lr: float = 1e-3, validation=None, method=None, **settings
) -> Job:
    identity = settings.pop("identity", {"data": "a"})
    packing = settings.pop("packing", True)
    chosen = TrainSettings(**{"batch_size": 4, "precision": "fp32", **settings})
    return Job(
        model=model,
        method=method or methods.create(methods.FullSettings()),
        objective=create(SftSettings()),
        batches=Batches(
            part,
            batch_size=chosen.batch_size,
            batch_tokens=chosen.batch_tokens,
            seed=chosen.seed,
            packing=packing,
            share=packing,
        ),
        validation=validation,
        settings=chosen,
        lr=lr,
        total_steps=total,
        run=RunDir(folder),
        identity=identity,
        info={},
    )


def train(job: Job, *listeners, resume: bool = False) -> Progress:
    return fit(job, Backend(CPU), [JsonLog(job.run.log), *listeners], resume=resume)


def losses(log: Path) -> list[tuple[int, float]]:
    """(step, loss) of every step in a log, in the order they stand there."""
    return [(row["step"], row["loss"]) for row in read_jsonl(log) if "event" not in row]


def events(log: Path, name: str) -> list[dict]:
    return [row for row in read_jsonl(log) if row.get("event") == name]


def trained_tensors(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def write_shell_recipe(folder: Path, rows: int = 60) -> Path:
    """A recipe for the embedded model over sums written here, and its data."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "rows.jsonl", "w") as file:
        for i in range(rows):
            a, b = divmod(i, 8)
            file.write(json.dumps({"instruction": f"What is {a} plus {b}?", "output": str(a + b)}) + "\n")
    (folder / "recipe.yaml").write_text(SHELL_RECIPE)
    return folder / "recipe.yaml"


def command(*arguments: object, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "fitout.cli.app", *map(str, arguments)]


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}


def call(*arguments: object, ranks: int = 1, code: int = 0) -> subprocess.CompletedProcess:
    """Runs `fitout ARGUMENTS` as a user does, and expects exit code `code`."""
    done = subprocess.run(
        command(*arguments, ranks=ranks), env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done
