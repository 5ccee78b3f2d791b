"""Samples as rows of other forms: what `data pull` and `data export` write. Each form is read back by its format."""

from __future__ import annotations

from typing import Any

from ..chat.types import Conversation, Message, Pair, Sample, Text


def as_openai(sample: Sample) -> dict[str, Any]:
    """`messages` with everything a sample has; pairs as {prompt, chosen, rejected}, plain text as {text}.

    The rest of the row (task labels, ratings, ...) stands beside them and comes back as the sample's meta.
    """
    match sample:
        case Conversation():
            row: dict[str, Any] = {"messages": [said(message) for message in sample.messages]}
            if sample.tools:
                row["tools"] = list(sample.tools)
        case Pair():
            row = {
                "prompt": [said(message) for message in sample.prompt],
                "chosen": [said(sample.chosen)],
                "rejected": [said(sample.rejected)],
            }
        case Text():
            row = {"text": sample.text}
    return row | {key: value for key, value in sample.meta.items() if key not in row}


def said(message: Message) -> dict[str, Any]:
    """A message as a row has it; `train: false` where an assistant's turn is context only."""
    hidden = message.role == "assistant" and not message.train
    return message.as_dict() | ({"train": False} if hidden else {})
