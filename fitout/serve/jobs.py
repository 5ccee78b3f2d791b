"""Two threads behind the event loop, which never computes: one reads requests, one generates for all of them at once.

The first turns a request into a Stream (template, tokenizer), one after the other. The second gives every stream a
token in turn (engine.Flight), and takes new ones in between two. A job belongs to one request; when the request ends
for whatever reason the job is stopped: it is never begun, or leaves before its next token.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from .wire import ApiError

if TYPE_CHECKING:
    from ..engine import Completion, Engine, Flight, Stream

RETRY_AFTER = 1  # seconds that a refused client is asked to wait

Begin = Callable[[Callable[[], bool]], "Stream"]  # given how to ask whether the job was stopped


class Job:
    """One answer being made. Its events: a Stream (about to generate), then pieces of text, then the Completion."""

    def __init__(self, begin: Begin):
        self._begin = begin
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._stopped = threading.Event()
        self.turn: Future[Stream] | None = None  # of being read

    def stop(self) -> None:
        """Asks the worker to end this job, or takes it out of those that wait; safe from any thread, at any time, any
        number of times."""
        self._stopped.set()
        if self.turn is not None:
            self.turn.cancel()

    def begin(self) -> Stream:
        """What it is to make."""
        return self._begin(self._stopped.is_set)

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
        self._new: list[tuple[Job, Stream]] = []  # that the generating thread has not taken
        self._changed = threading.Condition()
        self._closing = False
        self._reads: ThreadPoolExecutor | None = None
        self._generates: threading.Thread | None = None

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
        if self._reads is None:
            self._reads = ThreadPoolExecutor(1, thread_name_prefix="fitout-read")
        if self._generates is None or not self._generates.is_alive():
            self._generates = threading.Thread(target=self._generate, name="fitout-generate", daemon=True)
            self._generates.start()
        job = Job(begin)
        self._jobs.add(job)
        job.turn = self._reads.submit(job.begin)
        job.turn.add_done_callback(lambda turn: self._read(job, turn))
        return job

    def close(self) -> None:
        """Ends what is in work; a job that is submitted afterwards finds new threads."""
        for job in tuple(self._jobs):
            job.stop()
        if self._reads is not None:
            self._reads.shutdown(wait=True)
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._generates is not None:
            self._generates.join()
        self._reads, self._generates, self._closing = None, None, False

    def _read(self, job: Job, turn: Future[Stream]) -> None:
        """A job's request has been read, or its turn was taken from it."""
        if turn.cancelled():
            self._end(job, ApiError(503, "stopped before its turn came", kind="server_error"))
        elif error := turn.exception():
            self._end(job, _error(error))
        else:
            job.tell(turn.result())
            with self._changed:
                self._new.append((job, turn.result()))
                self._changed.notify()

    def _end(self, job: Job, event: Any) -> None:
        """The last event of a job: who is told finds the place free."""
        self._jobs.discard(job)
        job.tell(event)

    def _generate(self) -> None:
        """In the thread: a token for every job in turn, until the worker is closed and all are done."""
        flight: Flight | None = None
        streams: dict[Job, Stream] = {}
        while True:
            new = self._taken(wait=not streams)
            streams.update(new)
            if not streams:
                return
            try:
                flight = flight or self._engine.flight(self._places)
                for _, stream in new:
                    flight.add(stream)
                flight.step()
            except BaseException as error:  # a tokenizer's panic is no Exception
                for job in streams:
                    self._end(job, _error(error))
                flight, streams = None, {}
                continue
            for job, stream in tuple(streams.items()):
                if piece := stream.take():
                    job.tell(piece)
                if ended := stream.error or stream.completion:
                    del streams[job]
                    self._end(job, ended)

    def _taken(self, *, wait: bool) -> list[tuple[Job, Stream]]:
        """The streams that are new; with `wait` not before there is one, or the worker is closed."""
        with self._changed:
            while wait and not self._new and not self._closing:
                self._changed.wait()
            found, self._new = self._new, []
            return found


def _error(error: BaseException) -> Exception:
    """What the event loop can take for a failed request: raised there, anything else would end it."""
    return error if isinstance(error, Exception) else RuntimeError(error)
