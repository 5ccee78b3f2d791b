"""The layouts of the coming steps, made in a thread while a step computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from ..layout import Layout

DEPTH = 2  # steps that are ready, or being made, beyond the one that computes

Make = Callable[[int, int], list[Layout]]  # (step, tokens a micro-batch) -> what the step computes


class Ahead:
    """`make(step, budget)` for steps below `end`, the next ones before they are asked for.

    What was made for another budget is thrown away. So `get` gives what `make` would, and where a run stands remains
    one integer. An error of `make` is raised by `get` for the step it belongs to, with the traceback it had.
    """

    def __init__(self, make: Make, end: int):
        self._make, self._end = make, end
        self._budget = 0
        self._coming: dict[int, Future[list[Layout]]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fitout-layouts")

    def get(self, step: int, budget: int) -> list[Layout]:
        """The layouts of a step; those of the next DEPTH are begun."""
        wanted = range(step, min(step + 1 + DEPTH, self._end))
        for other in [one for one in self._coming if budget != self._budget or one not in wanted]:
            self._coming.pop(other).cancel()
        self._budget = budget
        for coming in wanted:
            if coming not in self._coming:
                self._coming[coming] = self._thread.submit(self._make, coming, budget)
        return self._coming.pop(step).result()

    def forget(self) -> None:
        """Throws away what was made ahead: it would be made otherwise now."""
        while self._coming:
            self._coming.popitem()[1].cancel()

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
