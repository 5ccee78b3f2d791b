"""Exact de-duplication against comparing every sample with every other."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fitout.chat.types import Conversation, Message, Origin, Pair, Text
from fitout.data import SourceSettings
from fitout.data.content import content_key
from fitout.data.dedupe import exact, repeats
from fitout.data.formats import choose
from fitout.data.sources import read

WORDS = st.sampled_from(["a", "b", "a b", "a  b", " a\nb ", "A"])


@st.composite
def sample_lists(draw):
    samples = []
    for line in range(draw(st.integers(0, 12))):
        origin = Origin(draw(st.sampled_from(["x", "y"])), line)
        kind = draw(st.sampled_from(["talk", "text", "pair"]))
        question, answer, other = draw(WORDS), draw(WORDS), draw(WORDS)
        user, said = Message("user", question), Message("assistant", answer, train=draw(st.booleans()))
        if kind == "talk":
            tools = draw(st.sampled_from([(), ({"function": {"name": "f"}},)]))
            samples.append(Conversation((user, said), origin, tools, meta={"line": line}))
        elif kind == "text":
            samples.append(Text(question, origin))
        else:
            samples.append(Pair((user,), said, Message("assistant", other), origin))
    return samples


def squeeze(text):
    return " ".join(text.split())


def same(one, two):
    """Field by field, white space aside."""
    if type(one) is not type(two):
        return False
    if isinstance(one, Text):
        return squeeze(one.text) == squeeze(two.text)

    def flat(sample):
        if isinstance(sample, Pair):
            return [*sample.prompt, sample.chosen, sample.rejected]
        return list(sample.messages)

    if isinstance(one, Conversation) and one.tools != two.tools:
        return False
    pairs = list(zip(flat(one), flat(two), strict=True))
    return all(a.role == b.role and squeeze(a.content) == squeeze(b.content) and a.train == b.train for a, b in pairs)


@settings(deadline=None, max_examples=200)
@given(sample_lists())
def test_equals_comparing_all_with_all(samples):
    kept, dropped = exact(samples)
    slow = [one for at, one in enumerate(samples) if not any(same(one, before) for before in samples[:at])]
    assert kept == slow
    assert len(kept) + len(dropped) == len(samples)
    for sample, reason in dropped:
        twin = next(one for one in samples if same(one, sample))
        assert reason == f"repeats {twin.origin}"


@settings(deadline=None, max_examples=100)
@given(sample_lists())
def test_each_has_its_turn(samples):
    """Of twins in a test file and elsewhere, the one in the test file stays."""
    keys = np.array([content_key(sample) for sample in samples], "S16")
    turn = np.array([len(samples) - at // 2 if sample.origin.file == "y" else 99 for at, sample in enumerate(samples)])
    stays = repeats(keys, turn)
    for at, sample in enumerate(samples):
        twins = [number for number, one in enumerate(samples) if same(one, sample)]
        assert stays[at] == min(twins, key=lambda number: (turn[number], number))


def test_roles_and_tool_calls_count():
    origin = Origin("f", 1)

    def talk(**extra):
        return Conversation((Message("user", "q"), Message("assistant", "", extra=extra)), origin)

    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    other = {"type": "function", "function": {"name": "f", "arguments": {"x": 2}}}
    kept, dropped = exact([talk(tool_calls=[call]), talk(tool_calls=[other]), talk(tool_calls=[call])])
    assert (len(kept), len(dropped)) == (2, 1)


def test_real_duplicates(shared):
    """GPTeacher's code set and the CodeAlpaca set that was made from it hold the same answers."""
    samples = []
    for path in ("gpteacher/codegen-instruct.json", "codealpaca/new_codealpaca.json"):
        rows = list(read(SourceSettings(path=path), shared / "data"))
        plug = choose([row.row for row in rows[:50]])
        samples += [sample for row in rows for sample in plug.convert(row.row, row.origin)]
    kept, dropped = exact(samples)
    truth = {tuple((m.role, squeeze(m.content)) for m in sample.messages) for sample in samples}
    assert len(kept) == len(truth) and len(dropped) == len(samples) - len(truth)
    assert dropped[0][1].startswith("repeats gpteacher/codegen-instruct.json:")
