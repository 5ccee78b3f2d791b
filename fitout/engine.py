"""GENERATE. One loaded model and its chat: answers in batches, answers as a stream, likelihoods of given answers.

Everything that talks to a model goes through here: evaluation, the terminal chat, the server. Prompts become ids in
`fitout.chat` only, so what is generated from is, id for id, what was trained.

A batch is left-padded, and a row leaves it when its answer ends; where the model's cache allows it, others join between
two tokens (Flight). Row by row the result is the one the row would have alone: padding is masked, positions start at
each row's own first token, and every row draws from its own random stream.
"""

from __future__ import annotations

import inspect
import math
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from .chat.types import Conversation, Message, Origin, Text
from .errors import CheckError, FitoutError, RequestError
from .files import fingerprint
from .model import rope
from .model.attention import UNLIKE
from .model.memory import available_memory, give_back, is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .chat.render import Chat

T = TypeVar("T")
Prompt = Conversation | Sequence[Message]
FinishReason = Literal["stop", "length", "cancelled"]

Reads = Literal["together", "alone", "anew"]
SLOW: dict[Reads, str | None] = {
    "together": None,
    "alone": "this model answers one prompt at a time: in a batch padding would change its answers",
    "anew": "this model reads the whole text again for each token: it does not go on from transformers' cache",
}
PREFILL = 1024  # tokens a row per forward while reading a prompt: bounds memory, and how long a cancel waits
LOGITS = 1 << 26  # entries of one logits tensor when scoring (256 MiB in fp32)
HALF = "\ufffd"  # what a decoder writes for bytes that are not a whole character


@dataclass(frozen=True)
class Completion:
    """An answer. `ids` are all generated ids, the end-of-turn id among them; `text` has neither it nor a stop string.

    `error` is None, or says why this row could not be generated at all (its text is empty then).
    """

    text: str
    ids: list[int]
    prompt_tokens: int
    finish_reason: FinishReason
    error: str | None = None


class Stream:
    """An answer in the making: iterate for pieces of text, or let a Flight make it beside others and `take` them.

    Pieces are whole characters. `completion` holds the whole answer once it has ended, `error` why there is none.
    """

    error: Exception | None = None
    lacked_memory = False  # alone, once

    def __init__(
        self,
        engine: Engine,
        prompt: list[int],
        answer: _Answer,
        sampler: _Sampler,
        number: int = 0,
        cancelled: Callable[[], bool] = lambda: False,
    ):
        """`number` is the sampler's random stream; `cancelled` is asked before every token."""
        self._engine, self._prompt, self._answer = engine, prompt, answer
        self._sampler, self._number, self._cancelled = sampler, number, cancelled
        self._taken = 0

    def __iter__(self) -> Iterator[str]:
        flight = Flight(self._engine, 1)
        flight.add(self)
        while flight.busy:
            flight.step()
            if piece := self.take():
                yield piece
        if self.error:
            raise self.error

    @property
    def prompt_tokens(self) -> int:
        return len(self._prompt)

    @property
    def completion(self) -> Completion | None:
        """The answer once it has ended, None before."""
        return self._answer.completion(self.prompt_tokens) if self._answer.finish_reason else None

    def fail(self, error: Exception) -> None:
        """Ends it with an error of its own."""
        self.error, self._answer.error, self._answer.finish_reason = error, str(error), "cancelled"

    def take(self) -> str:
        """The text that is settled since this was last asked."""
        text = self._answer.settled[self._taken :]
        self._taken += len(text)
        return text


class Engine:
    """A model in evaluation mode (attention "sdpa" or "eager") with the chat whose ids it was trained on."""

    def __init__(self, model: PreTrainedModel, chat: Chat):
        self.model = model
        self.chat = chat
        text_config = model.config.get_text_config(decoder=True)
        self.context: int | None = getattr(text_config, "max_position_embeddings", None)
        self._switch = rope.switch(text_config)
        self._vocabulary: int = text_config.vocab_size
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self._keeps_logits = "logits_to_keep" in inspect.signature(inner.forward).parameters
        self._reads: Reads = _how_to_read(self)
        self.slow: str | None = SLOW[self._reads]  # for people: why answers take longer than they might
        self.largest_batch: int | None = None if self._reads == "together" else 1  # rows; fewer once memory ran out

    @classmethod
    def open(
        cls,
        what: str | Path,
        *,
        adapter: str | Path | None = None,
        precision: str = "auto",
        trust_remote_code: bool = False,
    ) -> Engine:
        """Loads a run directory, a model folder, a hub id or `embedded:shell`, with an adapter over it if given.

        Raises ModelError when it cannot be loaded, TemplateError when its chat template does not render.
        """
        from .chat.render import open_chat
        from .model.load import open_model, resolve

        parts = resolve(what, adapter=adapter)
        model = open_model(what, adapter=adapter, precision=precision, trust_remote_code=trust_remote_code)
        return cls(model, open_chat(parts.chat_folder, trust_remote_code=trust_remote_code))

    def generate(
        self,
        conversations: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
        batch_size: int = 16,
        tools: Sequence[dict] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Answers every conversation, in the order given.

        A Conversation that ends in an assistant's turn is asked without that turn (it is the reference) and with its
        own tools; a bare sequence of messages is taken whole, with `tools`. `temperature` 0 is greedy. A prompt that
        fills the context gives a row with `error`, never a shortened prompt. `progress(done, total)` follows rows.

        Raises TemplateError when a text spells a control token, RequestError for settings out of range.
        """
        prompts = [self._prompt_ids(conversation, tools) for conversation in conversations]
        sampler = _Sampler(temperature, top_p, seed)
        return self._answer_all(prompts, self.chat.stop_ids, max_new_tokens, sampler, stop, batch_size, progress)

    def complete(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        batch_size: int = 16,
        stop: Sequence[str] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Greedy continuation of plain texts, without a template; ends at the end of document or of a turn."""
        rows = [self._text_ids(prompt) for prompt in prompts]
        return self._answer_all(
            rows, self._end_ids(), max_new_tokens, _Sampler(0.0, 1.0, None), stop, batch_size, progress
        )

    def stream(
        self,
        messages: Prompt,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
        tools: Sequence[dict] = (),
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Stream:
        """One answer, piece by piece. The prompt is checked here; generation runs as the Stream is iterated, or in a
        flight that it is given to.

        Pieces are whole characters, and no part of a stop string ever appears. `cancelled` is asked before every token.
        Raises RequestError when the prompt fills the context, TemplateError when a text spells a control token.
        """
        prompt = self._prompt_ids(messages, tools)
        if fault := self._fault(prompt):
            raise RequestError(
                fault,
                harm="A shortened prompt would be answered as if it were the whole one.",
                hint="Shorten the conversation.",
            )
        sampler = _Sampler(temperature, top_p, seed)
        answer = _Answer(self.chat.decode, self.chat.stop_ids, stop, self._room(prompt, max_new_tokens), watched=True)
        return Stream(self, prompt, answer, sampler, cancelled=cancelled)

    def flight(self, most: int) -> Flight:
        """For up to `most` answers at once, from `stream`; as many as the model can answer beside each other."""
        return Flight(self, most, joins=most > 1 and self.joins)

    @cached_property
    def joins(self) -> bool:
        """Whether rows that were read apart can go on together. Tried on two short ones."""
        return self._reads == "together" and self._switch is None and _joins(self)

    def choose(
        self,
        conversations: Sequence[Prompt],
        choices: Sequence[str] | Sequence[Sequence[str]],
        *,
        mean: bool = False,
        batch_size: int = 16,
        tools: Sequence[dict] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[float]]:
        """log p(choice as the whole answer | conversation), summed over its tokens and the end of the turn, or their
        `mean`.

        `choices` are the same for all conversations, or one list each; the result has their shape. What the choices of
        one conversation have in common (the prompt) is computed once. Raises RequestError when one does not fit.
        """
        shared = not choices or isinstance(choices[0], str)
        every: list[Sequence[str]] = [choices if shared else choices[row] for row in range(len(conversations))]  # type: ignore[misc]
        scores = []
        for row, (conversation, options) in enumerate(zip(conversations, every, strict=True)):
            each = self._choose(conversation, options, batch_size, tools, row)
            scores.append([math.fsum(one) / (len(one) if mean else 1) for one in each])
            if progress:
                progress(row + 1, len(conversations))
        return scores

    @torch.no_grad()
    def token_log_probs(self, texts: Sequence[str], max_length: int, *, batch_size: int = 16) -> list[list[float]]:
        """log p(token | the tokens before it) for every token of each text but its first.

        Long texts are read in windows of at most `max_length` tokens (and no more than the context), each beginning
        with the last token of the one before, so every token is scored exactly once: a text of n tokens gives n-1
        numbers.
        """
        width = min(max_length, self.context or max_length)
        if width < 2:
            raise RequestError(f"max_length {max_length} leaves nothing to predict", hint="Use at least 2.")
        texts_ids = [self._text_ids(text) for text in texts]
        windows = [
            (text, start, ids[start : start + width])
            for text, ids in enumerate(texts_ids)
            for start in range(0, max(len(ids) - 1, 0), width - 1)
        ]
        scores: list[list[float]] = [[0.0] * max(len(ids) - 1, 0) for ids in texts_ids]
        windows.sort(key=lambda window: len(window[2]))

        def read(chunk: list[tuple[int, int, list[int]]]) -> None:
            texts = [ids for _, _, ids in chunk]
            rows = self._score(_Rows(self, len(chunk), max(map(len, texts))), texts)
            for (text, start, ids), row in zip(chunk, rows, strict=True):
                scores[text][start : start + len(ids) - 1] = row

        self._in_batches(windows, batch_size, read, lambda window: len(window[2]))
        return scores

    # prompts

    def _prompt_ids(self, prompt: Prompt, tools: Sequence[dict]) -> list[int]:
        messages, tools = _question(prompt, tools)
        return self.chat.prompt_ids(messages, tools)

    def _text_ids(self, text: str) -> list[int]:
        """A plain text as pretraining spells it, but open at its end."""
        ids = list(self.chat.text_ids([Text(text, Origin("text", 1))])[0].ids)
        return ids[:-1] if ids and ids[-1] == self.chat.tokenizer.eos_token_id else ids

    def _end_ids(self) -> tuple[int, ...]:
        end = self.chat.tokenizer.eos_token_id
        return self.chat.stop_ids if end is None else (*self.chat.stop_ids, end)

    def _fault(self, prompt: list[int]) -> str | None:
        """Why a prompt cannot be answered, or None."""
        if not prompt:
            return "the prompt is empty: there is nothing to continue"
        if self.context is not None and len(prompt) >= self.context:
            return f"the prompt has {len(prompt)} tokens, the model's context holds {self.context} with the answer"
        return None

    def _room(self, prompt: list[int], max_new_tokens: int) -> int:
        """How many tokens may follow."""
        if max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {max_new_tokens}", hint="Use at least 1.")
        return max_new_tokens if self.context is None else min(max_new_tokens, self.context - len(prompt))

    # generating

    def _answer_all(
        self,
        prompts: list[list[int]],
        stop_ids: Sequence[int],
        max_new_tokens: int,
        sampler: _Sampler,
        stop: Sequence[str],
        batch_size: int,
        progress: Callable[[int, int], None] | None,
    ) -> list[Completion]:
        answers = [
            _Answer(self.chat.decode, stop_ids, stop, self._room(prompt, max_new_tokens), error=self._fault(prompt))
            for prompt in prompts
        ]

        def answer(chunk: list[int]) -> None:
            for row in chunk:  # anew when a larger batch did not fit: from each row's first token and random number
                answers[row].begin()
                sampler.begin(row)
            flight = Flight(self, len(chunk))
            streams = [Stream(self, prompts[row], answers[row], sampler, row) for row in chunk]
            flight.begin(streams)
            while flight.busy:
                flight.move()
            if failed := next((stream.error for stream in streams if stream.error), None):
                raise failed
            if progress:
                progress(sum(answer.finish_reason is not None for answer in answers), len(answers))

        todo = [row for row, answer in enumerate(answers) if answer.error is None]
        todo.sort(key=lambda row: -len(prompts[row]))  # longest first: a batch too large for memory fails at once
        self._in_batches(
            todo, batch_size, answer, lambda row: len(prompts[row]) + self._room(prompts[row], max_new_tokens)
        )
        return [answer.completion(len(prompt)) for answer, prompt in zip(answers, prompts, strict=True)]

    def _in_batches(
        self, items: list[T], size: int, work: Callable[[list[T]], None], tokens: Callable[[T], int]
    ) -> None:
        """Works through `items`, `size` at a time; when memory runs out, from then on half as many. One that may get
        more `tokens` than what its model turns alike (rope.switch) goes alone.

        Raises FitoutError when not even a single one fits.
        """
        at = 0
        while at < len(items):
            chunk = items[at : at + min(size, self.largest_batch or size)]
            if self._switch is not None:
                short = next((n for n, item in enumerate(chunk) if tokens(item) > self._switch), len(chunk))
                chunk = chunk[: max(short, 1)]
            try:
                work(chunk)
                at += len(chunk)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise  # the error goes before anything is tried again: its traceback holds what was computed
            give_back(self.model.device)
            if len(chunk) == 1:
                raise _too_large()
            self.largest_batch = len(chunk) // 2

    # scoring

    @torch.no_grad()
    def _choose(
        self, conversation: Prompt, options: Sequence[str], batch_size: int, tools: Sequence[dict], number: int
    ) -> list[list[float]]:
        """Of each option the log-probabilities of its tokens."""
        rendered = self._with_answers(conversation, options, tools)
        if longest := max((len(ids) for ids, _ in rendered if self.context and len(ids) > self.context), default=0):
            raise RequestError(
                f"conversation {number + 1} has {longest} tokens with an answer, the context holds {self.context}",
                harm="Its likelihood would be that of another text.",
                hint="Shorten or drop the conversation.",
            )
        scores: list[list[float]] = []

        def score(chunk: list[tuple[list[int], bytes | bytearray]]) -> None:
            # The prompt once, then the answers; the last token in common is fed to each, as it predicts what differs.
            common = min(_common([ids for ids, _ in chunk]), *(_first(trained) for _, trained in chunk)) - 1
            rows = _Rows(self, 1, max(len(ids) for ids, _ in chunk))
            for piece in torch.tensor([chunk[0][0][:common]]).split(PREFILL, dim=1) if common > 0 else ():
                rows.extend(piece, keep=1)
            rows.select([0] * len(chunk))
            common = max(common, 0)
            for (_, trained), row in zip(chunk, self._score(rows, [ids[common:] for ids, _ in chunk]), strict=True):
                scores.append([p for p, train in zip(row, trained[common + 1 :], strict=True) if train])

        self._in_batches(rendered, batch_size, score, lambda each: len(each[0]))
        return scores

    def _with_answers(
        self, prompt: Prompt, answers: Sequence[str], tools: Sequence[dict]
    ) -> list[tuple[list[int], bytes | bytearray]]:
        """The ids of a conversation with each answer, and which of them are the answer (and the end of its turn)."""
        messages, tools = _question(prompt, tools)
        asked = tuple(replace(message, train=False) for message in messages)
        origin = prompt.origin if isinstance(prompt, Conversation) else Origin("choose", 1)
        whole = [Conversation((*asked, Message("assistant", answer)), origin, tuple(tools)) for answer in answers]
        return [(list(tokens.ids), tokens.train_on) for (tokens,) in self.chat.render_many(whole)]

    def _score(self, rows: _Rows, continuations: list[list[int]]) -> list[list[float]]:
        """For each row, the log-probability of every id of its continuation after the first: (B, lengths - 1)."""
        longest = max(map(len, continuations))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in continuations])  # causal: the tail is not seen
        scores = []
        for piece, following in zip(
            *(part.split(max(1, LOGITS // (len(ids) * self._vocabulary)), dim=1) for part in (ids[:, :-1], ids[:, 1:])),
            strict=True,
        ):
            logits = rows.extend(piece, keep=piece.shape[1])
            chosen = logits.gather(-1, following.to(logits.device)[..., None])[..., 0]
            scores.append((chosen - logits.logsumexp(-1)).cpu())
        table = torch.cat(scores, dim=1).tolist() if longest > 1 else [[] for _ in continuations]
        return [row[: len(ids) - 1] for row, ids in zip(table, continuations, strict=True)]


@torch.no_grad()
def _how_to_read(engine: Engine) -> Reads:
    """How this model can be read in pieces so that each row is the row alone and whole: tried on two short ones."""
    model = engine.model
    if not hasattr(model, "_is_stateful"):  # no model of transformers
        return "together"
    texts, whole = _tried(engine)
    bound = UNLIKE.get(model.dtype, 0.1) * float(whole.abs().max())

    def gap(rows: list[int]) -> float:
        longest = max(len(texts[row]) for row in rows)
        read = _Rows(engine, [longest - len(texts[row]) for row in rows], 0)
        ids = torch.tensor([[0] * (longest - len(texts[row])) + texts[row] for row in rows])
        for piece in ids.split([longest - 4, 2, 1, 1], 1):
            found = read.extend(piece, keep=1)[:, -1]
        return float((found - whole[rows]).abs().max())

    for how, rows in (("together", [[0, 1]]), ("alone", [[0], [1]])):
        engine._reads = how  # type: ignore[assignment]
        try:
            if all(gap(each) <= bound for each in rows):
                return how  # type: ignore[return-value]
        except Exception as error:  # a cache of its own kind, or none
            if is_out_of_memory(error):
                raise
    return "anew"


@torch.no_grad()
def _joins(engine: Engine) -> bool:
    texts, whole = _tried(engine)
    try:
        first, second = (_Rows(engine, 1, len(ids)) for ids in texts)
        for rows, ids in zip((first, second), texts, strict=True):
            rows.extend(torch.tensor([ids[:-2]]), keep=1)
        first.join(second)
        for at in (-2, -1):
            found = first.extend(torch.tensor([[ids[at]] for ids in texts]), keep=1)[:, -1]
    except Exception as error:  # a cache of another kind
        if is_out_of_memory(error):
            raise
        return False
    return float((found - whole).abs().max()) <= UNLIKE.get(engine.model.dtype, 0.1) * float(whole.abs().max())


def _tried(engine: Engine) -> tuple[list[list[int]], torch.Tensor]:
    """Two short rows, and the logits (2, V) that a forward of each alone ends with."""
    model, v = engine.model, engine._vocabulary
    texts = [[(5 * n + 1) % v for n in range(9)], [(7 * n + 2) % v for n in range(5)]]
    ends = [model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1] for ids in texts]
    return texts, torch.stack(ends).float()


class Flight:
    """Answers that are made at once. One joins between two tokens, while the prompt of the next is read piece by piece,
    and leaves when it ends; the text of each is what it would be alone. Where a model's rows cannot join, one is
    answered after the other.

    When memory runs out, all are read again, half as many at a time until they are answered; one that does not fit by
    itself, and one whose logits are not numbers, ends with an error of its own.
    """

    def __init__(self, engine: Engine, most: int, *, joins: bool = False):
        self._engine, self._joins = engine, joins
        self._most = self._usual = min(most, engine.largest_batch or most)
        self._lacked: list[Stream] = []  # for which `_most` is less than usual
        self._waiting: deque[Stream] = deque()
        self._reading: _Reading | None = None
        self._live: list[Stream] = []
        self._rows: Any = None  # theirs

    @property
    def busy(self) -> bool:
        """Whether an answer has not ended."""
        return bool(self._waiting or self._reading or self._live)

    def add(self, stream: Stream) -> None:
        self._waiting.append(stream)

    def begin(self, streams: Sequence[Stream]) -> None:
        """Has the prompts of some read at once; nothing may be in work."""
        self._reading = _Reading(self._engine, streams)

    def step(self) -> None:
        """At most one token for every answer in work, and one piece of the next prompt."""
        try:
            self.move()
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise  # the error goes before anything is tried again: its traceback holds what was computed
        self._read_again()

    @torch.no_grad()
    def move(self) -> None:
        """`step`, which raises when memory runs out."""
        self._leave()
        if self._live:
            ids = torch.tensor([[stream._answer.ids[-1]] for stream in self._live])
            _pick(self._live, self._rows.extend(ids, keep=1)[:, -1])
        if self._reading is None and self._waiting and self._has_room():
            self._reading = _Reading(self._engine, [self._waiting[0]])
            self._waiting.popleft()
        if self._reading and (logits := self._reading.piece()) is not None and self._fits(self._reading.rows):
            self._join(self._reading)
            _pick(self._reading.streams, logits)
            self._reading = None
        self._leave(asking=False)

    def _has_room(self) -> bool:
        return not self._live or (len(self._live) < self._most and self._joins)

    def _fits(self, rows: _Rows) -> bool:
        """Whether there is memory for these beside those in work, all as long as the longest; a GPU says so itself."""
        if not self._live or self._engine.model.device.type == "cuda":
            return True
        longest = max(rows.seen, self._rows.seen)
        need = rows.bytes_a_token * longest * (len(self._live) + len(rows.pads))
        with suppress(OSError):  # a system that does not say
            return need + self._rows.bytes_a_token * self._rows.seen * len(self._live) < available_memory()
        return True

    def _join(self, read: _Reading) -> None:
        if self._live:
            self._rows.join(read.rows)
        else:
            self._rows = read.rows
        self._live += read.streams

    def _leave(self, *, asking: bool = True) -> None:
        """Takes out what has ended, or was cancelled where that is asked."""
        reading = self._reading.streams if self._reading else []
        for stream in (*self._live, *reading, *self._waiting) if asking else ():
            if stream.completion is None and stream._cancelled():
                stream._answer.end("cancelled")
        self._waiting = deque(stream for stream in self._waiting if stream._answer.finish_reason is None)
        self._lacked = [stream for stream in self._lacked if stream._answer.finish_reason is None]
        if not self._lacked:
            self._most = self._usual
        if reading and all(stream._answer.finish_reason for stream in reading):
            self._reading = None
        kept = [at for at, stream in enumerate(self._live) if stream._answer.finish_reason is None]
        if len(kept) < len(self._live):
            self._live = [self._live[at] for at in kept]
            if not kept:
                self._rows = None
            else:
                self._rows.select(kept)
                if self._joins:
                    self._rows.trim()

    def _read_again(self) -> None:
        """After memory ran out: what was in work waits again, its prompt with what it has said."""
        work = list(dict.fromkeys([*self._live, *(self._reading.streams if self._reading else ())]))
        self._live, self._reading, self._rows = [], None, None
        give_back(self._engine.model.device)
        if not work:
            work = [self._waiting.popleft()]  # whose reading did not even begin
        if len(work) == 1 and work[0].lacked_memory:
            work[0].fail(_too_large())
            return
        work[0].lacked_memory = len(work) == 1
        self._lacked, self._most = work, max(1, len(work) // 2)
        self._waiting.extendleft(reversed(work))


class _Reading:
    """Prompts that are being read: the pieces that are left, and the rows that they make."""

    def __init__(self, engine: Engine, streams: Sequence[Stream]):
        self.streams = list(streams)
        texts = [stream._prompt + stream._answer.ids for stream in streams]
        longest = max(map(len, texts))
        self.rows = _Rows(engine, [longest - len(text) for text in texts], longest)
        ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
        self._pieces = deque(ids.split(PREFILL, dim=1))
        self._logits: torch.Tensor | None = None

    def piece(self) -> torch.Tensor | None:
        """Reads the next piece; the logits (B, V) of what follows once all is read."""
        if self._pieces:
            self._logits = self.rows.extend(self._pieces.popleft(), keep=1)[:, -1]
        return None if self._pieces else self._logits


def _pick(streams: Sequence[Stream], logits: torch.Tensor) -> None:
    """The next token of each, from logits (B, V): in one go where they take the likeliest, or share a sampler."""
    groups: dict[Any, list[int]] = {}
    for at, stream in enumerate(streams):
        groups.setdefault(stream._sampler if stream._sampler.draws else None, []).append(at)
    for rows in groups.values():
        own = logits if len(rows) == len(streams) else logits[rows]
        try:
            tokens = streams[rows[0]]._sampler.pick(own, [streams[at]._number for at in rows])
        except CheckError as error:
            if len(rows) == 1:
                streams[rows[0]].fail(error)
            else:
                for at in rows:  # whose it is
                    _pick([streams[at]], logits[at : at + 1])
            continue
        for at, token in zip(rows, tokens, strict=True):
            try:
                streams[at]._answer.add(token)
            except Exception as error:  # of a tokenizer
                if is_out_of_memory(error):
                    raise
                streams[at].fail(error)


class _Rows:
    """Rows in flight: their key-value cache, and how many padding tokens stand before each.

    `length` tokens, and perhaps more, will be read of the longest row. Where the model turns positions otherwise in a
    long row (rope.switch; such a row is alone), keys are made as a single forward over all of it would make them: from
    the beginning where it is known to be long, else anew when it becomes so.
    """

    def __init__(self, engine: Engine, pads: int | list[int], length: int):
        self._engine = engine
        self._device = engine.model.device
        self._switch, self._reads = engine._switch, engine._reads
        self._long = self._switch is not None and length > self._switch
        self._read: list[torch.Tensor] = []  # what may have to be read anew
        self.pads = torch.tensor([0] * pads if isinstance(pads, int) else pads, device=self._device)
        self._begin()

    def _begin(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._engine.model.config)
        self.seen = 0  # tokens of the longest row, and so of all with their padding

    def extend(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        """Reads `ids` (B, T) after what was read before; the logits (B, keep, V) of the last `keep`, in fp32."""
        if self._reads == "anew":
            self._read.append(ids)
            whole = torch.cat(self._read, 1).to(self._device)
            return self._engine.model(input_ids=whole, use_cache=False).logits[:, -keep:].float()
        if self._switch is None:
            return self._forward(ids, keep)
        self._read.append(ids)
        if not self._long and len(ids) == 1 and self.seen + ids.shape[1] > self._switch:
            ids, self._long = torch.cat(self._read, 1), True
            self._begin()
        if not self._long or self.seen + ids.shape[1] > self._switch:
            return self._forward(ids, keep)
        beyond = torch.zeros(len(ids), 1, dtype=ids.dtype)  # a token at a place that makes it long, seen by none
        logits = self._forward(torch.cat([ids, beyond], 1), keep + 1, last=self._switch)[:, :-1]
        self._cache.crop(-1)
        self.seen -= 1
        return logits

    def _forward(self, ids: torch.Tensor, keep: int, last: int | None = None) -> torch.Tensor:
        """`last`: the position of the last token, where it is not the next one."""
        end = self.seen + ids.shape[1]
        places = torch.arange(end, device=self._device)
        positions = (places[self.seen :] - self.pads[:, None]).clamp(min=0)
        if last is not None:
            positions[:, -1] = last
        mask = (places >= self.pads[:, None]).long() if bool(self.pads.any()) else None
        logits = self._engine.model(
            input_ids=ids.to(self._device),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **({"logits_to_keep": keep} if self._engine._keeps_logits else {}),
        ).logits
        self.seen = end
        return logits[:, -keep:].float()

    @property
    def bytes_a_token(self) -> int:
        """What the cache takes for a token of one row."""
        layers: Any = self._cache.layers
        kept = [values for layer in layers for values in (layer.keys, layer.values)]
        return sum(values.nbytes // (len(values) * values.shape[-2]) for values in kept)

    def join(self, other: _Rows) -> None:
        """Goes on with another's rows after these; shorter ones are padded on the left. Raises TypeError for a cache
        that is more than keys and values of each token."""
        longest = max(self.seen, other.seen)
        layers: Any = zip(self._cache.layers, other._cache.layers, strict=True)
        for mine, its in layers:
            if type(mine).__name__ not in JOINED:
                raise TypeError(type(mine).__name__)
            width = max(mine.keys.shape[-2], its.keys.shape[-2])
            mine.keys = torch.cat([_wider(mine.keys, width), _wider(its.keys, width)])
            mine.values = torch.cat([_wider(mine.values, width), _wider(its.values, width)])
            if mine.is_sliding:
                mine.cumulative_length = longest
        self.pads = torch.cat([self.pads + longest - self.seen, other.pads + longest - other.seen])
        self.seen = longest

    def trim(self) -> None:
        """Drops what is padding in every row, as when the longest has left."""
        cut = int(self.pads.min())
        if cut == 0:
            return
        self.pads, self.seen = self.pads - cut, self.seen - cut
        every: Any = self._cache.layers
        for layer in every:
            layer.keys, layer.values = layer.keys[..., -self.seen :, :], layer.values[..., -self.seen :, :]
            if layer.is_sliding:
                layer.cumulative_length = self.seen

    def select(self, rows: list[int]) -> None:
        """Goes on with these rows, in this order; a row may be taken several times."""
        index: Any = torch.tensor(rows, device=self._device)
        self.pads = self.pads[index]
        if self._reads == "anew":
            self._read = [ids[index.cpu()] for ids in self._read]
        else:
            self._cache.reorder_cache(index)


JOINED = ("DynamicLayer", "DynamicSlidingWindowLayer")  # transformers' caches of keys and values, and nothing else


def _wider(values: torch.Tensor, width: int) -> torch.Tensor:
    """(B, H, T, D) with zeros before, to T = `width`; they are masked."""
    return torch.nn.functional.pad(values, (0, 0, width - values.shape[-2], 0))


class _Answer:
    """One answer growing token by token: when it ends, and which of its text is settled."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop_ids: Sequence[int],
        stop: Sequence[str],
        limit: int,
        *,
        watched: bool = False,
        error: str | None = None,
    ):
        if "" in stop:
            raise RequestError("a stop string is empty", hint="Leave it out.")
        self.error = error
        self._decode = decode
        self._stop_ids = frozenset(stop_ids)
        self._stop = tuple(stop)
        self._limit = limit
        self._watched = watched or bool(stop)  # otherwise the text is only read at the end
        self.begin()

    def begin(self) -> None:
        """As it was before the first token."""
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = "length" if self.error else None
        self.settled = ""

    def add(self, token: int) -> None:
        self.ids.append(token)
        if token in self._stop_ids:
            self.end("stop")
        elif self._watched and self._settle(whole=False):
            self.finish_reason = "stop"
        elif len(self.ids) == self._limit:
            self.end("length")

    def end(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        if self._settle(whole=True):
            self.finish_reason = "stop"

    def completion(self, prompt_tokens: int) -> Completion:
        return Completion(self.settled, self.ids, prompt_tokens, self.finish_reason or "cancelled", self.error)

    def _settle(self, whole: bool) -> bool:
        """Settles text up to what may still change; `whole` when nothing follows. True when a stop string is reached.

        What may change: bytes that are not a character yet, an ending that may become a stop string, and blanks, which
        are left out around an answer. What was settled once stays. An answer cut inside a character ends before it;
        `ids` has its bytes.
        """
        ended = bool(self.ids) and self.ids[-1] in self._stop_ids
        text = self._decode(self.ids[:-1] if ended else self.ids)
        if not ended:
            text = text.rstrip(HALF)
        # A decoder may spell earlier bytes anew when broken ones follow; only what is beyond the settled part counts.
        begin = len(text) - len(text.lstrip()) + len(self.settled) if self.settled else 0
        found = [at for stop in self._stop if (at := text.find(stop, begin)) >= 0]
        if found:
            text = text[: min(found)]
        elif not whole:
            text = text[: len(text) - _overlap(text[begin:], self._stop)]
        self.settled += text.strip()[len(self.settled) :]
        return bool(found)


class _Sampler:
    """Picks the next tokens: the likeliest at temperature 0, else from the nucleus (Holtzman et al. 2019, 1904.09751).

    Each row draws from a random stream keyed by the seed and the row's number, so its draws do not depend on the batch.
    """

    def __init__(self, temperature: float, top_p: float, seed: int | None):
        if not (math.isfinite(temperature) and temperature >= 0):
            raise RequestError(f"temperature is {temperature}", hint="Use 0 (greedy) or a positive number.")
        if not 0 < top_p <= 1:
            raise RequestError(f"top_p is {top_p}", hint="Use a number above 0, at most 1.")
        self._temperature = temperature
        self._top_p = top_p
        self._seed = secrets.randbits(63) if seed is None else seed
        self._streams: dict[int, torch.Generator] = {}

    @property
    def draws(self) -> bool:
        """Whether chance decides."""
        return self._temperature > 0

    def begin(self, stream: int) -> None:
        """Sets a random stream to its beginning."""
        self._streams.pop(stream, None)

    def pick(self, logits: torch.Tensor, streams: Sequence[int]) -> list[int]:
        """One token id for each row of `logits` (B, V)."""
        best, ids = logits.max(dim=-1)
        if bool(best.isnan().any()):
            raise CheckError(
                "the model's logits are not numbers (NaN)",
                harm="Any token picked from them would mean nothing.",
                hint="Check the weights (was the training stable?), or load with precision fp32.",
            )
        if self._temperature == 0:
            return ids.tolist()
        probabilities = ((logits - best[:, None]).double() / self._temperature).softmax(-1)
        order = None
        if self._top_p < 1:
            probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
        below = probabilities.cumsum(-1)
        # The nucleus: the likeliest tokens, as few as reach top_p; a token is in it when those before it do not.
        kept = (below - probabilities < self._top_p).sum(-1) if order is not None else torch.tensor([logits.shape[-1]])
        mass = below.gather(-1, (kept.to(below.device).expand(len(below)) - 1)[:, None])
        draw = torch.tensor([[self._draw(stream)] for stream in streams], dtype=torch.float64).to(below.device)
        place = torch.searchsorted(below, draw * mass, right=True)
        place = torch.minimum(place, torch.searchsorted(below, mass))  # never past the last token that has weight
        return (place if order is None else order.gather(-1, place))[:, 0].tolist()

    def _draw(self, stream: int) -> float:
        """The next number of a stream, in [0, 1)."""
        if stream not in self._streams:
            key = int(fingerprint("sample", self._seed, stream)[:15], 16)
            self._streams[stream] = torch.Generator().manual_seed(key)
        return torch.rand(1, generator=self._streams[stream], dtype=torch.float64).item()


def _too_large() -> FitoutError:
    return FitoutError(
        "memory ran out on a single prompt",
        harm="There is no answer to it.",
        hint="Use a shorter prompt, fewer new tokens, precision bf16, or a smaller model.",
    )


def _question(prompt: Prompt, tools: Sequence[dict]) -> tuple[Sequence[Message], Sequence[dict]]:
    """What is asked: the messages without the reference answer, and the tools."""
    if not isinstance(prompt, Conversation):
        return prompt, tools
    messages = prompt.messages
    return (messages[:-1] if messages and messages[-1].role == "assistant" else messages), prompt.tools


def _common(rows: list[list[int]]) -> int:
    """The length of the beginning that all rows have in common."""
    first, last = min(rows), max(rows)  # in lexicographic order, whatever these two share all share
    return next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _first(trained: bytes | bytearray) -> int:
    return trained.index(True) if True in trained else len(trained)


def _overlap(text: str, stop: Sequence[str]) -> int:
    """The length of the longest ending of `text` with which a stop string begins."""
    most = len(text)
    return max((n for word in stop for n in range(1, min(len(word), most + 1)) if text.endswith(word[:n])), default=0)
