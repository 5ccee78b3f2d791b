"""One worker thread that generates, and the jobs that wait for it.

The event loop never computes: it hands a job to the worker and reads what comes out of it. A job belongs to one
request; when the request ends for whatever reason the job is stopped, and the worker is free after the token in work.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from .wire import ApiError

if TYPE_CHECKING:
    from ..engine import Completion, Stream

RETRY_AFTER = 1  # seconds that a refused client is asked to wait


class Job:
    """One answer being made. Its events: a Stream (about to generate), then pieces of text, then the Completion."""

    def __init__(self, begin: Callable[[Callable[[], bool]], Stream]):
        self._begin = begin
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._stopped = threading.Event()
        self.turn: Future[None] | None = None  # of the worker

    def stop(self) -> None:
        """Asks the worker to end this job, or takes it out of those that wait; safe from any thread, at any time, any
        number of times."""
        self._stopped.set()
        if self.turn is not None and self.turn.cancel():
            self._tell(ApiError(503, "stopped before its turn came", kind="server_error"))

    def run(self) -> None:
        """In the worker: makes the answer. Whatever goes wrong becomes the job's last event."""
        try:
            stream = self._begin(self._stopped.is_set)
            self._tell(stream)
            for piece in stream:
                self._tell(piece)
            self._tell(stream.completion)
        except Exception as error:
            self._tell(error)

    def _tell(self, event: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: the server has gone, nobody reads this any more
            self._stopped.set()

    async def next(self) -> Any:
        """The next event; raises what went wrong in the worker."""
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    async def pieces(self) -> AsyncIterator[str | Completion]:
        """The pieces of text, and the Completion as the last."""
        while True:
            event = await self.next()
            yield event
            if not isinstance(event, str):
                return


class Worker:
    """Runs jobs one after the other, at most `places` in work or waiting."""

    def __init__(self, places: int):
        self._places = places
        self._jobs: set[Job] = set()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fitout-generate")

    @property
    def busy(self) -> int:
        return len(self._jobs)

    def submit(self, begin: Callable[[Callable[[], bool]], Stream]) -> Job:
        """Queues a job. A place is taken until the worker has let go of it, not just until the client has; one that
        waits in vain gives it back at once."""
        if len(self._jobs) >= self._places:
            raise ApiError(
                429,
                f"{self._places} requests are in work or waiting; try again",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(RETRY_AFTER)},
            )
        job = Job(begin)
        self._jobs.add(job)
        job.turn = self._thread.submit(job.run)
        job.turn.add_done_callback(lambda _: self._jobs.discard(job))
        return job

    def close(self) -> None:
        for job in tuple(self._jobs):
            job.stop()
        self._thread.shutdown(wait=True)
