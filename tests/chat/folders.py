"""Tokenizer folders for these tests: the embedded shell's, grown by tokens, with a template of one's own."""

from __future__ import annotations

from pathlib import Path

from fitout.chat.render import Chat, open_chat
from fitout.chat.types import Conversation, Message, Origin
from fitout.model.load import SHELL

HERE = Origin("rows.jsonl", 1)
SPELLED = [
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<bos>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|observation|>",
    "[gMASK]",
    "<sop>",
]

TURNS = (
    Message("user", "Which way is north?"),
    Message("assistant", "That way."),
    Message("user", "und jetzt? 北在哪里？"),
    Message("assistant", "Up, naïvely 😀."),
)


def talk(*messages: Message, **more) -> Conversation:
    return Conversation(tuple(messages), HERE, **more)


def folder(
    path: Path,
    template: str | None,
    *,
    base: str | Path = SHELL,
    tokens=(),
    eos: str | None = None,
    bos: str | None = None,
) -> Path:
    """A tokenizer folder at `path`: that of `base` with special `tokens` added and another template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    if eos:
        tokenizer.add_special_tokens({"eos_token": eos})
    if bos:
        tokenizer.add_special_tokens({"bos_token": bos})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


def trained_text(chat: Chat, tokens) -> list[str]:
    """The text of each run of trained tokens."""
    runs: list[list[int]] = []
    before = False
    for id, on in zip(tokens.ids, tokens.train_on, strict=True):
        if on and not before:
            runs.append([])
        if on:
            runs[-1].append(id)
        before = on
    return [chat.tokenizer.decode(run, skip_special_tokens=False) for run in runs]


__all__ = ["HERE", "SPELLED", "TURNS", "Chat", "folder", "open_chat", "talk", "trained_text"]
