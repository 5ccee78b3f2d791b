"""What annotation tools and published sets really write.

`exports/label_studio` was written by Label Studio 1.23.2 itself: its own templates, one task annotated by its API, and
one left alone, exported in three forms.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from fitout.chat.types import Conversation, Message, Origin, Pair
from fitout.data import SourceSettings
from fitout.data.formats import FORMATS, Refused, choose, convert
from fitout.data.sources import RawRow, probe, read

EXPORTS = Path(__file__).parent / "exports"
PLUG = {plug.name: plug for plug in FORMATS}


def parts(path, format=None, columns=None):
    """(format, samples, refused) of a file, as preparing makes them."""
    source = SourceSettings(path=path.name, columns=columns)
    plug = choose(probe(source, path.parent), format, columns)
    rows = list(read(source, path.parent))
    assert all(isinstance(row, RawRow) for row in rows)
    found = [part for row in rows for part in convert(plug, row, columns)]
    origins = [part.origin for part in found]
    assert len(set(origins)) == len(origins)
    refused = [part for part in found if isinstance(part, Refused)]
    return plug.name, [part for part in found if not isinstance(part, Refused)], refused


def of_row(name, row, columns=None):
    return list(convert(PLUG[name], RawRow(row, Origin("f", 1)), columns))


def said(sample):
    if isinstance(sample, Pair):
        return [message.content for message in sample.prompt], sample.chosen.content, sample.rejected.content
    return [(message.role, message.content) for message in sample.messages]


def asked(question, answer):
    return [("user", question), ("assistant", answer)]


ENTITIES = '[{"text": "Lane", "label": "PER"}, {"text": "Pipit Ltd", "label": "ORG"}]'
PEOPLE = '[{"text": "Rhea Moss", "label": "Person"}, {"text": "Pipit Ltd", "label": "Organization"}]'
RELATED = (
    '{"entities": ' + PEOPLE + ', "relations": [{"from": "Pipit Ltd", "to": "Rhea Moss", "type": "org:founded_by"}]}'
)
BIRD = ["Name a wading bird."]
DIALOGUE = [("user", "Is breakfast included?"), ("assistant", "Yes."), ("user", "From when?")]
LABEL_STUDIO = {
    "classification": [asked("The tap drips again.", "Negative")],
    "entities": [asked("Ada 🎉 Lane founded Pipit Ltd in Oban.", ENTITIES)],
    "question_answering": [asked("The bridge was built in 1911 by masons.\n\nWhen was it built?", "1911")],
    "summary": [asked("It rained for a week. The river rose. The fair was put off.", "Rain put off the fair.")],
    "taxonomy": [asked("opossum", "Eukarya / Oppossum")],
    "dialogue": [[*DIALOGUE, ("assistant", "From seven until ten.")]],
    "slots": [asked("Guest: A table for two at eight.\nDesk: Done.", '[{"text": "two", "label": "Quantity"}]')],
    "pairwise": [(BIRD, "A heron.", "A robin.")],
    "ranking": [
        (BIRD, "A heron, for one.", "A heron."),
        (BIRD, "A heron, for one.", "A robin."),
        (BIRD, "A heron.", "A robin."),
    ],
}


@pytest.mark.parametrize("form", ["json", "min.json", "csv"])
@pytest.mark.parametrize("task", LABEL_STUDIO)
def test_label_studio_writes_the_same_in_three_forms(task, form):
    name, samples, refused = parts(EXPORTS / "label_studio" / f"{task}.{form}")
    assert name == ("label_studio" if form == "json" else "label_studio_min")
    assert [said(sample) for sample in samples] == LABEL_STUDIO[task]
    assert not refused  # a JSON export of one annotated project has the annotated tasks only
    for sample in samples:
        assert sample.meta["annotator"] == "1" and sample.meta["seconds"] == 2.5
        assert sample.meta["annotated_at"].startswith("2026-11-28T")
    if task == "slots":
        assert samples[0].meta["intent"] == "Customer request"


def test_label_studio_relations_are_in_its_json_alone():
    folder = EXPORTS / "label_studio"
    assert said(parts(folder / "relations.json")[1][0])[1][1] == RELATED
    assert said(parts(folder / "relations.min.json")[1][0])[1][1] == PEOPLE


def test_label_studio_rows_without_an_answer_say_so():
    folder = EXPORTS / "label_studio"
    for name, reason in (
        ("grading.json", "only a rating; there is no answer to train on"),
        ("grading.min.json", "only a rating; there is no answer to train on"),
        ("ranking_buckets.json", "a ranking into 2 groups; the export does not say which group is better"),
        ("instructions.csv", "no column holds what was annotated; say `columns: {answer: NAME}`"),
    ):
        _, samples, refused = parts(folder / name)
        assert not samples and [one.reason for one in refused] == [reason]
    _, samples, _ = parts(folder / "instructions.csv", columns={"answer": "instruction"})
    assert said(samples[0]) == asked("Write one word.", "Rain.")


def task(*annotations, **data):
    listed = [
        {"completed_by": who, "created_at": f"2026-01-0{n}", "result": results, **extra}
        for n, (who, results, extra) in enumerate(annotations, 1)
    ]
    return {"id": 7, "data": data, "annotations": listed}


def chose(label, name="kind"):
    return {"type": "choices", "from_name": name, "value": {"choices": [label]}}


def wrote(text, name="answer"):
    return {"type": "textarea", "from_name": name, "value": {"text": [text]}}


def test_of_several_annotators_the_majority_is_taken_and_a_tie_told():
    row = task((1, [chose("a")], {}), (2, [chose("b")], {}), ({"id": 3}, [chose("b")], {}), text="t")
    (sample,) = of_row("label_studio", row)
    assert said(sample) == asked("t", "b") and sample.meta["annotations"] == 3 and sample.meta["annotator"] == "2"
    (refused,) = of_row("label_studio", task((1, [chose("a")], {}), (2, [chose("b")], {}), text="t"))
    assert refused.reason == "a tie in `kind`: 'a' and 'b', 1 each"
    (refused,) = of_row("label_studio", task((1, [chose("a")], {"was_cancelled": True}), text="t"))
    assert refused.reason == "the task has no annotation"


def test_answer_labels_and_ratings_of_one_annotation():
    tree = {"type": "taxonomy", "from_name": "task", "value": {"taxonomy": [["logical reasoning", "common sense"]]}}
    stars = {"type": "rating", "from_name": "quality", "value": {"rating": 4}}
    row = task((1, [wrote("w"), tree, stars, chose("x", "tone")], {}), prompt="p", context="c", topic="weather")
    (sample,) = of_row("label_studio", row)
    assert said(sample) == asked("p\n\nc", "w")
    assert {key: sample.meta[key] for key in ("task", "subtask", "rating", "tone", "topic", "task_id")} == {
        "task": "logical reasoning",
        "subtask": "common sense",
        "rating": 4.0,
        "tone": "x",
        "topic": "weather",
        "task_id": 7,
    }
    two = of_row("label_studio", task((1, [{**wrote("w"), "value": {"text": ["w", " "]}}], {}), prompt="p"))
    assert said(two[0]) == asked("p", "w") and two[0].origin.part == 1
    assert two[1] == Refused(Origin("f", 1, 2), "turn 2: the answer is empty", " ")


def test_a_mark_that_lies_elsewhere_than_it_says():
    def marked(start, end, text):
        value = {"start": start, "end": end, "text": text, "labels": ["X"]}
        row = task((1, [{"type": "labels", "from_name": "l", "value": value}], {}), text="🎉 a heron")
        return of_row("label_studio", row)[0]

    assert isinstance(marked(4, 9, "heron"), Conversation)
    assert isinstance(marked(5, 10, "heron"), Conversation)  # counted as a browser does
    assert "where the text says something else" in marked(0, 5, "heron").reason
    assert "without its text" in marked(50, 60, None).reason


def test_addresses_of_annotators_are_not_taken_along():
    row = task(({"id": 5, "email": "a@b.test"}, [wrote("w")], {}), prompt="p")
    assert "@" not in json.dumps(of_row("label_studio", row)[0].meta)
    flat = {"prompt": "p", "id": 1, "answer": "w", "annotator": "a@b.test", "annotation_id": 2, "lead_time": 1.0}
    (sample,) = of_row("label_studio_min", flat)
    assert said(sample) == asked("p", "w") and sample.meta["annotator"].startswith("annotator-")


# --- Doccano -----------------------------------------------------------------------------------------------------


def test_doccano_forms():
    pieces = [[0, 2, "ORG"], [11, 17, "MISC"]]
    text = "EU rejects German call"
    answer = '[{"text": "EU", "label": "ORG"}, {"text": "German", "label": "MISC"}]'
    row = {"id": 1, "text": text, "label": pieces, "Comments": []}
    assert choose([row]).name == "doccano"
    (sample,) = of_row("doccano", row)
    assert said(sample) == asked(text, answer) and sample.meta == {"id": 1}
    assert said(of_row("doccano", {"text": text, "label": json.dumps(pieces)})[0]) == asked(text, answer)
    assert said(of_row("doccano", {"text": text, "entities": []})[0]) == asked(text, "[]")
    (sample,) = of_row("doccano", {"text": text, "entities": [[0, 2, "ORG"]], "cats": ["news"]})
    assert said(sample)[1][1] == '{"intent": "news", "entities": [{"text": "EU", "label": "ORG"}]}'


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "ab", "label": [[0, 3, "X"]]}, "the label 'X' is at 0-3 of a text of 2 characters"),
        ({"text": "ab", "label": [[1, 1, "X"]]}, "the label 'X' is at 1-1"),
        ({"text": "ab", "label": [["0", 1, "X"]]}, "a label without start, end and name"),
        ({"text": "ab", "label": [[0, 1]]}, "a label is a list, not [start, end, name]"),
        ({"text": "ab", "label": []}, "nobody has labelled it"),
        ({"text": "ab", "label": ["x", "y"]}, "2 labels; say `format: doccano_labels`"),
        ({"text": " ", "label": ["x"]}, "turn 1: the user says nothing"),
        ({"text": "ab", "entities": [], "relations": [{"from_id": 1, "to_id": 2, "type": "t"}]}, "not marked"),
        ({"filename": "cat.png", "label": ["cat"]}, "labels of a picture or a recording (cat.png)"),
    ],
)
def test_bad_doccano_rows(row, reason):
    (refused,) = of_row("doccano", row)
    assert reason in refused.reason


def test_several_doccano_labels_are_what_is_named():
    row = {"text": "t", "label": ["x", "y"]}
    assert said(of_row("doccano_labels", row)[0]) == asked("t", "x, y")
    assert [said(sample) for sample in of_row("doccano_answers", row)] == [asked("t", "x"), asked("t", "y")]
    assert "format: doccano_answers" in of_row("prompt_completion", row)[0].reason


def test_fasttext_lines():
    row = {"text": "__label__a one two\n\n__label__a __label__b three\nfour\n"}
    assert choose([row]).name == "fasttext"
    first, second, third = of_row("fasttext", row)
    assert said(first) == asked("one two", "a") and said(second) == asked("three", "a, b")
    assert second.origin == Origin("f", 3) and third == Refused(Origin("f", 4), "not `__label__NAME text`", "four")


# --- trees and published sets ------------------------------------------------------------------------------------


def node(text, role, *replies, **extra):
    return {"text": text, "role": role, "replies": list(replies), **extra}


def test_every_answer_of_a_tree_is_trained_once():
    tree = node(
        "q",
        "prompter",
        node("a0", "assistant", node("q1", "prompter", node("b", "assistant")), node("q2", "prompter"), rank=0),
        node("a1", "assistant", rank=1),
        node("a2", "assistant", rank=2, deleted=True),
    )
    row = {"message_tree_id": "t", "prompt": tree}
    assert choose([row]).name == "oasst"
    found = of_row("oasst", row)
    talks = [part for part in found if isinstance(part, Conversation)]
    assert [[message.content for message in talk.messages] for talk in talks] == [["q", "a0", "q1", "b"], ["q", "a1"]]
    trained = [
        (message.content, message.train) for talk in talks for message in talk.messages if message.role != "user"
    ]
    assert trained == [("a0", True), ("b", True), ("a1", True)]
    assert Counter(part.reason for part in found if isinstance(part, Refused)) == {
        "nobody has answered this turn": 1,
        "a message that was deleted or did not pass review": 1,
    }
    longer = node("q", "prompter", node("a", "assistant", *[node(x, "prompter", node("b", "assistant")) for x in "xy"]))
    first, second = of_row("oasst", {"prompt": longer})
    assert [message.train for message in first.messages] == [True] * 4
    assert [message.train for message in second.messages if message.role == "assistant"] == [False, True]


def test_a_shared_answer_is_trained_in_the_shortest_branch():
    """Which of the branches is too long is known later; the shortest one is left out last."""
    ends = [node("x", "prompter", node("long " * 50, "assistant")), node("y", "prompter", node("b", "assistant"))]
    long, short = of_row("oasst", {"prompt": node("q", "prompter", node("a", "assistant", *ends))})
    assert [message.train for message in long.messages if message.role == "assistant"] == [False, True]
    assert [message.train for message in short.messages if message.role == "assistant"] == [True, True]


@pytest.mark.parametrize("bad", ["question", "answer"])
def test_an_answer_that_only_bad_ones_follow_ends_its_branch(bad):
    answer = node("a1", "assistant", deleted=bad == "answer")
    tree = node("q", "prompter", node("a0", "assistant", node("q1", "prompter", answer, deleted=bad == "question")))
    talk, *refused = sorted(of_row("oasst", {"prompt": tree}), key=lambda one: isinstance(one, Refused))
    assert [message.content for message in talk.messages] == ["q", "a0"] and talk.messages[1].train
    assert [one.reason for one in refused] == ["a message that was deleted or did not pass review"]


def test_rankings_of_a_tree_are_pairs():
    answers = [node(f"a{rank}", "assistant", rank=rank) for rank in (2, 0, 1)]
    pairs = of_row("oasst_pairs", {"prompt": node("q", "prompter", *answers, node("x", "assistant"))})
    assert [said(pair) for pair in pairs] == [
        (["q"], "a0", "a1"),
        (["q"], "a0", "a2"),
        (["q"], "a1", "a2"),
    ]
    assert pairs[0].meta == {"ranks": [0, 1]} and [pair.origin.part for pair in pairs] == [1, 2, 3]


def test_clinc_crosswoz_and_solutions():
    found = of_row("clinc150", {"train": [["hi", "greeting"], ["x"]], "test": [["bye", "goodbye"]]})
    assert said(found[0]) == asked("hi", "greeting") and found[0].meta == {"part": "train", "intent": "greeting"}
    assert isinstance(found[1], Refused) and found[2].origin.part == 3
    turns = [{"role": "usr", "content": "u"}, {"role": "sys", "content": "s"}]
    good, bad = of_row("crosswoz", {"1": {"messages": turns, "goal": []}, "2": {"messages": turns[:1], "goal": []}})
    assert said(good) == asked("u", "s") and good.meta == {"id": "1"} and "nothing answers it" in bad.reason
    row = {"question": "1+1", "ground_truth": "2", "m": {"solution": "3", "is_correct": False}}
    assert choose([row]).name == "gsm8k_solutions"
    assert [said(pair) for pair in of_row("gsm8k_solutions", row)] == [(["1+1"], "2", "3")]


@pytest.mark.parametrize(
    ("file", "format", "kinds"),
    [
        ("clinc150/data_full.json", "clinc150", {Conversation: 23_700}),
        ("belle/eval_set.json", "prompt_completion", {Conversation: 631, "turn 2: the answer is empty": 369}),
        ("crosswoz/val.json.zip", "crosswoz", {Conversation: 500}),
        ("alpaca_seed/seed_tasks.jsonl", "alpaca", {Conversation: 175}),
        ("t0/ag_news_classify.jsonl", "prompt_completion", {Conversation: 200}),
        ("label_studio/test_export_json_min/chat_data.json", "label_studio", {Conversation: 1}),
    ],
)
def test_real_files(shared, file, format, kinds):
    name, samples, refused = parts(shared / "data" / file)
    assert name == format
    counted = Counter(type(sample) for sample in samples) + Counter(one.reason for one in refused)
    assert dict(counted) == kinds


def test_real_trees_count_as_a_walk_over_their_json_does(shared):
    answers = pairs = unanswered = last = 0

    def walk(message):
        nonlocal answers, pairs, unanswered, last
        children = message["replies"]
        if message["role"] == "assistant":
            answers += 1
            last += not any(question["replies"] for question in children)
        else:
            unanswered += not children
            ranked = sum("rank" in child for child in children)
            pairs += ranked * (ranked - 1) // 2
        for child in children:
            walk(child)

    path = shared / "data" / "oasst" / "en_100_tree.jsonl"
    for line in path.read_text().splitlines():
        walk(json.loads(line)["prompt"])
    _, talks, refused = parts(path)
    assert (len(talks), len(refused)) == (last, unanswered)
    trained = [m for talk in talks for m in talk.messages if m.role == "assistant" and m.train]
    assert len(trained) == answers
    assert len(parts(path, "oasst_pairs")[1]) == pairs


def test_real_solutions_are_right_against_wrong(shared):
    path = shared / "data" / "gsm8k" / "example_model_solutions.jsonl"
    wrong = [
        sum(not value["is_correct"] for value in json.loads(line).values() if isinstance(value, dict))
        for line in path.read_text().splitlines()
    ]
    name, pairs, refused = parts(path)
    assert name == "gsm8k_solutions" and len(refused) == wrong.count(0)
    assert len(pairs) == sum(bad * (5 - bad) for bad in wrong)
    assert all(isinstance(pair.chosen, Message) and pair.chosen != pair.rejected for pair in pairs)
