"""The rule by which llama.cpp splits text is chosen by trying, and a tokenizer that no rule fits is refused."""

from __future__ import annotations

import json

import pytest

from fitout.chat import ChatSettings
from fitout.chat.render import SAMPLE, open_chat
from fitout.errors import ModelError
from fitout.export import gguf_vocab
from fitout.export.gguf_vocab import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, describe
from fitout.model.load import SHELL


def test_the_embedded_tokenizer():
    chat = open_chat(SHELL, ChatSettings(template="chatml", add_tokens=True))
    vocabulary = describe(chat, 2950, ["某国的首都是哪里？"])
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", "refact")  # digits apart, as in the embedded tokenizer
    assert vocabulary.types[0] == CONTROL and vocabulary.types[5] == NORMAL
    assert vocabulary.tokens[2944:] == ["<|im_end|>", "<|im_start|>", *(f"[PAD{i}]" for i in range(2946, 2950))]
    assert vocabulary.types[2944:] == [CONTROL] * 2 + [UNUSED] * 4
    assert not vocabulary.add_bos and "all 16 texts" in vocabulary.notes[0]
    assert len(vocabulary.merges) == len(json.loads(chat.tokenizer.backend_tokenizer.to_str())["model"]["merges"])


def test_fewer_rows_than_tokens_are_refused():
    with pytest.raises(ModelError, match="only 2000 rows"):
        describe(open_chat(SHELL), 2000)


def test_one_differing_text_refuses(monkeypatch):
    """The run's own texts decide too."""
    monkeypatch.setattr(gguf_vocab, "RULES", {"gpt-2": gguf_vocab.RULES["gpt-2"]})
    real = gguf_vocab._ids
    monkeypatch.setattr(gguf_vocab, "_ids", lambda engine, text: [1] if text == "mine" else real(engine, text))
    describe(open_chat(SHELL), 2944, ["yours"])
    with pytest.raises(ModelError, match="differs on 1 of 16 texts"):
        describe(open_chat(SHELL), 2944, ["mine"])


def test_a_real_tokenizer_is_told_apart(shared):
    """minimind splits as GPT-2 does, and every other rule gives other ids on common text."""
    chat = open_chat(shared / "data" / "tokenizers" / "minimind")
    assert describe(chat, len(chat.tokenizer)).pre == "gpt-2"
    backend = json.loads(chat.tokenizer.backend_tokenizer.to_str())
    for name in gguf_vocab.RULES.keys() - {"gpt-2"}:
        engine = gguf_vocab._byte_level(backend, name)
        assert gguf_vocab._differences(chat, lambda t, e=engine: gguf_vocab._ids(e, t), gguf_vocab.COMMON)


def test_sentencepiece(shared):
    chat = open_chat(shared / "models" / "stories260K")
    vocabulary = describe(chat, 512, ["Once upon a time 从前"])
    assert (vocabulary.model, vocabulary.pre, vocabulary.space_prefix) == ("llama", "default", True)
    assert [vocabulary.types[i] for i in (0, 1, 2, 3, 300)] == [UNKNOWN, CONTROL, CONTROL, BYTE, NORMAL]
    assert vocabulary.add_bos and chat.prompt_ids(SAMPLE[:1])[0] == 1


def test_a_tokenizer_that_changes_text_is_refused(shared):
    """babyllama's collapses blanks, which no GGUF rule does."""
    with pytest.raises(ModelError, match="split text differently"):
        describe(open_chat(shared / "models" / "babyllama"), 105)
