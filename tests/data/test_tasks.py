"""Tasks on two levels, weights and shares that are exact, balance, and key information where it is said to be."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fitout.chat.types import Conversation, Message, Origin
from fitout.data import BalanceSettings, DataSettings, SourceSettings, TaskSettings
from fitout.data.balance import cap_classes, distribute, give_shares, length_classes
from fitout.data.batches import Batches
from fitout.data.positions import measured, moved, place_of
from fitout.data.prepare import kept_samples, prepare
from fitout.data.taxonomy import NONE, Classifier, Tasks, parsed
from fitout.errors import DataError
from fitout.files import read_json
from fitout.rundir import RunDir

from .conftest import write


def made(tmp_path, chat, sources, **more):
    data = DataSettings.model_validate({"sources": sources, "max_length": 256, **more})
    run = RunDir(tmp_path / "run")
    prepared, report = prepare(data, chat, "conversation", run)
    return run, prepared, report


# tasks


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("reasoning / common sense", ("reasoning", "common sense")),
        ("reasoning/maths/algebra", ("reasoning", "maths/algebra")),
        ("chat", ("chat",)),
        (["reasoning", "maths"], ("reasoning", "maths")),
        ({"choices": ["reasoning / maths"]}, ("reasoning", "maths")),
        ({"taxonomy": [["reasoning", "maths"]]}, ("reasoning", "maths")),
        ([{"choices": ["chat"]}], ("chat",)),
        (3, ("3",)),
        (None, ()),
        ("  ", ()),
        (True, ()),
    ],
)
def test_what_a_column_says(value, label):
    assert parsed(value) == label


def talk(question, meta=None, file="f.jsonl"):
    return Conversation((Message("user", question), Message("assistant", "a")), Origin(file, 1), meta=meta or {})


def test_column_then_rules_then_none():
    tasks = Tasks(
        TaskSettings(
            field="labels.task",
            rules=[
                {"task": "maths / sums", "contains": ["how MANY"]},
                {"task": "code", "matches": r"\bdef \w+\("},
            ],
        )
    )
    assert tasks.read(talk("x", {"labels": {"task": "a / b"}}), "x") == ("a", "b")
    assert tasks.read(talk("x"), "How many apples") == ("maths", "sums")
    assert tasks.read(talk("x"), "explain def f(x)") == ("code",)
    assert tasks.read(talk("x"), "hello") == NONE
    assert tasks.came_from == {"column": 1, "rule": 2, "nothing": 1}
    two = Tasks(TaskSettings(field=["domain", "intent"]))
    assert two.read(talk("x", {"domain": "travel", "intent": "visa"}), "x") == ("travel", "visa")
    by_file = Tasks(TaskSettings(field="file"))
    assert by_file.read(talk("x", file="t0/ropes_prompt_beginning.jsonl"), "x") == ("ropes", "prompt_beginning")


def test_a_wrong_rule_is_refused():
    with pytest.raises(ValidationError, match="no regular expression"):
        TaskSettings(rules=[{"task": "a", "matches": "("}])
    with pytest.raises(ValidationError, match="needs `contains`"):
        TaskSettings(rules=[{"task": "a"}])


@pytest.fixture
def clinc(shared):
    rows = read_json(shared / "data" / "clinc150" / "data_full.json")
    domains = read_json(shared / "data" / "clinc150" / "domains.json")
    domain = {intent: name for name, intents in domains.items() for intent in intents}
    return [
        {"instruction": text, "output": intent, "domain": domain[intent]}
        for text, intent in rows["train"][::4]
        if intent in domain
    ]


def test_a_real_set_of_two_levels(tmp_path, chat, clinc):
    """CLINC150, every fourth row: 10 domains x 15 intents x 25 rows. Each part has its share of every domain."""
    rows = [{**row, "task": f"{row['domain']} / {row['output']}"} for row in clinc]
    path = write(tmp_path / "clinc.jsonl", rows)
    tasks = {"field": "task"}
    _, prepared, report = made(tmp_path, chat, [{"path": path}], tasks=tasks)
    grid = report["tasks"]["grid"]
    assert len(grid) == 150 and report["tasks"]["came_from"] == {"column": len(rows)}
    for name, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        by_domain: Counter = Counter()
        for line in grid:
            by_domain[line["task"]] += line[name]["samples"]
            assert abs(line[name]["samples"] - share * 25) <= 4, line
        for domain, count in by_domain.items():
            assert abs(count - share * 375) <= 5, (domain, count)
        assert sum(line[name]["tokens"] for line in grid) == report["parts"][name]["tokens"]
        assert sum(line[name]["supervised"] for line in grid) == report["parts"][name]["supervised"]
    numbers = Counter(prepared.part("train").table["task"].to_pylist())
    assert numbers == {line["number"]: line["train"]["rows"] for line in grid}


def test_a_classifier_that_knows_what_it_knows(clinc):
    """Trained on half of CLINC150's labels it is right about the other half where it is sure, and says how right."""
    domains = sorted({row["domain"] for row in clinc})
    truth = [domains.index(row["domain"]) for row in clinc]
    known = [label if at % 2 else -1 for at, label in enumerate(truth)]
    judge = Classifier(known, lambda at: clinc[at]["instruction"], len(clinc), len(domains))
    said = [(judge.suggest(clinc[at]["instruction"]), truth[at]) for at in range(0, len(clinc), 2)]
    sure = [(one, right) for one, right in said if one is not None]
    accuracy = sum(one == right for one, right in sure) / len(sure)
    assert len(sure) > 0.5 * len(said) and accuracy > 0.9
    assert abs(accuracy - judge.accuracy) < 0.05 and abs(len(sure) / len(said) - judge.coverage) < 0.1


def test_task_weights_and_caps(tmp_path, chat):
    rows = [
        {"instruction": f"say {n} {t}", "output": f"it is {n}", "task": t}
        for n in range(20)
        for t in ("a / x", "a / y", "b")
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    tasks = {"field": "task", "weights": {"b": 2}, "caps": {"a": 30, "a / x": 7}}
    _, prepared, report = made(
        tmp_path, chat, [{"path": path}], tasks=tasks, split={"train": 1, "validation": 0, "test": 0}
    )
    seen = {f"{line['task']} {line['subtask']}".strip(): line["train"] for line in report["tasks"]["grid"]}
    assert seen["b"]["samples"] == 20 and seen["b"]["rows"] == 40
    assert seen["a x"]["samples"] <= 7 and seen["a x"]["samples"] + seen["a y"]["samples"] <= 30
    assert report["removed"]["over the cap of its task"] == 60 - sum(report["kept"].values())
    assert len(prepared.part("train")) == sum(one["rows"] for one in seen.values())


def test_what_a_step_trains_is_told_by_task(tmp_path, chat):
    rows = [{"instruction": f"say {t} {n}", "output": "it is " * n, "task": t} for n in range(1, 16) for t in "abc"]
    path = write(tmp_path / "rows.jsonl", rows)
    for column, expected in (("task", {"a", "b", "c"}), (None, set())):
        folder = tmp_path / str(column)
        _, prepared, _ = made(folder, chat, [{"path": path}], tasks={"field": column},
                              split={"train": 1, "validation": 0, "test": 0})  # fmt: skip
        part = prepared.part("train")
        batches, told = Batches(part, batch_size=7), Counter()
        for step in range(batches.steps_in(1)):
            found = batches.tasks(step)
            assert sum(found.values()) == (part.lengths[batches.rows(step)].sum() if expected else 0)
            told.update(found)
        assert set(told) == expected
        for name, of_task in part.tasks.items() if expected else ():
            assert told[name] == sum(len(part.ids(row)) for row in of_task)


# shares


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(1, 60), min_size=2, max_size=4),
    st.lists(st.sampled_from([0.05, 0.1, 0.2, 0.25]), min_size=1, max_size=3),
)
def test_shares_are_exact(sizes, wanted):
    """Every shared source has its share of the whole to within one row, and the others keep what they have."""
    wanted = wanted[: len(sizes) - 1]
    source_of = [source for source, size in enumerate(sizes) for _ in range(size)]
    shares = dict(enumerate(wanted))
    times = give_shares(
        np.ones(len(source_of), np.int64), source_of, shares, [str(n) for n in range(len(source_of))], 0
    )
    of = np.array(source_of)
    others = sum(sizes[len(wanted) :])
    assert times[of >= len(wanted)].tolist() == [1] * others
    whole = others / (1 - sum(wanted))
    for source, share in shares.items():
        got = int(times[of == source].sum())
        assert got == max(1, round(whole * share))
        assert times[of == source].max() - times[of == source].min() <= 1


def test_rehearsal_is_a_tenth(tmp_path, chat):
    own = write(tmp_path / "own.jsonl", [{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(90)])
    general = write(tmp_path / "general.jsonl", [{"instruction": f"tell {n}", "output": f"so {n}"} for n in range(500)])
    sources = [{"path": own, "split": "train"}, {"path": general, "split": "train", "share": 0.1}]
    _, prepared, report = made(tmp_path, chat, sources)
    part = prepared.part("train")
    assert Counter(part.origin(row).file for row in range(len(part))) == {own: 90, general: 10}
    assert report["removed"] == {"left out by its source's share": 490}


@pytest.mark.parametrize("shares", [[0.5, 0.6, None], [0.5, 0.4]])
def test_shares_that_do_not_add_up_are_refused(shares):
    sources = [{"path": f"{n}.jsonl"} | ({"share": share} if share else {}) for n, share in enumerate(shares)]
    with pytest.raises(ValidationError, match="add up to"):
        DataSettings(sources=sources)


# balance


def test_balance_by_dropping_and_by_repeating():
    classes = ["a"] * 60 + ["b"] * 30 + ["c"] * 10 + ["other"] * 5
    names, ones = [str(n) for n in range(105)], np.ones(105, np.int64)

    def counts(times):
        found: Counter = Counter()
        for label, count in zip(classes, times, strict=True):
            found[label] += int(count)
        return dict(found)

    dropped = BalanceSettings(by="position", to={"a": 2, "b": 1, "c": 1})
    assert counts(distribute(ones, classes, dropped, names, 0)) == {"a": 20, "b": 10, "c": 10, "other": 5}
    repeated = BalanceSettings(by="position", to={"a": 1, "b": 1, "c": 1}, how="repeat")
    assert counts(distribute(ones, classes, repeated, names, 0)) == {"a": 40, "b": 40, "c": 40, "other": 5}
    gone = BalanceSettings(by="position", to={"a": 1, "b": 1, "c": 0})
    assert counts(distribute(ones, classes, gone, names, 0)) == {"a": 30, "b": 30, "c": 0, "other": 5}
    capped = cap_classes(ones, classes, {"a": 12}, names, 0)
    assert counts(capped) == {"a": 12, "b": 30, "c": 10, "other": 5}


def test_a_later_wish_counts_what_an_earlier_one_repeats():
    length = ["short"] * 20 + ["long"] * 5
    place = ["head"] * 10 + ["tail"] * 15
    names, ones = [str(n) for n in range(25)], np.ones(25, np.int64)

    def counts(classes, times):
        return {label: int(times[[one == label for one in classes]].sum()) for label in sorted(set(classes))}

    first = distribute(ones, length, BalanceSettings(by="length", to="equal", how="repeat"), names, 0)
    assert counts(length, first) == {"long": 20, "short": 20} and counts(place, first) == {"head": 10, "tail": 30}
    for how, each in (("repeat", 30), ("drop", 10)):
        second = distribute(first, place, BalanceSettings(by="position", to="equal", how=how), names, 0)
        assert counts(place, second) == {"head": each, "tail": each}
        kept = [second[at] / first[at] - (3 if place[at] == "head" else 1) for at in range(25)]
        assert how == "drop" or max(map(abs, kept)) == 0  # within a class the proportions stay
    for cap in (25, 19):
        capped = cap_classes(first, ["x"] * 5 + ["y"] * 20, {"x": cap, "y": cap}, names, 0)
        assert counts(["x"] * 5 + ["y"] * 20, capped) == {"x": 5, "y": cap}


@pytest.mark.parametrize(
    "tasks",
    [{"field": "nocolumn"}, {"field": "task", "weights": {"nosuch": 2}}, {"field": "task", "caps": {"nosuch": 1}}],
)
def test_what_names_no_task_is_told(tmp_path, chat, tasks):
    rows = [{"instruction": f"What is {n}?", "output": "ok", "task": "sums"} for n in range(20)]
    path = write(tmp_path / "rows.jsonl", rows)
    settings = DataSettings(sources=[{"path": path}], tasks=tasks)
    with pytest.raises(DataError, match="no sample has the (column 'nocolumn'|task 'nosuch')"):
        prepare(settings, chat, "conversation", RunDir(tmp_path / "run"))


def test_length_classes():
    classes, order = length_classes(np.array([1, 64, 65, 128, 129, 999]), [64, 128])
    assert classes == ["1-64", "1-64", "65-128", "65-128", "129-", "129-"] and order == ["1-64", "65-128", "129-"]


def test_balanced_lengths_and_capped_phrasings(tmp_path, chat):
    rows = [{"instruction": f"Translate the word w{n}", "output": "ok"} for n in range(60)]
    rows += [{"instruction": f"Tell me w{n}", "output": " ".join(["long"] * 40)} for n in range(20)]
    path = write(tmp_path / "rows.jsonl", rows)
    whole = {"train": 1, "validation": 0, "test": 0}
    balance = [{"by": "length", "to": "equal", "edges": [30]}]
    _, _, report = made(tmp_path, chat, [{"path": path}], balance=balance, split=whole)
    assert [one["after"] for one in report["balance"][0]["classes"]] == [20, 20]
    assert report["removed"] == {"balanced by length": 40}
    balance = [{"by": "phrasing", "cap": 0.25}]
    _, _, report = made(tmp_path, chat, [{"path": path}], balance=balance, split=whole)
    found = {one["class"]: (one["before"], one["after"]) for one in report["balance"][0]["classes"]}
    assert found["translate the word"] == (60, 20)


# positions


@pytest.mark.parametrize("name", ["quoref_Read_And_Extract_", "quoref_What_Is_The_Answer"])
def test_extractive_answers_are_where_they_stand(shared, name):
    """Quoref's answers are spans of the prompt: where one stands there exactly once, that is the place."""
    checked = 0
    places: Counter = Counter()
    for line in (shared / "data" / "t0" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answer = row["completion"].replace("<|endoftext|>", "").strip()
        prompt = row["prompt"]
        if len(answer) > 2 and prompt.casefold().count(answer.casefold()) == 1:
            at = prompt.casefold().index(answer.casefold()) + len(answer) / 2
            assert measured(prompt, answer) == ("head", "middle", "tail")[min(2, int(3 * at / len(prompt)))]
            checked += 1
        places[measured(prompt, answer)] += 1
    assert checked > 60 and min(places["head"], places["middle"], places["tail"]) > 10


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("ropes_plain_bottom_hint", "tail"),
        ("ropes_prompt_beginning", "tail"),
        ("ropes_plain_background_situation", "head"),
    ],
)
def test_a_marked_passage_is_where_the_template_puts_it(shared, name, place):
    """ROPES' background paragraph stands at the end in two templates and at the beginning in one."""
    found: Counter = Counter()
    passages = []
    bottom = (shared / "data" / "t0" / "ropes_plain_bottom_hint.jsonl").read_text(encoding="utf-8").splitlines()
    for line in bottom:
        passages.append(json.loads(line)["prompt"].partition("Hint: ")[2].strip())
    for line in (shared / "data" / "t0" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        prompt = json.loads(line)["prompt"]
        passage = next((one for one in passages if one and one in prompt), None)
        if passage:
            found[place_of(talk(prompt, {"key": passage}), "key")] += 1
    if found:
        assert found[place] >= 0.5 * found.total(), found
    else:
        pytest.skip("the two templates were made from different rows")


def test_a_column_may_say_the_place():
    assert place_of(talk("x", {"where": "middle"}), "where") == "middle"
    assert place_of(talk("x", {"where": "not in there"}), "where") == "none"
    assert place_of(talk("short question"), None) == "short"


def test_moving_the_key_passage_keeps_every_word():
    key = "The bridge was opened in 1931 by the mayor."
    others = [f"Paragraph {n} speaks of something else entirely, at some length." for n in range(6)]
    prompt = "\n\n".join([*others[:1], key, *others[1:], "When was the bridge opened?"])
    sample = talk(prompt, {"key": key})
    made = dict(moved(sample, "key"))
    assert set(made) == {"middle", "tail"}
    for place, other in made.items():
        text = other.messages[0].content
        assert sorted(text.split()) == sorted(prompt.split())
        assert place_of(other, "key") == place
        assert other.messages[1:] == sample.messages[1:]
    assert moved(talk(prompt, {"key": "absent"}), "key") == []
    assert moved(talk(prompt), "key") == []


def test_augmented_rows_are_for_training_only_and_counted(tmp_path, chat):
    rows = []
    for n in range(30):
        key = f"The code of room {n} is {n * 37 % 101}."
        filler = [f"Room {n} has window number {m} on its north side." for m in range(6)]
        rows.append({"instruction": "\n\n".join([key, *filler, f"What is the code of room {n}?"]),
                     "output": str(n * 37 % 101), "key": key})  # fmt: skip
    path = write(tmp_path / "rows.jsonl", rows)
    position = {"field": "key", "augment": True}
    run, _, report = made(tmp_path, chat, [{"path": path}], position=position, deduplicate=False)
    train = report["parts"]["train"]
    assert train["places"] == {"head": 24, "middle": 24, "tail": 24}
    assert report["parts"]["test"]["places"] == {"head": 3}
    assert report["samples"] == 30 + 48 and sum(report["kept"].values()) == 78
    [stage] = [stage for stage in report["stages"] if stage["name"] == "augment"]
    assert sum(stage["made"].values()) == 48
    assert len(list(kept_samples(run, "train"))) == 72


def test_a_position_that_does_not_exist_is_refused(tmp_path, chat):
    from fitout.errors import DataError

    path = write(tmp_path / "rows.jsonl", [{"instruction": f"say {n}", "output": "a"} for n in range(20)])
    with pytest.raises(DataError, match="no class 'top'"):
        made(tmp_path, chat, [{"path": path}], balance=[{"by": "position", "to": {"top": 1}}])
    assert SourceSettings(path="x").share is None
