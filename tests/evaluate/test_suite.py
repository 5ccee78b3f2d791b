"""The suite with an engine that answers from a dictionary: what is asked, what is counted, what comes out."""

import json
from contextlib import contextmanager

import pytest

from fitout.chat.types import Conversation, Message, Origin, Pair
from fitout.errors import RequestError
from fitout.evaluate import EvaluateSettings
from fitout.evaluate.suite import ask, evaluate

from .fakes import FakeEngine, Said, asked

CAPITALS = {"Japan?": "Tokyo", "France?": "Paris", "Peru?": "Lima", "Kenya?": "Nairobi"}
ROWS = [asked(question, answer, line=at) for at, (question, answer) in enumerate(CAPITALS.items(), 1)]


def test_base_against_tuned():
    base = FakeEngine({"Japan?": "Tokyo", "France?": Said("Paris Paris", "length"), "Peru?": ""})
    tuned = FakeEngine({**CAPITALS, "Kenya?": "Mombasa"})
    result = evaluate(base, tuned, ROWS, EvaluateSettings(samples=200))
    scores = {score.name: score for score in result.scores}
    assert list(scores) == ["exact_match", "f1", "rouge1", "rouge2", "rougeL", "bleu"]
    assert (scores["exact_match"].base.value, scores["exact_match"].tuned.value) == (25, 75)
    assert scores["exact_match"].difference.value == 50 and scores["exact_match"].base.n == 4
    assert scores["f1"].base.value == pytest.approx(100 * (1 + 2 / 3) / 4)
    assert result.rows[1] | {"base_scores": None, "tuned_scores": None} == {
        "origin": "data.jsonl:2",
        "task": None,
        "prompt": [{"role": "user", "content": "France?"}],
        "reference": "Paris",
        "base": "Paris Paris",
        "tuned": "Paris",
        "base_scores": None,
        "tuned_scores": None,
    }
    assert result.rows[1]["base_scores"]["exact_match"] == 0 and result.rows[1]["tuned_scores"]["exact_match"] == 100
    assert result.counts["base"]["finish_reasons"] == {"stop": 3, "length": 1}
    assert (result.counts["base"]["empty"], result.counts["tuned"]["empty"]) == (2, 0)
    notes = " ".join(result.notes)
    assert "ran into the limit of 256 tokens in 1 of 4" in notes and "2 empty answers of 4" in notes
    json.dumps(result.as_dict())


def test_pairs_are_asked_and_say_which_answer_is_the_likelier():
    """Of four pairs the base prefers one chosen answer, the tuned model three; a fifth sample is no pair."""
    good, bad = ["Tokyo", "Paris", "Lima", "Nairobi"], "Atlantis"
    pairs = [
        Pair((Message("user", question),), Message("assistant", answer), Message("assistant", bad), Origin("p", at))
        for at, (question, answer) in enumerate(zip(CAPITALS, good, strict=True), 1)
    ]

    class Context(FakeEngine):
        def choose(self, conversations, choices, *, mean=False, tools=()):
            if mean and conversations[0][-1].content == "Peru?" and self.says == {}:
                raise RequestError("too long for this context")
            return super().choose(conversations, choices, mean=mean)

    base = FakeEngine({"Japan?": bad}, likes={("Japan?", "Tokyo"): -1.0, ("France?", bad): -1.0})
    tuned = FakeEngine(CAPITALS, likes={(q, a): -1.0 for q, a in list(CAPITALS.items())[:3]})
    result = evaluate(base, tuned, [*pairs, asked("Spain?", "Madrid")], EvaluateSettings(samples=200))
    preference = next(score for score in result.scores if score.name == "preference")
    assert (preference.base.value, preference.tuned.value, preference.base.n) == (25, 75, 4)
    assert [row["tuned_scores"].get("preference") for row in result.rows] == [100, 100, 100, 0, None]
    exact = next(score for score in result.scores if score.name == "exact_match")
    assert exact.tuned.value == 80 and result.rows[0]["reference"] == "Tokyo"

    result = evaluate(Context(), tuned, pairs, EvaluateSettings(samples=200))
    assert next(score for score in result.scores if score.name == "preference").base.n == 3


def test_the_last_supervised_turn_is_asked_with_what_was_said_before():
    turns = (
        Message("system", "Be brief."),
        Message("user", "one"),
        Message("assistant", "1"),
        Message("user", "two"),
        Message("assistant", "2"),
        Message("user", "three"),
        Message("assistant", "3", train=False),
    )
    [question] = ask([Conversation(turns, Origin("f", 1))], EvaluateSettings()).asked
    assert question.prompt == turns[:4] and question.reference == "2"


def test_what_cannot_be_asked_is_counted():
    rows = [
        *ROWS,
        asked("x", "y", train=False),
        asked("x", " "),
        Conversation((Message("assistant", "hello"),), Origin("f", 9)),
    ]
    questions = ask(rows, EvaluateSettings())
    assert (
        questions.conversations == 7 == len(questions.asked) + sum(questions.skipped.values())
        and len(questions.asked) == 4
    )
    assert set(questions.skipped.values()) == {1} and len(questions.skipped) == 3


def test_a_limit_draws_by_the_seed_and_keeps_the_order():
    rows = [asked(str(at), "x", line=at) for at in range(100)]
    drawn = [[int(q.last_said) for q in ask(rows, EvaluateSettings(limit=10, seed=seed)).asked] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] == sorted(drawn[0]) and len(drawn[0]) == 10
    assert drawn[0] != list(range(10))
    assert ask(rows, EvaluateSettings(limit=10)).beyond_limit == 90
    assert ask(rows, EvaluateSettings(limit=1000)).beyond_limit == 0


def test_only_one_model_is_open_at_a_time():
    events = []

    def model(name):
        @contextmanager
        def opening():
            events.append(f"{name} opens")
            yield FakeEngine(CAPITALS)
            events.append(f"{name} closes")

        return opening

    evaluate(model("base"), model("tuned"), ROWS, EvaluateSettings(samples=100))
    assert events == ["base opens", "base closes", "tuned opens", "tuned closes"]


def test_labels_are_chosen_by_likelihood():
    rows = [asked("good", "positive"), asked("bad", "negative"), asked("odd", "neutral")]
    likes = {("good", "positive"): -1.0, ("bad", "negative"): -0.5, ("odd", "negative"): -2.0}
    settings = EvaluateSettings(choices=["positive", "negative"], samples=200)
    tuned = FakeEngine(likes=likes)
    result = evaluate(FakeEngine(), tuned, rows, settings)
    assert not [call for call in tuned.calls if call[0] == "generate"]
    assert [row["tuned"] for row in result.rows] == ["positive", "negative", "negative"]
    assert [row["base"] for row in result.rows] == ["positive"] * 3  # all alike: the first
    scores = {score.name: score for score in result.scores}
    assert list(scores) == ["accuracy", "macro_f1"]
    assert scores["accuracy"].tuned.value == pytest.approx(200 / 3)
    assert scores["macro_f1"].tuned.value == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)
    assert "1 of 3 references are none of the choices" in " ".join(result.notes)
    assert result.counts["tuned"]["finish_reasons"] == {"choice": 3}


def test_rows_may_bring_their_own_choices():
    rows = [asked("2+2", "4", choices=["3", "4"]), asked("Japan?", "Tokyo")]
    engine = FakeEngine(CAPITALS, likes={("2+2", "4"): -0.1})
    result = evaluate(engine, engine, rows, EvaluateSettings(metrics=["accuracy"], samples=100))
    assert [row["tuned"] for row in result.rows] == ["4", "Tokyo"]
    assert [score.name for score in result.scores] == ["accuracy"]


def test_what_an_engine_cannot_answer_is_a_counted_zero():
    class Small(FakeEngine):
        def choose(self, conversations, choices, *, tools=()):
            if conversations[0][-1].content == "long":
                raise RequestError("conversation 1 has 900 tokens")
            return super().choose(conversations, choices)

    engine = Small({"Japan?": Said("", "length", error="the prompt has 900 tokens")}, likes={("a", "yes"): -1.0})
    result = evaluate(engine, engine, ROWS[:1], EvaluateSettings(samples=100))
    assert result.scores[0].tuned.value == 0 and result.counts["tuned"]["finish_reasons"] == {"error": 1}
    assert "could not answer 1 of 1 questions, scored as zero: the prompt has 900 tokens." in " ".join(result.notes)
    rows = [asked("long", "yes"), asked("a", "yes")]
    result = evaluate(engine, engine, rows, EvaluateSettings(choices=["no", "yes"], samples=100))
    assert result.scores[0].tuned.value == 50 and result.counts["tuned"]["finish_reasons"] == {"error": 1, "choice": 1}


def test_conversations_with_different_tools_are_asked_apart():
    tool = {"type": "function", "function": {"name": "clock"}}
    rows = [asked("Japan?", "Tokyo"), asked("France?", "Paris", tools=(tool,)), asked("Peru?", "Lima")]
    engine = FakeEngine(CAPITALS)
    result = evaluate(engine, engine, rows, EvaluateSettings(samples=100))
    assert [call[2] for call in engine.calls[:2]] == [(), (tool,)]
    assert result.scores[0].tuned.value == 100  # answers went back to their own rows


def test_scores_by_task_and_language():
    rows = [
        asked("Japan?", "Tokyo", task="capitals", language="en"),
        asked("1+1", "2", task="sums"),
        asked("法国?", "巴黎", task="capitals", language="zh"),
    ]
    tuned = FakeEngine({"Japan?": "Tokyo", "1+1": "3", "法国?": "巴黎"})
    result = evaluate(FakeEngine(), tuned, rows, EvaluateSettings(samples=100))
    tasks = {name: {score.name: score for score in scores} for name, scores in result.groups["task"].items()}
    assert tasks["capitals"]["exact_match"].tuned.value == 100 and tasks["capitals"]["exact_match"].tuned.n == 2
    assert tasks["sums"]["exact_match"].tuned.value == 0 and tasks["sums"]["exact_match"].base.n == 1
    assert set(tasks["sums"]) == {"exact_match", "f1", "rouge1", "rouge2", "rougeL", "bleu:13a"}
    assert list(result.groups["language"]) == ["(not given)", "en", "zh"]
    assert evaluate(tuned, tuned, ROWS, EvaluateSettings(samples=100)).groups == {}


def test_retention_beside_the_gain(tmp_path):
    base = FakeEngine(plain={"The capital of Japan is": " Tokyo.", "1 + 1 =": " 2", "log_prob": -2.0})
    tuned = FakeEngine(CAPITALS, plain={"The capital of Japan is": " Tokyo.", "1 + 1 =": " 11", "log_prob": -1.0})
    probes = [
        {"prompt": "The capital of Japan is", "answer": "Tokyo", "group": "facts"},
        {"prompt": "1 + 1 =", "answer": "2", "group": "sums"},
    ]
    result = evaluate(base, tuned, ROWS, EvaluateSettings(samples=100), probes=probes)
    assert (result.retention.overall.base.value, result.retention.overall.tuned.value) == (100, 50)
    assert result.retention.groups["facts"].tuned.value == 100 and result.retention.groups["sums"].tuned.value == 0
    assert [row["tuned"] for row in result.retention.forgotten] == [" 11"]
    assert tuned.calls[-1][2] >= len("Tokyo")
    json.dumps(result.as_dict())

    text = tmp_path / "text.txt"
    text.write_text("word " * 900)
    result = evaluate(base, tuned, ROWS, EvaluateSettings(samples=100, retention=str(text)))
    assert result.retention.perplexity.base.value == pytest.approx(2.718281828**2)
    assert result.retention.perplexity.tuned.value == pytest.approx(2.718281828)

    assert evaluate(base, tuned, ROWS, EvaluateSettings(samples=100, retention="off"), probes=probes).retention is None
    without = evaluate(base, tuned, ROWS, EvaluateSettings(samples=100))
    assert without.retention is None and "Retention was not measured" in " ".join(without.notes)


def test_nothing_to_evaluate_is_said_not_raised():
    result = evaluate(FakeEngine(), FakeEngine(), [], EvaluateSettings())
    assert result.scores == [] and "no row to evaluate" in result.notes[0]


def test_progress_is_told():
    told = []
    evaluate(
        FakeEngine(),
        FakeEngine(CAPITALS),
        ROWS,
        EvaluateSettings(samples=100),
        progress=lambda *what: told.append(what),
    )
    assert told == [("base: answers", 4, 4), ("tuned: answers", 4, 4)]
