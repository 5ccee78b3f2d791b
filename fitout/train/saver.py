"""Checkpoints written while the training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from typing import Any

import torch

from ..errors import FitoutError
from ..model.load import Pending, in_order
from ..model.memory import available_memory, give_back, is_out_of_memory
from .backend import Backend
from .checkpoint import Checkpoints

ROOM = 2  # times the state's size in free memory, before a copy of it is made
BEAT = 10.0  # seconds

Tensors = Mapping[str, torch.Tensor | Pending]
Job = tuple[int, Tensors, Tensors, dict[str, Any], int | None]  # step, weights, optimizer, state, best step


class Saver:
    """Writes the checkpoints of a run, one at a time, and then removes those that are no longer kept.

    Where the backend `saves_aside` it copies the state into main memory and writes the copy in a thread; else, or where
    main memory has not the room, the training stands until all is written. What is on the disk, and in which order, is
    the same. What the thread raises is raised by the next `look`, `save` or `wait`, and a checkpoint that is complete
    is logged by them, with the seconds that the training stood for it.
    """

    def __init__(self, checkpoints: Checkpoints, backend: Backend, keep_last: int, log: Callable[..., None]):
        """`log` takes a row of the log as keywords."""
        self._checkpoints, self._backend, self._keep_last, self._log = checkpoints, backend, keep_last, log
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fitout-checkpoint")
        self._coming: tuple[Future[str], Job, float] | None = None  # how long the training stood for it

    def save(
        self, step: int, weights: Tensors, optimizer: Tensors, state: dict[str, Any], best_step: int | None
    ) -> None:
        """Hands the state of `step` over; it may change from here on."""
        start = time.perf_counter()
        self.wait()
        if self._backend.saves_aside and _fits(weights, optimizer):
            job: Job = (step, _copied(weights), _copied(optimizer), state, best_step)
            self._coming = (self._thread.submit(self._write, *job), job, time.perf_counter() - start)
            return
        job = (step, weights, optimizer, state, best_step)
        name = self._written(job, lambda: self._write(*job), again=not self._backend.shares_steps)
        self._complete(step, name, time.perf_counter() - start)

    def look(self) -> None:
        """Logs a checkpoint that has been completed meanwhile."""
        if self._coming and self._coming[0].done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written."""
        if not self._coming:
            return
        (coming, job, stood), self._coming = self._coming, None
        while not coming.done():
            wait_for([coming], timeout=BEAT)
            self._backend.alive()
        self._complete(job[0], self._written(job, coming.result, again=True), stood)

    def close(self) -> None:
        """Ends the thread, when what it writes is written. Something is still written only where the run ends by an
        error, which is told already."""
        with suppress(Exception):
            self.wait()
        self._thread.shutdown(wait=True)

    def _written(self, job: Job, name: Callable[[], str], *, again: bool) -> str:
        """What `name` gives. When memory did not suffice for it, what is written `again`, while the training stands:
        nothing half-written is left, and what the step no longer needs may be enough."""
        try:
            return name()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not again:
                raise
        give_back(self._backend.device)
        self._log(event="oom", step=job[0], saving=True)
        try:
            return self._write(*job)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise FitoutError(
                f"memory ran out while the checkpoint of step {job[0]} was written",
                where=str(self._checkpoints.path(job[0])),
                harm="The checkpoint before it is complete; nothing after it was kept.",
                hint="Leave more memory free, or take method: {kind: lora} or train.optimizer: adamw_8bit, and run "
                "again with --resume.",
            ) from error

    def _write(
        self, step: int, weights: Tensors, optimizer: Tensors, state: dict[str, Any], best_step: int | None
    ) -> str:
        path = self._checkpoints.save(step, weights, optimizer, state)
        self._checkpoints.prune(self._keep_last, best_step)
        return path.name

    def _complete(self, step: int, name: str, stood: float) -> None:
        self._log(event="saved", step=step, path=name, seconds=round(stood, 3))


def _fits(*groups: Tensors) -> bool:
    size = sum(tensor.shape.numel() * tensor.dtype.itemsize for group in groups for tensor in group.values())
    return available_memory() > ROOM * size


def _copied(tensors: Tensors) -> dict[str, torch.Tensor]:
    """In main memory. Those that are divided over ranks are brought together in the order in which the other ranks
    give their parts; over one rank, what is brought together may be the part itself."""
    return {
        name: tensor.fetch().clone() if isinstance(tensor, Pending) else tensor.detach().to("cpu", copy=True)
        for name, tensor in ((name, tensors[name]) for name in in_order(tensors))
    }
