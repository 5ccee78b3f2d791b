"""One worker thread that generates, and the jobs that it works on at once.

The event loop never computes: it hands a job to the worker and reads what comes out of it. The worker gives every job
a token in turn (engine.Flight), and takes a new one in between two. A job belongs to one request; when the request ends
for whatever reason the job is stopped, and leaves before its next token.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from .wire import ApiError

if TYPE_CHECKING:
    from ..engine import Completion, Engine, Flight, Stream

RETRY_AFTER = 1  # seconds that a refused client is asked to wait

Begin = Callable[[Callable[[], bool]], "Stream"]  # given how to ask whether the job was stopped


class Job:
    """One answer being made. Its events: a Stream (about to generate), then pieces of text, then the Completion."""

    def __init__(self, begin: Begin, stopped: Callable[[Job], None]):
        self._begin, self._on_stop = begin, stopped
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Asks the worker to end this job, or takes it out of those that wait; safe from any thread, at any time, any
        number of times."""
        self._stopped.set()
        self._on_stop(self)

    def begin(self) -> Stream | None:
        """In the worker: what it is to make; None when the request turns out to be a bad one, which is told."""
        try:
            stream = self._begin(self._stopped.is_set)
        except Exception as error:
            self.tell(error)
            return None
        self.tell(stream)
        return stream

    def tell(self, event: Any) -> None:
        """In the worker: the next event. Whatever goes wrong is the last one."""
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
    """Works on jobs, at most `places` at once, those that wait for the model among them."""

    def __init__(self, engine: Engine, places: int):
        self._engine, self._places = engine, places
        self._jobs: set[Job] = set()
        self._new: deque[Job] = deque()  # not begun
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> int:
        return len(self._jobs)

    def submit(self, begin: Begin) -> Job:
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
        job = Job(begin, self._withdraw)
        with self._changed:
            self._jobs.add(job)
            self._new.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="fitout-generate", daemon=True)
                self._thread.start()
            self._changed.notify()
        return job

    def close(self) -> None:
        for job in tuple(self._jobs):
            job.stop()
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _withdraw(self, job: Job) -> None:
        """Takes out a job that has not begun."""
        with self._changed:
            if job not in self._new:
                return
            self._new.remove(job)
            self._jobs.discard(job)
        job.tell(ApiError(503, "stopped before its turn came", kind="server_error"))

    def _work(self) -> None:
        """In the thread: a token for every job in turn, until the worker is closed and all are done."""
        flight: Flight | None = None
        streams: dict[Job, Stream] = {}
        while True:
            new = {job: job.begin() for job in self._taken(wait=not streams)}
            self._jobs.difference_update(job for job, stream in new.items() if stream is None)
            begun = {job: stream for job, stream in new.items() if stream is not None}
            streams |= begun
            if not streams:
                if self._closing:
                    return
                continue
            try:
                flight = flight or self._engine.flight(self._places)
                for stream in begun.values():
                    flight.add(stream)
                flight.step()
            except Exception as error:
                self._jobs.difference_update(streams)
                for job in streams:
                    job.tell(error)
                flight, streams = None, {}
                continue
            for job, stream in tuple(streams.items()):
                if piece := stream.take():
                    job.tell(piece)
                if ended := stream.error or stream.completion:
                    self._jobs.discard(job)  # who is told that it has ended finds the place free
                    del streams[job]
                    job.tell(ended)

    def _taken(self, *, wait: bool) -> list[Job]:
        """The jobs that are new; with `wait` not before there is one, or the worker is closed."""
        with self._changed:
            while wait and not self._new and not self._closing:
                self._changed.wait()
            found = list(self._new)
            self._new.clear()
            return found
