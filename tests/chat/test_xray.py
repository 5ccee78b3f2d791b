"""The token view shows every token once, each in its kind, and its page is safe to open."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from fitout.chat.types import Message
from fitout.chat.xray import CONTEXT, CUT, TRAINED, Row, as_markup, page, pieces
from fitout.model.load import SHELL
from tests.chat.folders import TURNS, open_chat, talk


@pytest.fixture(scope="module")
def chat():
    return open_chat(SHELL)


def test_pieces_put_together_are_the_text(chat):
    [tokens] = chat.render(talk(*TURNS))
    runs = pieces(chat, tokens.ids, tokens.train_on)
    assert "".join(p.text for p in runs) == chat.tokenizer.decode(tokens.ids, skip_special_tokens=False)
    assert [i for p in runs for i in p.ids] == tokens.ids
    assert [p.kind for p in runs] == [CONTEXT, TRAINED, CONTEXT, TRAINED]
    assert [p.text.strip() for p in runs if p.kind == TRAINED] == [m.content + "<|endoftext|>" for m in TURNS[1::2]]


@pytest.mark.parametrize("limit", range(4, 40, 3))
def test_what_was_cut_is_shown_as_cut(chat, limit):
    [tokens] = chat.render(talk(*TURNS))
    ids, cut = tokens.ids[:limit], tokens.ids[limit:]
    runs = pieces(chat, ids, tokens.train_on[:limit], cut)
    kept = [i for p in runs if p.kind != CUT for i in p.ids]
    assert kept == ids and [i for p in runs if p.kind == CUT for i in p.ids] == cut
    whole = chat.tokenizer.decode(tokens.ids, skip_special_tokens=False)
    assert "".join(p.text for p in runs) == whole


def test_the_first_token_is_never_shown_as_trained(chat):
    ids = chat.tokenizer("abc def")["input_ids"]
    assert [p.kind for p in pieces(chat, ids, [1] * len(ids))][:2] == [CONTEXT, TRAINED]


def test_a_character_split_between_kinds_is_lost_from_neither(chat):
    """A character of several tokens, split at each place: every token keeps its kind, the text is whole."""
    ids = chat.tokenizer("a 😀 b")["input_ids"]
    text = chat.tokenizer.decode(ids)
    for at in range(1, len(ids)):
        runs = pieces(chat, ids, [i >= at for i in range(len(ids))])
        assert [i for p in runs for i in p.ids] == ids
        assert [len(p.ids) for p in runs] == [at, len(ids) - at]
        shown = "".join(p.text for p in runs)
        assert shown == text, (at, shown)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_escapes_what_it_shows(chat):
    nasty = '<script>alert("x")</script> & <img src=x onerror=y>'
    [tokens] = chat.render(talk(Message("user", nasty), Message("assistant", "</div>" + nasty)))
    row = Row(1, "<b>rows</b>.jsonl:1", pieces(chat, tokens.ids, tokens.train_on))
    html = page([row], {"<i>figure": "<u>1"})
    seen = Tags()
    seen.feed(html)
    names = {tag for tag, _ in seen.tags}
    assert not names & {"script", "img", "b", "i", "u"}
    assert "".join(seen.text).count(nasty) == 2 and "<b>rows</b>.jsonl:1" in "".join(seen.text)
    kinds = [a["class"] for tag, a in seen.tags if tag == "span"]
    assert kinds == ["trained", "context", "cut", CONTEXT, TRAINED]
    assert "http" not in html  # it stands alone


def test_markup_for_the_terminal_has_every_piece(chat):
    [tokens] = chat.render(talk(*TURNS))
    runs = pieces(chat, tokens.ids[:20], tokens.train_on[:20], tokens.ids[20:])
    marked = list(as_markup(Row(1, "x:1", runs)))
    assert [text for text, _ in marked] == [p.text for p in runs]
    assert "strike" in marked[-1][1] and len({style for _, style in marked}) == 3
