"""What a sample says: its texts, its opening, and keys that are equal for equal content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from ..chat.types import Conversation, Message, Pair, Sample, Text
from .scripts import mostly_cjk


def normalised(text: str) -> str:
    """Runs of white space become one blank, none at the ends."""
    return " ".join(text.split())


def content_key(sample: Sample) -> bytes:
    """16 bytes, equal for samples that say the same: kind, roles, texts up to white space, tool calls, tools, what is
    trained. Where a sample came from and its meta do not count."""
    match sample:
        case Conversation():
            said: Any = [[_said(message) for message in sample.messages], sample.tools]
        case Pair():
            prompt = [_said(message) for message in sample.prompt]
            said = [prompt, _said(sample.chosen), _said(sample.rejected), sample.tools]
        case Text():
            said = normalised(sample.text)
    return digest(type(sample).__name__, said)


def prompt_key(sample: Sample) -> bytes:
    """16 bytes, equal for samples that begin with the same question: all turns before the first answer, up to case and
    white space. The system turn counts, since it may hold the document that is asked about."""
    match sample:
        case Conversation() | Pair():
            asked = [[message.role, normalised(message.content).casefold()] for message in opening(sample)]
        case Text():
            asked = [["text", normalised(sample.text).casefold()]]
    return digest("prompt", asked)


def opening(sample: Conversation | Pair) -> list[Message]:
    """The turns before the first answer."""
    messages = sample.messages if isinstance(sample, Conversation) else sample.prompt
    first = next((at for at, message in enumerate(messages) if message.role == "assistant"), len(messages))
    return list(messages[:first])


def phrasing(prompt: str, words: int = 3) -> str:
    """How a prompt begins: its first words, or twice as many characters of Chinese, Japanese or Korean."""
    text = " ".join(prompt[:400].split()).casefold()
    if mostly_cjk(text[:40]):
        return text[: 2 * words]
    return " ".join(text.split(" ")[:words])


def texts(sample: Sample) -> Iterator[str]:
    """Every text of a sample that can reach the model: contents, names, reasoning, tool calls and tools."""
    match sample:
        case Text():
            yield sample.text
        case Conversation():
            for message in sample.messages:
                yield from message_texts(message)
            yield from strings(list(sample.tools))
        case Pair():
            for message in (*sample.prompt, sample.chosen, sample.rejected):
                yield from message_texts(message)
            yield from strings(list(sample.tools))


def message_texts(message: Message) -> Iterator[str]:
    yield message.content
    if message.extra:
        yield from strings(message.extra)


def strings(value: Any) -> Iterator[str]:
    """All strings in a nested value, keys too. Rows nest at most `readers.MAX_DEPTH` levels."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield str(key)
            yield from strings(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from strings(child)


def digest(*parts: Any) -> bytes:
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _said(message: Message) -> list[Any]:
    trained = message.train if message.role == "assistant" else True
    return [message.role, normalised(message.content), message.extra, trained]
