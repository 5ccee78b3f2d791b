"""Checkpoints written while the training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from ..model.load import Pending, in_order
from ..model.memory import available_memory
from .checkpoint import Checkpoints

ROOM = 2  # times the state's size in free memory, before a copy of it is made

Tensors = Mapping[str, torch.Tensor | Pending]


class Saver:
    """Writes the checkpoints of a run, one at a time, and then removes those that are no longer kept.

    With `aside` it copies the state into main memory and writes the copy in a thread; else, or where main memory has
    not the room, the training stands until all is written. What is on the disk, and in which order, is the same. What
    the thread raises is raised by the next `look`, `save` or `wait`. `tell(step, name, stood)` is called by those too,
    for each checkpoint that is complete, with the seconds that the training stood for it.
    """

    def __init__(
        self, checkpoints: Checkpoints, keep_last: int, *, aside: bool, tell: Callable[[int, str, float], None]
    ):
        self._checkpoints, self._keep_last, self._aside, self._tell = checkpoints, keep_last, aside, tell
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fitout-checkpoint")
        self._coming: tuple[Future[str], int, float] | None = None  # its step, and how long the training stood

    def save(
        self, step: int, weights: Tensors, optimizer: Tensors, state: dict[str, Any], best_step: int | None
    ) -> None:
        """Hands the state of `step` over; it may change from here on."""
        start = time.perf_counter()
        self.wait()
        if self._aside and _fits(weights, optimizer):
            coming = self._thread.submit(self._write, step, _copied(weights), _copied(optimizer), state, best_step)
            self._coming = (coming, step, time.perf_counter() - start)
            return
        name = self._write(step, weights, optimizer, state, best_step)
        self._tell(step, name, time.perf_counter() - start)

    def look(self) -> None:
        """Tells of a checkpoint that has been completed meanwhile."""
        if self._coming and self._coming[0].done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._coming:
            (coming, step, stood), self._coming = self._coming, None
            self._tell(step, coming.result(), stood)

    def close(self) -> None:
        """Ends the thread, when what it writes is written."""
        self._thread.shutdown(wait=True)

    def _write(
        self, step: int, weights: Tensors, optimizer: Tensors, state: dict[str, Any], best_step: int | None
    ) -> str:
        path = self._checkpoints.save(step, weights, optimizer, state)
        self._checkpoints.prune(self._keep_last, best_step)
        return path.name


def _fits(*groups: Tensors) -> bool:
    size = sum(tensor.shape.numel() * tensor.dtype.itemsize for group in groups for tensor in group.values())
    return available_memory() > ROOM * size


def _copied(tensors: Tensors) -> dict[str, torch.Tensor]:
    """In main memory. Those that are divided over ranks are brought together in the order in which the other ranks
    give their parts."""
    return {
        name: tensor.fetch() if isinstance(tensor, Pending) else tensor.detach().to("cpu", copy=True)
        for name, tensor in ((name, tensors[name]) for name in in_order(tensors))
    }
