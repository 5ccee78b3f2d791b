"""Finds a process that hangs: stacks are written and it ends, so that whoever started several ranks ends the others.

Every rank watches itself. One that hangs keeps all others waiting for it in a collective, so all of them notice at
about the same time, also where the hung one's machine is gone; the stacks of the one that is *not* in a collective say
why. A single process is watched in the same way: it goes on from its last checkpoint when the command is given again.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

LOOKS = 20  # in the time after which the process is ended


class Watch:
    """Ends the process when `beat` was not called for `seconds`; the stacks of all threads go to `path`.

    A thread of Python's looks; should the hang hold the interpreter's lock, faulthandler's own thread does the same
    after three times as long.
    """

    def __init__(self, path: Path, seconds: float, rank: int, ranks: int):
        self.path, self.seconds, self.rank, self.ranks = path, seconds, rank, ranks
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._armed = float("-inf")
        self.beat()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        self._last = now = time.monotonic()
        if now - self._armed > self.seconds / 10:  # arming starts a thread
            faulthandler.dump_traceback_later(3 * self.seconds, exit=True, file=self._file)
            self._armed = now

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._closed.set()
        self._thread.join()
        self._file.close()
        if not self.path.stat().st_size:
            self.path.unlink()
            with suppress(OSError):  # other ranks' files are in it
                self.path.parent.rmdir()

    def _look(self) -> None:
        seen, quiet = self._last, 0
        while not self._closed.wait(self.seconds / LOOKS):
            # looks are counted, not seconds: a process that was stopped for a while (Ctrl-Z) has not hung
            seen, quiet = self._last, quiet + 1 if seen == self._last else 0
            if quiet >= LOOKS:
                self._end()

    def _end(self) -> None:
        faulthandler.dump_traceback(self._file, all_threads=True)
        who, then = "the process", "give the same command again: it goes on from the last checkpoint"
        if self.ranks > 1:
            who, then = f"rank {self.rank}", "some rank hangs, all end"
        print(
            f"error {who} has computed nothing for {self.seconds:g} s: {then}\n"
            f"      what {'this one' if self.ranks > 1 else 'it'} was doing: {self.path}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
