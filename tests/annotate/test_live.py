"""Against running servers: what is pushed, annotated by the tools' own interfaces and pulled has lost nothing.

`python -m tests.annotate.servers test FOLDER` starts both and runs this; without them everything here is skipped.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from fitout import verbs
from fitout.chat.types import Message, Origin
from fitout.data import SourceSettings
from fitout.data.annotate.http import Client
from fitout.data.annotate.label_studio import answer_results
from fitout.data.annotate.tasks import collect
from fitout.data.formats import choose, convert
from fitout.data.sources import probe, read
from fitout.errors import RequestError

needs_label_studio = pytest.mark.skipif("LABEL_STUDIO_API_KEY" not in os.environ, reason="Label Studio is not running")
needs_doccano = pytest.mark.skipif("DOCCANO_PASSWORD" not in os.environ, reason="Doccano is not running")

TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
ROWS = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Which bird wades?"},
            {"role": "assistant", "content": "A heron."},
        ],
        "task": "knowledge",
        "subtask": "animals",
        "note": {"page": 3},
    },
    {
        "messages": [
            {"role": "user", "content": 'One word: 🎉 <b>&amp;</b> "x"\n\n\ttab, 中文'},
            {"role": "assistant", "content": "fête", "train": False},
            {"role": "user", "content": "What time is it?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "I need the clock."},
            {"role": "tool", "content": "12:00", "tool_call_id": "c1"},
            {"role": "assistant", "content": "Noon."},
        ],
        "tools": [TOOL],
        "task": "tools",
    },
    {"messages": [{"role": "user", "content": "中文问题？"}]},
    {"prompt": "Nobody will answer this."},
]
CORRECTED = ["A heron, say.", "Noon, 12:00 🎉\nsharp", "答案"]


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    return path


def conversations(path):
    settings = SourceSettings(path=str(path))
    plug = choose(probe(settings, Path()))
    return [sample for row in read(settings, Path()) for sample in convert(plug, row)]


def wanted(source, answers):
    """The conversations as they must come back: the sent turns and the answers that were written."""
    tasks = collect(SourceSettings(path=str(source)), Path()).tasks
    return [
        ((*task.messages, Message("assistant", answer)), task.tools)
        for task, answer in zip(tasks, answers, strict=False)
    ]


def spoken(sample):
    return tuple(sample.messages), sample.tools


@needs_label_studio
def test_label_studio_round_trip(source, tmp_path):
    pushed = verbs.push("label-studio", source, title="round trip", annotators=2)
    assert pushed.tasks == 4 and not pushed.left_out
    client = Client(os.environ["LABEL_STUDIO_URL"], "Label Studio")
    client.headers["Authorization"] = f"Token {os.environ['LABEL_STUDIO_API_KEY']}"
    project = client.get(f"/api/projects/{pushed.project}/")
    assert project["task_number"] == 4 and project["maximum_annotations"] == 2
    tasks = sorted(
        client.get("/api/tasks", project=pushed.project, page_size=100, fields="all")["tasks"], key=lambda t: t["id"]
    )
    drafts = [task["predictions"][0]["result"][0]["value"]["text"] if task["predictions"] else None for task in tasks]
    assert drafts == [["A heron."], ["Noon."], None, None]
    labels = ["knowledge / animals", "tools", None]
    for task, answer, label, stars in zip(tasks, CORRECTED, labels, (5, 2, 3), strict=False):
        rating = {"from_name": "quality", "to_name": "dialogue", "type": "rating", "value": {"rating": stars}}
        body = {"result": [*answer_results(answer, label), rating], "lead_time": 12.5}
        client.post(f"/api/tasks/{task['id']}/annotations/", body)

    result = verbs.pull("label-studio", pushed.project, to=tmp_path / "back")
    assert (result.tasks, result.answered, result.undecided, result.unanswered) == (4, 3, 0, 1)
    back = conversations(result.answers)
    assert [spoken(sample) for sample in back] == wanted(source, CORRECTED)
    assert back[0].meta["note"] == {"page": 3}
    assert [sample.meta.get("task") for sample in back] == ["knowledge", "tools", None]
    assert back[0].meta["subtask"] == "animals" and [sample.meta["rating"] for sample in back] == [5, 2, 3]
    assert all(sample.meta["seconds"] == 12.5 and sample.meta["annotated_at"] for sample in back)
    assert all(sample.meta["annotator"].isdigit() for sample in back)
    assert [sample.meta["origin"] for sample in back] == [f"{source}:{line}" for line in (1, 2, 3)]

    again = verbs.pull("label-studio", None, to=tmp_path / "file", file=tmp_path / "back" / "export.json")
    assert again.answers.read_bytes() == result.answers.read_bytes()
    as_source = conversations(tmp_path / "back" / "export.json")
    assert [spoken(sample) for sample in as_source[:3]] == [spoken(sample) for sample in back]


@needs_label_studio
def test_label_studio_personal_token_and_a_wrong_one(source, monkeypatch):
    client = Client(os.environ["LABEL_STUDIO_URL"], "Label Studio")
    client.headers["Authorization"] = f"Token {os.environ['LABEL_STUDIO_API_KEY']}"
    listed = client.get("/api/token/")
    for one in listed if isinstance(listed, list) else listed["results"]:
        client.post("/api/token/blacklist/", {"refresh": one["token"]})
    token = client.post("/api/token/", {})["token"]
    assert token.count(".") == 2
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", token)
    assert verbs.push("label-studio", source, title="by a personal token").tasks == 4
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "0" * 40)
    with pytest.raises(RequestError, match="does not accept the credentials") as caught:
        verbs.push("label-studio", source)
    assert "0000" not in str(caught.value)


@needs_doccano
def test_doccano_round_trip_of_answers(source, tmp_path):
    pushed = verbs.push("doccano", source, title="answers")
    client = doccano()
    path = f"/v1/projects/{pushed.project}/examples"
    examples = sorted(client.get(path, limit=10)["results"], key=lambda one: one["id"])
    assert len(examples) == 4
    drafts = [client.get(f"{path}/{one['id']}/texts") for one in examples]
    assert [[draft["text"] for draft in listed] for listed in drafts] == [["A heron."], ["Noon."], [], []]
    for answer, listed, example in zip(CORRECTED, drafts, examples, strict=False):
        if listed:
            client.json("PATCH", f"{path}/{example['id']}/texts/{listed[0]['id']}", {"text": answer})
        else:
            client.post(f"{path}/{example['id']}/texts", {"text": answer})
    result = verbs.pull("doccano", pushed.project, to=tmp_path / "back")
    assert (result.tasks, result.answered, result.undecided, result.unanswered) == (4, 3, 0, 1)
    back = conversations(result.answers)
    assert [spoken(sample) for sample in back] == wanted(source, CORRECTED)
    assert back[0].meta["note"] == {"page": 3} and all(sample.meta["annotated_at"] for sample in back)


@needs_doccano
def test_doccano_drafts_count_once_they_are_confirmed(source, tmp_path):
    pushed = verbs.push("doccano", source, title="drafts")
    client = doccano()
    path = f"/v1/projects/{pushed.project}/examples"
    first = min(one["id"] for one in client.get(path, limit=10)["results"])
    assert verbs.pull("doccano", pushed.project, to=tmp_path / "none").answered == 0
    client.post(f"{path}/{first}/states", {})
    result = verbs.pull("doccano", pushed.project, to=tmp_path / "one")
    assert result.answered == 1 and conversations(result.answers)[0].messages[-1].content == "A heron."


@needs_doccano
def test_doccano_two_annotators_choose_labels(source, tmp_path):
    labels = {"knowledge": ["animals", "plants"], "writing": []}
    pushed = verbs.push("doccano", source, title="labels", labels=labels, kind="labels", annotators=2)
    first, second = doccano(), doccano("second")
    project = f"/v1/projects/{pushed.project}"
    user = second.get("/v1/me")["id"]
    role = next(one["id"] for one in first.get("/v1/roles") if one["name"] == "annotator")
    first.post(f"{project}/members", {"user": user, "role": role})
    types = {one["text"]: one["id"] for one in first.get(f"{project}/category-types")}
    assert list(types) == ["knowledge / animals", "knowledge / plants", "writing"]
    examples = sorted(first.get(f"{project}/examples", limit=10)["results"], key=lambda one: one["id"])
    for client, chosen in ((first, "aaw"), (second, "apw")):
        for example, letter in zip(examples, chosen, strict=False):
            name = {"a": "knowledge / animals", "p": "knowledge / plants", "w": "writing"}[letter]
            client.post(f"{project}/examples/{example['id']}/categories", {"label": types[name]})
    result = verbs.pull("doccano", pushed.project, to=tmp_path / "back")
    assert (result.tasks, result.answered, result.undecided, result.unanswered) == (4, 2, 1, 1)
    assert list(result.reasons) == ["a tie in `task`: 'knowledge / animals' and 'knowledge / plants', 1 each"]
    (pair,) = result.agreement["cohen"]
    assert pair["annotators"] == ["second", "tester"] and pair["tasks"] == 3
    # two of three agree; by chance (2 * 1 + 1 * 1) / 9 of animals and writing
    assert pair["kappa"] == pytest.approx((2 / 3 - 3 / 9) / (1 - 3 / 9), abs=1e-4)
    back = conversations(result.answers)
    assert [sample.messages[-1].content for sample in back] == ["knowledge / animals", "writing"]


def doccano(username: str = "tester") -> Client:
    client = Client(os.environ["DOCCANO_URL"], "Doccano")
    key = client.post("/v1/auth/login/", {"username": username, "password": os.environ["DOCCANO_PASSWORD"]})["key"]
    client.cookies.clear()
    client.headers["Authorization"] = f"Token {key}"
    return client


@needs_label_studio
def test_drafts_by_the_embedded_model_are_predictions(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text('{"prompt": "The capital of Japan is"}\n{"prompt": "2 + 3 ="}\n')
    pushed = verbs.push("label-studio", path, title="drafted", draft_by="embedded:shell")
    assert pushed.drafted == 2
    client = Client(os.environ["LABEL_STUDIO_URL"], "Label Studio")
    client.headers["Authorization"] = f"Token {os.environ['LABEL_STUDIO_API_KEY']}"
    tasks = client.get("/api/tasks", project=pushed.project, page_size=10, fields="all")["tasks"]
    assert all(task["predictions"][0]["model_version"] == "embedded:shell" for task in tasks)


def test_what_is_wanted_is_what_was_sent(source):
    """The yardstick of the round trips: every turn of a row, its flags and extras, in the tasks."""
    tasks = collect(SourceSettings(path=str(source)), Path()).tasks
    assert [len(task.messages) for task in tasks] == [2, 5, 1, 1]
    assert tasks[1].messages[1] == Message("assistant", "fête", train=False)
    assert tasks[1].messages[3].extra == {"tool_calls": [CALL], "reasoning_content": "I need the clock."}
    assert replace(tasks[0], origin=Origin("x", 1)).meta == {"note": {"page": 3}}
