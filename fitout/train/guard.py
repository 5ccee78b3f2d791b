"""What may go wrong while training: stop requests, numbers that are not finite.

(Memory that runs out is told by model.memory, a step that hangs by watch.py; what the loop does is in loop.py.)
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

MAX_SKIPPED = 10  # steps in a row without finite gradients before the run ends


class Interrupted(Exception):
    """A stop was asked for between two micro-batches: what was being computed is given up, nothing of it is kept."""


class StopRequest:
    """Turns SIGINT and SIGTERM into a flag that the loop reads between steps; a second one is not caught."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._asked)
        return self

    def check(self) -> None:
        """Raises Interrupted when a stop was asked for; to be called where work can be given up without a trace."""
        if self.name:
            raise Interrupted(self.name)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self._previous[number])  # type: ignore[arg-type]

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


class FiniteGuard:
    """Counts steps without finite gradients, and says when the run must end because of them."""

    def __init__(self, policy: str) -> None:
        self.allowed = MAX_SKIPPED if policy == "skip" else 1
        self.in_a_row = 0

    def too_many(self, finite: bool, *, searching: bool) -> bool:
        """Takes in one more step; `searching`: the loss is finite and its scale may be what is not (fp16)."""
        self.in_a_row = 0 if finite else self.in_a_row + 1
        return self.in_a_row >= (MAX_SKIPPED if searching else self.allowed)
