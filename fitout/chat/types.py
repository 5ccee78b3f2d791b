"""What is said: parts, messages, conversations, pairs; and what they become: tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Part:
    """A piece of a message that is not plain text (an image, say): its type and a path or value."""

    type: str
    value: str


@dataclass(frozen=True)
class Message:
    """One turn. `train` says whether an assistant turn is supervised; it has no effect on other roles.

    `extra` carries what a template may read besides role and content: `tool_calls`, `name`, `reasoning_content`.
    """

    role: str
    content: str
    train: bool = True
    parts: tuple[Part, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The form chat templates take: role, content and the extras."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True)
class Origin:
    """Where a sample came from: file, line (or row number, from 1) and sub-row when one row gives several samples."""

    file: str
    line: int
    part: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f"#{self.part}" if self.part else "")


@dataclass(frozen=True)
class Conversation:
    """A sample for supervised fine-tuning: messages in order, the last of them the assistant's.

    `meta` keeps the row's other columns that later stages read (task, sub-task, language, choices).
    """

    messages: tuple[Message, ...]
    origin: Origin
    tools: tuple[dict, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Text:
    """A sample for pretraining: plain text, every token of which is trained."""

    text: str
    origin: Origin
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """A preference: the same prompt with a better and a worse answer."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    origin: Origin
    meta: dict[str, Any] = field(default_factory=dict)
    tools: tuple[dict, ...] = ()

    @property
    def answered(self) -> tuple[Conversation, Conversation]:
        """The prompt with the chosen and with the rejected answer, which alone is trained in each."""
        asked = tuple(replace(message, train=False) for message in self.prompt)
        chosen, rejected = (
            Conversation((*asked, replace(answer, train=True)), self.origin, self.tools, self.meta)
            for answer in (self.chosen, self.rejected)
        )
        return chosen, rejected


Sample = Conversation | Text | Pair


@dataclass(frozen=True)
class Tokens:
    """A rendered sample: token ids and, for each, 1 where it is trained (predicted from what stands before it), else 0.

    `cut` are the ids that came after them and were left out because the sample was too long.
    """

    ids: Sequence[int]
    train_on: bytes | bytearray
    origin: Origin
    cut: Sequence[int] = ()

    @property
    def supervised(self) -> int:
        """How many tokens are trained; the first token of a sample has nothing before it and cannot be."""
        return self.train_on.count(1, 1)
