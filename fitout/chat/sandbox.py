"""Chat templates are code of whoever made the model: they are rendered in a process of its own, under limits.

The rendering itself is transformers' (what every engine does with a template), inside jinja2's immutable sandbox: no
attribute leads out of it. What a sandbox does not bound is time and memory (a loop without end, `'a' * 10**10`, powers
of powers inside one call into C); the process does: a processor-time limit for each conversation, and a limit on its
memory. One process serves all templates and all threads of this one, takes batches and answers in bulk, so a row costs
a few microseconds more than rendering it here. Where it dies of a limit the rest of the batch is rendered again with an
answer sent after each conversation, which tells the one that it was. It is started while torch is imported, or else
when the first tokenizer is loaded. For many rows there are several (`Crew`), which encode as well: then a row's string
never leaves the process that made it.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from ..errors import TemplateError, TemplateLimitError

T = TypeVar("T")
SECONDS = 5  # of processor time for one conversation; usual ones take milliseconds
MEGABYTES = 512
CHARACTERS = 50_000_000  # of one rendered string
PATIENCE = 60  # seconds without any answer; the limits above act much earlier
WORKER = Path(__file__).with_name("render_worker.py")


@dataclass(frozen=True)
class Ask:
    """A conversation and which strings are wanted of it: each cut is (how many messages, generation prompt or not)."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]]
    cuts: Sequence[tuple[int, bool]]


class Encoded(tuple[tuple["array[int]", bytes], ...]):
    """The ids of each sample, and which of them are trained."""


class Renderer:
    """The process that renders, started when needed and again after a limit ended it. Handed a tokenizer (its JSON) and
    the ids of its control tokens, it encodes what it rendered."""

    def __init__(self, tokenizer: str = "", control: Iterable[int] = ()) -> None:
        self._handed = {"tokenizer": tokenizer, "control": list(control)}
        self._process: subprocess.Popen[bytes] | None = None
        self._dismissed = False
        self._ready = False
        self._held = bytearray()  # read and not taken yet
        self._lock = threading.Lock()

    def start(self) -> None:
        """Starts the process without waiting for it."""
        if self._dismissed:
            raise RuntimeError("the process was dismissed")
        if self._process is None:
            limits = map(str, (SECONDS, MEGABYTES, CHARACTERS))
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER), *limits], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )  # fmt: skip
            self._ready = False
            if self._dismissed:  # meanwhile
                self._process.kill()

    def dismiss(self) -> None:
        """Ends the process for good, also while a thread waits for its answer; `stop` clears up."""
        self._dismissed = True
        process = self._process
        if process is not None:
            process.kill()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(OSError):  # what was not sent yet has nobody to go to
                    pipe.close()  # type: ignore[union-attr]
            self._process.wait()
            self._process = None
            self._held.clear()

    def render(self, template: str, variables: dict[str, Any], asks: Sequence[Ask]) -> list[list[str] | TemplateError]:
        """The strings of each conversation, in the order of its cuts, or why the template does not render it.

        Raises TemplateLimitError, whose `place` is the conversation's, when one goes over a limit.
        """
        return self._answers(template, variables, asks, encode=False)

    def encode(
        self, template: str, variables: dict[str, Any], asks: Sequence[Ask]
    ) -> list[Encoded | list[str] | TemplateError]:
        """The samples of each conversation, whose cuts are the whole and for each supervised turn its prompt and the
        string up to its end; the strings where they are long or cannot be divided or encoded. Otherwise as `render`."""
        return self._answers(template, variables, asks, encode=True)

    def _answers(self, template: str, variables: dict[str, Any], asks: Sequence[Ask], *, encode: bool) -> list[Any]:
        done: list[Any] = []
        with self._lock:
            died = one_by_one = False
            while len(done) < len(asks):
                before = len(done)
                try:
                    self._batch(template, variables, asks[before:], done, one_by_one, encode)
                except _Died as death:
                    self.stop()
                    if (death.limit and one_by_one) or (died and len(done) == before):
                        raise _over(death.limit or "its process died twice", len(done)) from None
                    died, one_by_one = not death.limit, True
                except BaseException:  # interrupted between frames: what is still in the pipes belongs to nobody
                    self.stop()
                    raise
        return done

    def _batch(
        self, template: str, variables: dict[str, Any], asks: Sequence[Ask], done: list, one_by_one: bool, encode: bool
    ) -> None:
        """Sends the conversations and takes the answers as they come."""
        self.start()
        if not self._ready:
            self._receive()  # it reads
            self._send(self._handed)
            self._receive()
            self._ready = True
        request = {
            "template": template,
            "variables": variables,
            "one_by_one": one_by_one,
            "encode": encode,
            "asks": [(list(ask.messages), list(ask.tools) or None, list(ask.cuts)) for ask in asks],
        }
        self._send(request)
        for _ in asks:
            answer = self._receive()
            if isinstance(answer, Encoded):
                done.append(answer)
            elif isinstance(answer, list):
                first = answer[0]
                done.append([first[:part] if isinstance(part, int) else part for part in answer])
            elif "limit" in answer:
                raise _Died(answer["limit"])
            else:
                done.append(TemplateError(answer["error"]))

    def _send(self, value: Any) -> None:
        assert self._process is not None and self._process.stdin is not None
        data = json.dumps(value, ensure_ascii=False, default=_inert).encode("utf-8", "surrogatepass")
        try:
            self._process.stdin.write(len(data).to_bytes(8, "little") + data)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def _receive(self) -> Any:
        size = int.from_bytes(self._read(8), "little")
        frame = self._read(size)
        return _samples(frame) if frame[:1] == b"\0" else json.loads(frame.decode("utf-8", "surrogatepass"))

    def _read(self, size: int) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        if len(self._held) < size:
            handle = self._process.stdout.fileno()
            with selectors.DefaultSelector() as selector:
                selector.register(handle, selectors.EVENT_READ)
                while len(self._held) < size:
                    if not selector.select(PATIENCE):
                        self._process.send_signal(signal.SIGUSR1)  # it writes down where it stands
                        raise _Died(f"no answer for {PATIENCE} s")
                    part = os.read(handle, 1 << 20)
                    if not part:
                        raise self._death()
                    self._held += part
        taken = bytes(self._held[:size])
        del self._held[:size]
        return taken

    def _death(self) -> _Died:
        assert self._process is not None
        code = self._process.wait()
        return _Died(f"more than {SECONDS} s of processor time" if code == -signal.SIGPROF else None)


def _samples(frame: bytes) -> Encoded:
    found, at = [], 1
    while at < len(frame):
        count = int.from_bytes(frame[at : at + 8], "little")
        at += 8
        ids = array("i", frame[at : at + 4 * count])
        at += 4 * count
        found.append((ids, frame[at : at + count]))
        at += count
    return Encoded(found)


class Crew:
    """Several processes that render and encode, each called by a thread of its own."""

    def __init__(self, count: int, tokenizer: str, control: Iterable[int]):
        self._all = [Renderer(tokenizer, control) for _ in range(count)]
        self._idle: SimpleQueue[Renderer] = SimpleQueue()
        self._name = f"crew-{id(self)}"
        self._threads = ThreadPoolExecutor(count, thread_name_prefix=self._name)
        for one in self._all:
            self._idle.put(one)

    def submit(self, work: Callable[[Renderer], T]) -> Future[T]:
        """Has `work` done with one of the processes."""
        return self._threads.submit(self._with_one, work)

    def _with_one(self, work: Callable[[Renderer], T]) -> T:
        one = self._idle.get()
        try:
            return work(one)
        finally:
            self._idle.put(one)

    def __enter__(self) -> Crew:
        try:
            for one in self._all:
                one.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        """Kills the processes, whatever they are at, and waits for the threads, which notice. A thread of theirs comes
        here when it happens to collect a generator that nobody closed: it cannot wait for itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for one in self._all:
            one.dismiss()
        if threading.current_thread().name.startswith(self._name):
            return
        self._threads.shutdown()
        for one in self._all:
            one.stop()


class _Died(Exception):
    """The process has ended, or must; `limit` says which limit that was, None for a death by something else."""

    def __init__(self, limit: str | None):
        super().__init__(limit)
        self.limit = limit


def _over(limit: str, place: int) -> TemplateLimitError:
    error = TemplateLimitError(
        f"the chat template went over a limit: {limit}",
        harm="It could hold up or exhaust the machine; usual templates need milliseconds.",
        hint="Look into the template that came with the model, or set chat.template to another one.",
    )
    error.place = place
    return error


def _inert(value: Any) -> Any:
    """What stands for a value that JSON does not know, as in transformers' own rendering: a scalar, or its type."""
    if hasattr(value, "item"):
        return value.item()
    return f"<{type(value).__name__}>"


_shared = Renderer()


def renderer() -> Renderer:
    """The one of this process."""
    return _shared


def _fresh() -> None:
    global _shared
    _shared = Renderer()


atexit.register(_shared.stop)
os.register_at_fork(after_in_child=_fresh)
