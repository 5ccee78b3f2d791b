"""What may go wrong while training: stop requests, memory, numbers that are not finite."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import torch

from ..errors import FitoutError

MAX_SKIPPED = 10  # steps in a row without finite gradients before the run ends


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

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self._previous[number])  # type: ignore[arg-type]

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class FiniteGuard:
    """Counts steps whose gradients were not finite; the loop skips them and ends the run when they do not stop."""

    def __init__(self) -> None:
        self.in_a_row = 0

    def saw(self, finite: bool, step: int, origins: list[str]) -> None:
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if self.in_a_row >= MAX_SKIPPED:
            raise FitoutError(
                f"{MAX_SKIPPED} steps in a row had no finite gradients (the last at step {step})",
                harm="The weights were left as they were before the first of them.",
                hint="Lower train.lr or set train.precision: fp32; the last step's rows: " + ", ".join(origins[:4]),
            )
