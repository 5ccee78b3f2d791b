"""Preference pairs on their way to the store: both answers rendered as conversations are, none parted, all counted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fitout.chat.render import open_chat
from fitout.chat.types import Conversation, Message, Origin, Pair
from fitout.data import DataSettings
from fitout.data.prepare import prepare, summary
from fitout.data.prepare import test_samples as held_out
from fitout.errors import DataError
from fitout.files import read_jsonl
from fitout.model.load import SHELL
from fitout.rundir import RunDir

WANTS = "preference pair"


def pair(number: int, **other) -> dict:
    return {"prompt": f"What is number {number}?", "chosen": f"It is {number}.", "rejected": "No idea at all.", **other}


def made(tmp_path, chat, rows, wants=WANTS, **settings):
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSettings.model_validate({"sources": [{"path": str(path)}], "max_length": 64, **settings})
    run = RunDir(tmp_path / "run")
    return run, *prepare(data, chat, wants, run)


def conversation(*said: str) -> Conversation:
    roles = ("user", "assistant") * len(said)
    messages = tuple(Message(role, text) for role, text in zip(roles, said, strict=False))
    return Conversation(messages, Origin("x", 1))


def test_everything_is_counted_and_rendered_as_a_conversation_is(tmp_path, chat):
    rows = [
        *(pair(n) for n in range(30)),
        pair(3),  # a duplicate
        pair(3, rejected="Another bad answer."),  # a pair of its own
        pair(40, rejected=""),
        pair(41, rejected="It is 41."),  # nothing to prefer
        pair(42, chosen="a<|endoftext|>b"),
        pair(43, rejected="word " * 100),
        pair(44, rejected="It is 44. "),  # the same once it is rendered
    ]
    run, prepared, report = made(tmp_path, chat, rows, split={"train": 0.8, "validation": 0.1, "test": 0.1})
    assert report["removed"] == {"duplicate": 1, "too long": 1}
    assert report["quarantined"] == {"control token": 1, "empty answer": 1, "not a sample": 1, "nothing to train": 1}
    kept = report["kept"]
    assert sum(kept.values()) == 31 and summary(report).startswith("37 samples = 31 kept")
    seen = set()
    for name in ("train", "validation", "test"):
        part = prepared.part(name)
        assert len(part) == 2 * kept[name] == 2 * len(set(part.groups.tolist()))
        assert part.rejected.tolist() == [False, True] * kept[name]
        said = [json.loads(line) for line in (run.data / f"{name}.jsonl").read_text().splitlines()]
        for at, row in enumerate(said):
            prompt = row["prompt"][0]["content"]
            for of, answer in ((2 * at, row["chosen"]), (2 * at + 1, row["rejected"])):
                [tokens] = chat.render(conversation(prompt, answer["content"]))
                assert part.ids(of).tolist() == list(tokens.ids)
                assert part.train_on(of).tobytes() == bytes(tokens.train_on)
            seen.add((prompt, row["rejected"]["content"]))
    assert len(seen) == 31
    assert all(isinstance(sample, Pair) for sample in held_out(run)) and len(held_out(run)) == kept["test"]


def test_earlier_answers_of_the_prompt_are_context(tmp_path, chat):
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    row = {"prompt": asked, "chosen": "good", "rejected": "bad"}
    _, prepared, _ = made(tmp_path, chat, [row], split={"train": 1, "validation": 0, "test": 0})
    part = prepared.part("train")
    [alone] = chat.render(conversation("c", "good"))
    assert int(part.train_on(0)[1:].sum()) == alone.supervised


def test_a_cut_that_leaves_the_same_is_quarantined(tmp_path, chat):
    same = "the same words again and again, " * 4
    rows = [pair(1, chosen=same + "yes", rejected=same + "no"), pair(2)]
    _, _, report = made(
        tmp_path, chat, rows, too_long="truncate", max_length=48, split={"train": 1, "validation": 0, "test": 0}
    )
    assert report["kept"]["train"] == 1
    [reason] = report["reasons"]["nothing to train"]
    assert reason == "the chosen and the rejected answer are the same tokens after the cut"


def test_pairs_that_contradict_each_other_are_told(tmp_path, chat):
    other = pair(3, chosen=pair(3)["rejected"], rejected=pair(3)["chosen"])
    _, _, report = made(tmp_path, chat, [*(pair(n) for n in range(9)), other])
    assert report["contradictions"] == 2 and any("2 pairs prefer what another" in note for note in report["notes"])
    assert sum(report["kept"].values()) == 10


def test_a_weight_gives_whole_pairs(tmp_path, chat):
    path = tmp_path / "heavy.jsonl"
    path.write_text("".join(json.dumps(pair(n)) + "\n" for n in range(10)))
    data = DataSettings.model_validate(
        {"sources": [{"path": str(path), "weight": 2.5}], "split": {"train": 1, "validation": 0, "test": 0}}
    )
    prepared, report = prepare(data, chat, WANTS, RunDir(tmp_path / "run"))
    part = prepared.part("train")
    assert part.rejected.tolist() == [False, True] * 25 and report["parts"]["train"]["samples"] == 25
    groups, counts = np.unique(part.groups, return_counts=True)
    assert len(groups) == 25 and set(counts.tolist()) == {2}


def test_tools_are_seen_by_both_answers(tmp_path, chat):
    tool = {"name": "look", "description": "", "parameters": {"type": "object", "properties": {}}}
    _, _, report = made(tmp_path, chat, [pair(n, tools=[tool]) for n in range(3)], split={"train": 1, "validation": 0,
                                                                                        "test": 0})  # fmt: skip
    assert report["unwritten"] == {"tools": 3}  # this template has no place for them, and says so


def test_tool_calls_are_answers_where_the_template_writes_them(tmp_path):
    """And in the prompt they are context, whether it does or not."""

    def calling(name):
        function = {"name": name, "arguments": "{}"}
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}

    asked, told = {"role": "user", "content": "Rain?"}, {"role": "tool", "content": "no"}
    answer = {"chosen": {"role": "assistant", "content": "No."}, "rejected": {"role": "assistant", "content": "Yes."}}
    rows = [
        {"messages": [asked], "chosen": calling("weather"), "rejected": calling("clock")},
        {"messages": [asked, calling("weather"), told], **answer},
    ]
    split = {"train": 1, "validation": 0, "test": 0}
    calls = "{% for c in m.get('tool_calls', []) %}[{{ c['function']['name'] }}]{% endfor %}"
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}CALLS"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    silent, other = open_chat(SHELL), open_chat(SHELL)
    silent.tokenizer.chat_template = template.replace("CALLS", "")
    other.tokenizer.chat_template = template.replace("CALLS", calls)
    _, _, report = made(tmp_path / "unwritten", silent, rows, split=split)
    assert report["kept"]["train"] == 1 and report["unwritten"] == {"tool calls": 2}
    [reason] = report["reasons"]["template"]
    assert reason.startswith("chosen: turn 2: an answer of tool calls alone")

    _, prepared, report = made(tmp_path / "written", other, rows, split=split)
    assert report["kept"]["train"] == 2 and "unwritten" not in report
    part = prepared.part("train")
    said = [other.tokenizer.decode(part.ids(row)[part.train_on(row).astype(bool)]) for row in range(len(part))]
    assert sum("[weather]" in text for text in said) == sum("[clock]" in text for text in said) == 1


def test_a_reason_names_the_answer(tmp_path, chat):
    _, _, report = made(tmp_path, chat, [*(pair(n) for n in range(9)), pair(20, chosen=""), pair(30, rejected=" ")])
    assert set(report["reasons"]["empty answer"]) == {
        "chosen: turn 2: the answer is empty", "rejected: turn 2: the answer is empty",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "wants", "says"),
    [
        (pair(1), "conversation", "objective: {kind: orpo}"),
        ({"prompt": "a", "completion": "b"}, WANTS, "objective: {kind: sft}"),
        ({"text": "words"}, WANTS, "objective: {kind: pretrain}"),
    ],
)
def test_another_kind_of_sample_is_refused_with_the_objective_for_it(tmp_path, chat, row, wants, says):
    with pytest.raises(DataError) as caught:
        made(tmp_path, chat, [row] * 3, wants)
    assert says in caught.value.hint


def test_halfway_and_again_are_the_same(tmp_path, chat):
    run, _, report = made(tmp_path, chat, [pair(n) for n in range(20)])
    before = (run.data / "train.arrow").read_bytes()
    again = made(tmp_path, chat, [pair(n) for n in range(20)])
    assert again[2] == report and (run.data / "train.arrow").read_bytes() == before
    assert read_jsonl(run.data / "train.jsonl")[0]["tools"] == []
