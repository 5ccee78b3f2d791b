"""Edits of single samples: end markers that a tool left in the text are stripped, spelled control tokens are told."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from ..chat.types import Conversation, Message, Pair, Sample
from .content import texts

#: Markers that mean "the text ends here" in some tokenizer and nothing else anywhere.
END_MARKERS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|end|>")

#: The same, but also ordinary text (HTML); stripped only when the tokenizer at hand has them.
END_MARKERS_IF_CONTROL = ("</s>", "<eos>", "<end_of_turn>")


def control_tokens(sample: Sample, control: Sequence[str]) -> str | None:
    """Why a sample cannot be trained on with a tokenizer that has the `control` tokens: its text spells one.

    Encoded, such text would become the token itself and could end or begin a turn. None when it spells none.
    """
    pattern = _pattern(tuple(control))
    if pattern is None:
        return None
    for text in texts(sample):
        found = pattern.search(text)
        if found:
            return f"the text spells the control token {found[0]}"
    return None


def strip_end_markers(sample: Sample, control: Sequence[str] = ()) -> tuple[Sample, bool]:
    """The sample without literal end markers at the very end of its answers or text, and whether there were any.

    An answer that is nothing but markers keeps them: stripping would leave it empty.
    """
    markers = (*END_MARKERS, *(marker for marker in END_MARKERS_IF_CONTROL if marker in control))

    def of(message: Message) -> Message:
        if message.role != "assistant":
            return message
        stripped = _stripped(message.content, markers)
        return message if stripped == message.content else replace(message, content=stripped)

    cleaned: Sample
    if isinstance(sample, Conversation):
        cleaned = replace(sample, messages=tuple(of(message) for message in sample.messages))
    elif isinstance(sample, Pair):
        cleaned = replace(
            sample,
            prompt=tuple(of(message) for message in sample.prompt),
            chosen=of(sample.chosen),
            rejected=of(sample.rejected),
        )
    else:
        cleaned = replace(sample, text=_stripped(sample.text, markers))
    return (cleaned, True) if cleaned != sample else (sample, False)


def only_markers(sample: Sample) -> str | None:
    """Why a sample is bad whose answer is nothing but an end marker; None for all others."""
    if isinstance(sample, Conversation):
        answers = [message.content for message in sample.messages if message.role == "assistant"]
    elif isinstance(sample, Pair):
        answers = [sample.chosen.content, sample.rejected.content]
    else:
        answers = [sample.text]
    return "the answer is only an end marker" if any(answer.strip() in END_MARKERS for answer in answers) else None


def _stripped(text: str, markers: Sequence[str]) -> str:
    left = text
    while True:
        bare = left.rstrip()
        marker = next((marker for marker in markers if bare.endswith(marker)), None)
        if marker is None:
            return left if left.strip() else text
        left = bare[: -len(marker)]


@lru_cache(maxsize=8)
def _pattern(control: tuple[str, ...]) -> re.Pattern[str] | None:
    """One pattern for all tokens, the longest first; None when there are none."""
    spelled = sorted({token for token in control if token}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, spelled))) if spelled else None
