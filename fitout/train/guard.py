"""What may go wrong while training: stop requests, numbers that are not finite, a step that hangs.

(Memory that runs out is told by model.memory; what the loop does then is in loop.py.)
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Self

MAX_SKIPPED = 10  # steps in a row without finite gradients before the run ends
LOOKS = 20  # of the watchdog, in the time after which it ends the process


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


class Watchdog:
    """Ends the process when nothing has moved for `minutes`, after writing down where every thread stands.

    A thread of Python's looks; should the hang hold the interpreter's lock, faulthandler's own thread does the same
    after three times as long. `tell` gets the reason before the end. A run that ended so goes on like any other that
    was killed.
    """

    def __init__(self, minutes: float | None, stacks: Path, tell: Callable[[str], object] = lambda line: None):
        self.seconds = None if minutes is None else 60 * minutes
        self._stacks, self._tell = stacks, tell
        self._moved = time.monotonic()
        self._armed = float("-inf")
        self._over = threading.Event()

    def __enter__(self) -> Self:
        if self.seconds is not None:
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._stacks, "w", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
            self._thread = threading.Thread(target=self._watch, args=(self.seconds,), name="fitout-watchdog")
            self._thread.daemon = True
            self._thread.start()
            self.alive()
        return self

    def alive(self) -> None:
        """Something moved."""
        self._moved = time.monotonic()
        if self.seconds is not None and self._moved - self._armed > self.seconds / 10:  # arming starts a thread
            faulthandler.dump_traceback_later(3 * self.seconds, exit=True, file=self._file)
            self._armed = self._moved

    def _watch(self, seconds: float) -> None:
        seen, quiet = self._moved, 0
        while not self._over.wait(seconds / LOOKS):
            # looks are counted, not seconds: a process that was stopped for a while (Ctrl-Z) has not hung
            seen, quiet = self._moved, quiet + 1 if seen == self._moved else 0
            if quiet >= LOOKS:
                faulthandler.dump_traceback(file=self._file)
                line = f"nothing has moved for {seconds:.3g} s; where every thread stands is in {self._stacks}"
                print(f"error {line}\n      Run the same command again: it goes on from the last checkpoint.",
                      file=sys.stderr, flush=True)  # fmt: skip
                self._tell(line)
                os._exit(1)

    def __exit__(self, *_: object) -> None:
        if self.seconds is None:
            return
        faulthandler.cancel_dump_traceback_later()
        self._over.set()
        self._thread.join()
        self._file.close()
        if not self._stacks.stat().st_size:
            self._stacks.unlink()
