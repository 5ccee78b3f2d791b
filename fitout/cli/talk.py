"""A chat in the terminal: one conversation with one engine, the answer appearing as it is made.

From a keyboard it prompts, colours, and takes commands. From a pipe it reads one question a line and prints one answer
for each, without a prompt or an escape code. Both remember the conversation until /reset.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

from rich.console import Console

from ..chat.types import Message
from ..errors import FitoutError, RequestError

if TYPE_CHECKING:
    from ..engine import Engine

HELP = """/reset forgets the conversation, /system TEXT sets the system message (alone: removes it), /quit leaves.
Ctrl-C stops an answer, Ctrl-D leaves."""


def talk(engine: Engine, *, system: str | None, max_new_tokens: int, temperature: float = 0.0, console: Console) -> int:
    """Talks until /quit or the end of the input. Returns the exit code: 1 when a piped line got no answer, else 0."""
    conversation = _Conversation(engine, system, max_new_tokens, temperature)
    if sys.stdin.isatty():
        console.print(HELP, style="dim", highlight=False)
        for line in _typed_lines(console):
            if line == "/quit":
                break
            _respond(line, conversation, console, notes=console, stoppable=True)
        return 0
    notes = Console(stderr=True)  # standard output has the answers and nothing else
    unanswered = 0
    for line in sys.stdin:
        if line.strip() == "/quit":
            break
        unanswered += not _respond(line.strip(), conversation, console, notes=notes, stoppable=False)
    return 1 if unanswered else 0


class _Conversation:
    """What was said so far."""

    def __init__(self, engine: Engine, system: str | None, max_new_tokens: int, temperature: float):
        self._engine = engine
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self.system = system
        self.turns: list[Message] = []

    def ask(self, text: str) -> Generator[str, None, None]:
        """The answer's pieces. The turn is remembered with what was said of it, also when it is stopped half-way;
        when nothing was said at all (an error, an early stop) the question is forgotten too."""
        head = [Message("system", self.system)] if self.system else []
        question = Message("user", text)
        said = ""
        try:
            for piece in self._engine.stream(
                [*head, *self.turns, question], max_new_tokens=self._max_new_tokens, temperature=self._temperature
            ):
                said += piece
                yield piece
        finally:
            if said:
                self.turns += [question, Message("assistant", said)]


def _respond(line: str, conversation: _Conversation, console: Console, *, notes: Console, stoppable: bool) -> bool:
    """Does what a line asks; False when it could not."""
    word, _, rest = line.partition(" ")
    if word == "/system":
        conversation.system = rest.strip() or None
    if word in ("/system", "/reset"):
        conversation.turns.clear()
        system = f" The system message: {conversation.system}" if conversation.system else ""
        notes.print(f"A new conversation.{system}", style="dim", markup=False, highlight=False)
        return True
    if line.startswith("/"):
        notes.print(f"{word} is not a command.\n{HELP}", style="red", markup=False, highlight=False)
        return False
    return not line or _answer(line, conversation, console, notes, stoppable)


def _answer(text: str, conversation: _Conversation, console: Console, notes: Console, stoppable: bool) -> bool:
    """Prints the answer as it comes; False when there was an error instead."""
    pieces = conversation.ask(text)
    try:
        for piece in pieces:
            console.print(_harmless(piece), end="", markup=False, highlight=False, emoji=False, soft_wrap=True)
    except KeyboardInterrupt:
        pieces.close()
        if not stoppable:
            raise
        console.print(" [stopped]", style="dim", end="", markup=False)
    except FitoutError as error:
        hint = "Type /reset to begin a new conversation." if isinstance(error, RequestError) else ""
        notes.print("\n".join([*error.lines(), hint]).strip(), style="red", markup=False, highlight=False)
        return False
    console.print()
    return True


def _typed_lines(console: Console) -> Iterator[str]:
    """Lines from a keyboard. Ctrl-C drops the line being typed; Ctrl-D ends."""
    while True:
        try:
            yield console.input("[bold green]you>[/] ").strip()
        except KeyboardInterrupt:
            console.print("\nCtrl-D or /quit leaves.", style="dim", highlight=False)
        except EOFError:
            console.print()
            return


def _harmless(text: str) -> str:
    """Without control characters: a model's text must not be able to command the terminal."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))
