"""One of two ranks: trains with the engines and methods that it is told, and writes what came out.

    python -m tests.equal.engines_worker FOLDER ENGINE:METHOD ENGINE:METHOD ...

What one process does for comparison is in the same functions: `gradients`, `whole_run`, `part_of_a_run`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from fitout.data.batches import Batches
from fitout.errors import Stopped
from fitout.model.fuse import fused
from fitout.model.load import Pending
from fitout.model.methods import SparseSettings
from fitout.objectives import SftSettings, create
from fitout.train.backend import Backend
from fitout.train.engines import open_backend
from fitout.train.engines.asked import Asked
from fitout.train.listeners import JsonLog
from fitout.train.loop import fit
from fitout.train.step import train_step

from .small import CPU, METHODS_UNDER_TEST, adapted, job_of, random_part, tiny_base

KINDS = {**METHODS_UNDER_TEST, "sparse kept": SparseSettings(density=0.02, select="gradient")}

RANK = int(os.environ.get("RANK", 0))
TOTAL, FIRST, SECOND = 12, 4, 8  # steps; where the number of ranks changes


def backend_of(engine: str) -> Backend:
    kind, _, more = engine.partition("+")
    return open_backend(Asked(kind, offload=more == "offload"), CPU)


def gradients(folder: Path, backend: Backend, kind: str) -> dict[str, torch.Tensor]:
    """The clipped gradients of a step of three samples, each a micro-batch, so that the second of two ranks has an
    empty one. Plain SGD at rate 1 makes the change of the weights the gradient itself."""
    model, _ = adapted(KINDS[kind])
    batches = Batches(random_part(folder, 3), batch_size=3, packing=False, share=False)
    layouts = batches.layouts(0, budget=1, rank=backend.rank, ranks=backend.ranks)
    assert [bool(layout.supervised) for layout in layouts] == {1: [True] * 3, 2: [True, backend.rank == 0]}[
        backend.ranks
    ]
    objective = create(SftSettings())
    with fused(model):  # before an engine divides what it is tried on
        parameters, optimizer = backend.engage(model, objective, lambda p: torch.optim.SGD(p.values(), lr=1.0))
        before = whole(backend.weights(parameters))
        result = train_step(model, objective, layouts, list(parameters.values()), optimizer, backend, clip=0.5)
    after = whole(backend.weights(parameters))
    backend.disengage(model, parameters, frozen_too=False)
    moved = {name: before[name] - after[name] for name in before}
    return moved | {"loss": torch.tensor(result.loss), "norm": torch.tensor(result.grad_norm)}


def whole(tensors) -> dict[str, torch.Tensor]:
    return {
        name: (tensor.fetch() if isinstance(tensor, Pending) else tensor.detach()).clone()
        for name, tensor in tensors.items()
    }


def job(folder: Path, kind: str, **settings):
    """Twelve steps; rank 0's start is what counts. With weight decay, so that norms are a group of their own."""
    model, method = adapted(KINDS[kind], seed=5 + RANK)
    part = random_part(folder / f"data-{RANK}", 26)
    validation = random_part(folder / f"data-{RANK}", 6, seed=9, name="validation")
    settings = {"keep": "best", "save_every": 4, "micro_batch_tokens": 64, "evaluate_every": 6, "weight_decay": 0.1,
                **settings}  # fmt: skip
    return job_of(folder, model, part, total=TOTAL, lr=3e-3, method=method, validation=validation, **settings)


def whole_run(folder: Path, backend: Backend, kind: str, **settings) -> None:
    """A run, and what it leaves: log, checkpoints and, in result/, the adapter or model."""
    work = job(folder, kind, **settings)
    with fused(work.model):
        fit(work, backend, [JsonLog(work.run.log)] if backend.main else [])
    if backend.main:
        work.method.save(work.model, folder / "result", base="base")


class StopAt:
    """Asks for an end after a step, as a scheduler would."""

    def __init__(self, step: int):
        self.step = step

    def start(self, info):
        pass

    def row(self, row):
        if row.get("step") == self.step and "event" not in row:
            os.kill(os.getpid(), signal.SIGTERM)

    def close(self):
        pass


def part_of_a_run(folder: Path, backend: Backend, kind: str, until: int) -> None:
    """The run in `folder`, gone on with until a step (to its end with TOTAL)."""
    work = job(folder, kind)
    listeners = [JsonLog(work.run.log), *([StopAt(until)] if until < TOTAL else [])] if backend.main else []
    try:
        with fused(work.model):
            fit(work, backend, listeners, resume=True)
    except Stopped:
        assert until < TOTAL
        return
    if backend.main:
        work.method.save(work.model, folder / "result", base="base")


def main(folder: Path, pairs: list[str]) -> None:
    tiny_base()
    for pair in pairs:
        engine, kind = pair.split(":")
        place = folder / pair
        found = gradients(place / f"gradients-{RANK}", backend_of(engine), kind)
        if RANK == 0:
            save_file(found, place / "gradients.safetensors")
        whole_run(place / "whole", backend_of(engine), kind)
        if (place / "elastic").exists():
            part_of_a_run(place / "elastic", backend_of(engine), kind, SECOND)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
