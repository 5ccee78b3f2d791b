"""What is written in another form is read back as the same sample, or is left out with the reason."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from fitout.chat.types import Conversation, Message, Origin, Pair, Text
from fitout.config import build
from fitout.data import SourceSettings
from fitout.data.formats import Refused, choose, convert
from fitout.data.readers import RawRow
from fitout.data.sources import probe, read
from fitout.data.writers import (
    Unwritable,
    as_alpaca,
    as_openai,
    as_openai_finetuning,
    as_sharegpt,
    openai_faults,
    openai_tokens,
)
from fitout.errors import RequestError
from fitout.verbs import export_data

HERE = Origin("f", 1)
USER, ANSWER = Message("user", "q"), Message("assistant", "a")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": [1, "é"]}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLING = Message("assistant", "", extra={"tool_calls": [CALL]})
PLAIN = Conversation((USER, ANSWER), HERE, (), {"task": "t"})
LONG = Conversation((Message("system", "s"), USER, ANSWER, Message("user", "q2"), Message("assistant", "a2")), HERE)
TOOLS = Conversation((USER, CALLING, Message("tool", "3"), ANSWER), HERE, (TOOL,))
HIDDEN = Conversation((USER, Message("assistant", "a", train=False), Message("user", "r"), ANSWER), HERE)
THINKING = Conversation((USER, Message("assistant", "a", extra={"reasoning_content": "why"})), HERE)
PAIR = Pair((USER,), ANSWER, Message("assistant", "b"), HERE, {"by": "x"})


def back(row):
    row = json.loads(json.dumps(row, ensure_ascii=False))
    return list(convert(choose([row]), RawRow(row, HERE)))


@pytest.mark.parametrize("sample", [PLAIN, LONG, TOOLS, HIDDEN, THINKING, PAIR, Text("once", HERE, {"by": "x"})])
def test_our_own_form_holds_everything(sample):
    assert back(as_openai(sample)) == [sample]


@pytest.mark.parametrize("sample", [PLAIN, LONG])
def test_alpaca_is_read_back(sample):
    assert back(as_alpaca(sample)) == [sample]


@pytest.mark.parametrize("sample", [PLAIN, LONG, TOOLS])
def test_sharegpt_is_read_back(sample):
    assert back(as_sharegpt(sample)) == [sample]


@pytest.mark.parametrize(
    ("write", "sample", "reason"),
    [
        (as_alpaca, TOOLS, "it has tools"),
        (as_alpaca, HIDDEN, "answers that are not to be trained"),
        (as_alpaca, PAIR, "a pair; Alpaca holds conversations"),
        (as_sharegpt, THINKING, "it has reasoning"),
        (as_sharegpt, HIDDEN, "answers that are not to be trained"),
        (as_openai_finetuning, THINKING, "reasoning_content"),
        (as_openai_finetuning, Text("x", HERE), "plain text"),
        (as_openai_finetuning, Conversation((USER, CALLING, ANSWER), HERE), "a tool call that is not answered"),
        (
            as_openai_finetuning,
            Conversation((USER, CALLING, Message("tool", "3"), Message("tool", "4"), ANSWER), HERE),
            "belongs to no call",
        ),
    ],
)
def test_what_a_form_cannot_say(write, sample, reason):
    with pytest.raises(Unwritable, match=reason):
        write(sample)


def test_openai_fine_tuning_lines():
    row = as_openai_finetuning(TOOLS)
    assert not openai_faults(row)
    call, answer = row["messages"][1], row["messages"][2]
    assert call["content"] is None and json.loads(call["tool_calls"][0]["function"]["arguments"]) == {"x": [1, "é"]}
    assert answer["tool_call_id"] == call["tool_calls"][0]["id"]
    assert as_openai_finetuning(HIDDEN)["messages"][1]["weight"] == 0
    assert set(as_openai_finetuning(PLAIN)) == {"messages"}
    assert [said.content for said in back(as_openai_finetuning(TOOLS))[0].messages] == ["q", "", "3", "a"]
    pair = as_openai_finetuning(PAIR)
    assert not openai_faults(pair) and pair["non_preferred_output"] == [{"role": "assistant", "content": "b"}]


def line(*messages, **extra):
    return {"messages": list(messages), **extra}


U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (line(), "no messages"),
        (line(U), "no assistant message"),
        (line(U, A, U), "the last message is not the assistant's"),
        (line(U, {**A, "weight": 0}), "weight 0"),
        (line(U, {**A, "weight": 2}), "not 0 or 1"),
        (line({**U, "weight": 1}, A), "not the assistant's"),
        (line({"role": "human", "content": "q"}, A), "the role 'human'"),
        (line({"role": "user", "content": ""}, A), "no content"),
        (line(U, {**A, "train": True}), "unknown keys ['train']"),
        (line({**U, "name": "a b"}, A), "the name 'a b'"),
        (line(U, A, task="t"), "unknown keys ['task']"),
        (line(U, A, tools=[{"type": "function", "function": {"name": "a.b"}}]), "the tool name 'a.b'"),
        (line(U, {"role": "tool", "content": "x"}, A), "without tool_call_id"),
        (line(U, {"role": "assistant", "content": None, "tool_calls": [CALL]}, A), "a call without an id"),
        ({"input": {"messages": [U]}, "preferred_output": [A], "non_preferred_output": []}, "`non_preferred_output`"),
    ],
)
def test_faults_openai_would_find(row, fault):
    assert any(fault in found for found in openai_faults(row))
    assert not openai_faults(line(U, A))


def test_openai_tokens_by_hand():
    words = lambda text: len(text.split())  # noqa: E731
    row = line({"role": "user", "content": "a b c", "name": "n"}, {"role": "assistant", "content": "d"})
    assert openai_tokens(row, words) == 3 + (3 + 1 + 1 + 3 + 1) + (3 + 1 + 1)


@pytest.fixture
def recipe(tmp_path):
    rows = [
        as_openai(Conversation((Message("user", f"What is {n}?"), Message("assistant", f"It is {n}.")), HERE))
        for n in range(40)
    ]
    rows += [{**as_openai(TOOLS), "note": {"deep": [1]}}, as_openai(HIDDEN), {**as_openai(PLAIN), "note": "flat"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build(
        {
            "name": "x",
            "data": {"sources": [{"path": str(path)}], "split": {"train": 0.8, "validation": 0.1, "test": 0.1}},
        }
    )


def read_all(folder, names):
    found = []
    for name in names:
        source = SourceSettings(path=str(folder / name))
        plug = choose(probe(source, folder))
        found += [part for row in read(source, folder) for part in convert(plug, row)]
    assert not any(isinstance(part, Refused) for part in found)
    return found


@pytest.mark.parametrize("form", ["openai", "alpaca", "sharegpt", "hf", "label-studio"])
def test_every_prepared_sample_is_written_or_left_out_with_a_reason(recipe, tmp_path, form):
    done = export_data(recipe, form, tmp_path / "out", price=2.0, out=tmp_path / "run")
    left = sum(done.left_out.values())
    assert sum(done.rows.values()) + left == 43
    assert left == {"openai": 0, "hf": 0, "alpaca": 2, "sharegpt": 1, "label-studio": 0}[form]
    assert all((tmp_path / "out" / name).exists() for name in done.files)
    if form == "openai":
        assert done.cost == pytest.approx(done.tokens["train"] * 2e-6)
    if form == "label-studio":
        tasks = json.loads((tmp_path / "out" / "train.json").read_text())
        assert all(set(task) == {"data", "predictions"} for task in tasks)
        return
    names = [name for name in done.files if name.startswith(("train", "validation", "test", "data/"))]
    asked = Counter(sample.messages[0].content for sample in read_all(tmp_path / "out", names))
    assert asked.total() == 43 - left
    with pytest.raises(RequestError, match="exists already"):
        export_data(recipe, form, tmp_path / "out", out=tmp_path / "run")


def test_a_hugging_face_folder_loads_with_datasets(recipe, tmp_path):
    datasets = pytest.importorskip("datasets")
    export_data(recipe, "hf", tmp_path / "out", out=tmp_path / "run")
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert sum(len(part) for part in loaded.values()) == 43 and set(loaded) == {"train", "validation", "test"}
    assert loaded["train"][0]["messages"][0]["role"] == "user"
