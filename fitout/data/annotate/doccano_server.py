"""A running Doccano: a project of answers to write (sequence to sequence) or of labels to choose, and what came of it.

Doccano has no roles, no ratings and no two fields in one project: the conversation is sent as one text, its turns go
along as metadata and come back unchanged, and labels are a project of their own. A draft is an ordinary answer there;
it counts as an annotation only when somebody has confirmed the example or changed the text.
"""

from __future__ import annotations

import io
import json
import os
import time
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ...errors import FitoutError, RequestError
from ..readers.opening import UNPACKED_FREE, UNPACKED_TIMES
from .annotation import Annotation
from .http import Client, strict
from .tasks import Progress, Returned, Task, require_all

URL, USER, PASSWORD = "DOCCANO_URL", "DOCCANO_USERNAME", "DOCCANO_PASSWORD"
Kind = Literal["answers", "labels"]
TYPES = {"answers": ("Seq2seq", "Seq2seqProject"), "labels": ("DocumentClassification", "TextClassificationProject")}
PAGE = 200  # examples in one answer
PATIENCE = 600.0  # seconds for an export by the task queue
OURS = "fitout"  # the metadata field that holds a task as it was sent


class Doccano:
    """Raises RequestError for a wrong address, account or project, FitoutError for what the server does."""

    def __init__(self, url: str | None = None):
        url = url or os.environ.get(URL, "http://127.0.0.1:8000")
        self.client = Client(url, "Doccano")
        self._account = {"username": os.environ.get(USER, ""), "password": os.environ.get(PASSWORD, "")}
        if not all(self._account.values()):
            raise RequestError(
                f"no account for Doccano: {USER} and {PASSWORD} are not set", where=url, hint=f"export {USER}=..."
            )

    def sign_in(self) -> None:
        given = self.client.post("/v1/auth/login/", self._account)
        if not isinstance(given, dict) or not isinstance(given.get("key"), str):
            raise RequestError("Doccano gave no token for the account", where=self.client.url)
        self.client.cookies.clear()  # with the session's cookie it would ask for a second, CSRF token
        self.client.headers["Authorization"] = f"Token {given['key']}"

    def push(
        self,
        title: str,
        tasks: Sequence[Task],
        taxonomy: Mapping[str, Sequence[str]],
        *,
        kind: Kind,
        annotators: int,
        say: Progress,
    ) -> int:
        """Makes a project and sends the tasks; returns the project's id.

        With one annotator the work is shared, and drafts are seen by whoever opens the project; with more, everybody
        has answers of their own and drafts are not sent, since only their sender would see them.
        """
        self.sign_in()
        project_type, resource = TYPES[kind]
        made = self.client.post("/v1/projects", {
            "name": title[:100],
            "description": "Made by fitout data push",
            "project_type": project_type,
            "resourcetype": resource,
            "collaborative_annotation": annotators == 1,
            "single_class_classification": True,
            "tags": [],
        })  # fmt: skip
        project = number(made, "id")
        types = self._label_types(project, taxonomy) if kind == "labels" else {}
        for done, task in enumerate(tasks, 1):
            draft = task.answer if kind == "answers" else task.label
            example = self._send(project, task, draft if annotators == 1 else None)
            if annotators == 1 and kind == "answers" and draft:
                self.client.post(f"/v1/projects/{project}/examples/{example}/texts", {"text": draft})
            elif annotators == 1 and draft in types:
                self.client.post(f"/v1/projects/{project}/examples/{example}/categories", {"label": types[draft]})
            say(done, len(tasks))
        there = number(self.client.get(f"/v1/projects/{project}/examples", limit=1), "count")
        require_all(there, len(tasks), project, self.client.url)
        return project

    def _label_types(self, project: int, taxonomy: Mapping[str, Sequence[str]]) -> dict[str, int]:
        names = [f"{task} / {sub}" if sub else task for task, subs in taxonomy.items() for sub in (subs or [""])]
        return {
            name: number(self.client.post(f"/v1/projects/{project}/category-types", {"text": name}), "id")
            for name in names
        }

    def _send(self, project: int, task: Task, draft: str | None) -> int:
        text = "\n".join(f"{message.role}: {message.content}" for message in task.messages)
        ours = {**task.data(), "draft": draft}
        body = {"text": text, "meta": {OURS: json.dumps(ours, ensure_ascii=False)}}
        return number(self.client.post(f"/v1/projects/{project}/examples", body), "id")

    def pull(self, project: int) -> tuple[bytes, list[Returned]]:
        """What the server gave, as JSON lines, and the tasks with everyone's annotations.

        A shared project has its answers with annotator and time. Of one where everybody has their own, Doccano shows
        those of others in its export alone, without times.
        """
        self.sign_in()
        about = self.client.get(f"/v1/projects/{project}")
        kinds = {type_: kind for kind, (type_, _) in TYPES.items()}
        kind = kinds.get(str(about.get("project_type"))) if isinstance(about, dict) else None
        if kind is None:
            raise RequestError(
                "this project is neither of answers nor of labels", where=self.page(project),
                hint="Export it in Doccano and read the file with `format: doccano`.",
            )  # fmt: skip
        examples = self._examples(project)
        if about.get("collaborative_annotation"):
            given = [self._shared(project, example, kind) for example in examples]
        else:
            given = self._own(project, examples)
        raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given)
        return raw.encode(), [returned(row, kind) for row in given]

    def _examples(self, project: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            page = self.client.get(f"/v1/projects/{project}/examples", limit=PAGE, offset=len(found))
            listed = page.get("results") if isinstance(page, dict) else None
            if not isinstance(listed, list):
                raise FitoutError("Doccano answered without examples", where=self.page(project))
            found += listed
            if not listed or len(found) >= number(page, "count"):
                return found

    def _shared(self, project: int, example: dict[str, Any], kind: str) -> dict[str, Any]:
        path = f"/v1/projects/{project}/examples/{example['id']}"
        if kind == "labels":
            names = {one["id"]: one["text"] for one in self.client.get(f"/v1/projects/{project}/category-types")}
            said = [
                {**one, "text": names.get(one["label"], str(one["label"]))}
                for one in self.client.get(f"{path}/categories")
            ]
        else:
            said = self.client.get(f"{path}/texts")
        return {**example, "annotations": said}

    def _own(self, project: int, examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = {example["id"]: {**example, "annotations": []} for example in examples}
        for name, listed in self._export(project).items():
            for one in listed:
                labels = one.get("label")
                if one.get("id") in rows and isinstance(labels, list):
                    rows[one["id"]]["annotations"] += [{"user": name, "text": text} for text in labels]
        return list(rows.values())

    def _export(self, project: int) -> dict[str, list[dict[str, Any]]]:
        """Rows by annotator, from the archive that the task queue makes: a file of JSON lines for each."""
        made = self.client.post(f"/v1/projects/{project}/download", {"format": "JSONL", "exportApproved": False})
        task = made.get("task_id") if isinstance(made, dict) else None
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            content = self.client.send("GET", f"/v1/projects/{project}/download", query={"taskId": task})
            if content[:2] == b"PK":
                return read_archive(content)
            time.sleep(1)
        raise FitoutError(
            f"Doccano made no export in {PATIENCE:.0f} s", where=self.page(project), hint="Is `doccano task` running?"
        )

    def page(self, project: int) -> str:
        return f"{self.client.url}/projects/{project}"


def read_archive(content: bytes) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = [info for info in archive.infolist() if info.filename.endswith(".jsonl")]
            if sum(info.file_size for info in infos) > max(UNPACKED_FREE, UNPACKED_TIMES * len(content)):
                raise ValueError("it unpacks to out of all proportion")
            for info in infos:
                listed = [strict(line) for line in archive.read(info).splitlines() if line.strip()]
                found[info.filename.removesuffix(".jsonl")] = [one for one in listed if isinstance(one, dict)]
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise FitoutError(f"Doccano's export cannot be read: {error}", hint="Export it by hand.") from None
    return found


def returned(row: dict[str, Any], kind: str) -> Returned:
    """A task of a project of either kind, ours or not; a draft nobody confirmed or changed is no annotation."""
    meta = row.get("meta") if isinstance(row.get("meta"), dict) else {}
    data: dict[str, Any] = {"text": row.get("text")}
    draft = None
    if isinstance(meta, dict) and isinstance(meta.get(OURS), str):
        try:
            data = strict(meta[OURS].encode())
        except ValueError as error:
            return Returned(str(row.get("id")), data, (), row, f"its `{OURS}` metadata were changed: {error}")
        draft = data.pop("draft", None)
    annotations = []
    by_user: dict[str, list[dict[str, Any]]] = {}
    for one in row["annotations"]:
        by_user.setdefault(str(one.get("user")), []).append(one)
    for user, said in by_user.items():
        texts = [str(one.get("text")) for one in said]
        if texts == [draft] and not row.get("is_confirmed"):
            continue
        times = [one["updated_at"] for one in said if isinstance(one.get("updated_at"), str)]
        annotations.append(
            Annotation(
                user,
                texts={"response": texts} if kind == "answers" else {},
                labels={"task": tuple(texts)} if kind == "labels" else {},
                created=max(times, default=""),
            )
        )
    return Returned(str(row.get("id")), data, tuple(annotations), row)


def number(value: Any, key: str) -> int:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, int):
        raise FitoutError(f"Doccano answered without `{key}`", hint="Is its version 1.8?")
    return found
