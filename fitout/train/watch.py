"""Finds a rank that hangs: stacks are written and the process ends, so that whoever started the ranks ends the others.

Every rank watches itself. One that hangs keeps all others waiting for it in a collective, so all of them notice at
about the same time, also where the hung one's machine is gone; the stacks of the one that is *not* in a collective say
why.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path


class Watch:
    """Ends the process when `beat` was not called for `seconds`; the stacks of all threads go to `path`."""

    def __init__(self, path: Path, seconds: float, rank: int):
        self.path, self.seconds, self.rank = path, seconds, rank
        self._last = time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def beat(self) -> None:
        self._last = time.monotonic()

    def close(self) -> None:
        self._closed.set()

    def _look(self) -> None:
        while not self._closed.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._last > self.seconds:
                self._end()

    def _end(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        print(
            f"error rank {self.rank} has computed nothing for {self.seconds:g} s: some rank hangs, all end\n"
            f"      what this one was doing: {self.path}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
