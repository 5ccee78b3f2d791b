"""A running Label Studio: projects, tasks and predictions out, annotations in.

Both kinds of token work: a personal access token (a JWT, changed for a short-lived one at /api/token/refresh/) and a
legacy token, where the server still allows them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import FitoutError, RequestError
from . import label_studio
from .http import Client, strict
from .tasks import Progress, Returned, Task, require_all

KEY = "LABEL_STUDIO_API_KEY"
URL = "LABEL_STUDIO_URL"
AT_ONCE = 200  # tasks in one request
RENEW = 240.0  # seconds; a short-lived token lasts five minutes


class LabelStudio:
    """Raises RequestError for a wrong address, token or project, FitoutError for what the server does."""

    def __init__(self, url: str | None = None):
        url = url or os.environ.get(URL, "http://127.0.0.1:8080")
        self.client = Client(url, "Label Studio")
        self._key = os.environ.get(KEY, "")
        self._renewed = 0.0
        if not self._key:
            raise RequestError(
                f"no token for Label Studio: {KEY} is not set",
                where=url,
                hint=f"Make one under Account & Settings, then: export {KEY}=...",
            )

    def sign_in(self) -> None:
        """Puts a valid token into the client's headers."""
        if self._key.count(".") != 2:
            self.client.headers["Authorization"] = f"Token {self._key}"
        elif time.monotonic() - self._renewed > RENEW:
            self.client.headers.pop("Authorization", None)
            given = self.client.post("/api/token/refresh/", {"refresh": self._key})
            if not isinstance(given, dict) or not isinstance(given.get("access"), str):
                raise RequestError(
                    "Label Studio gave no token for the key", where=self.client.url, hint=f"Check {KEY}."
                )
            self.client.headers["Authorization"] = f"Bearer {given['access']}"
            self._renewed = time.monotonic()

    def push(
        self,
        title: str,
        tasks: Sequence[Task],
        taxonomy: Mapping[str, Sequence[str]],
        *,
        annotators: int,
        drafted_by: str,
        say: Progress,
    ) -> int:
        """Makes a project with our interface and sends the tasks, answers as predictions; returns the project's id.

        `annotators` is how many are to answer each task, `drafted_by` the name predictions go under. The number of
        tasks that arrived is compared with the number sent.
        """
        self.sign_in()
        made = self.client.post("/api/projects/", {
            "title": title if len(title) >= 3 else f"{title} project",  # the least it accepts
            "label_config": label_studio.interface(taxonomy),
            "show_collab_predictions": True,
            "maximum_annotations": annotators,
        })  # fmt: skip
        project = number(made, "id")
        for start in range(0, len(tasks), AT_ONCE):
            self.sign_in()
            batch = [as_task(task, drafted_by, taxonomy) for task in tasks[start : start + AT_ONCE]]
            try:
                self.client.post(f"/api/projects/{project}/import", batch)
            except FitoutError as error:
                error.harm = f"{start} of {len(tasks)} tasks are in project {project}; delete it before you try again."
                raise
            say(min(start + AT_ONCE, len(tasks)), len(tasks))
        there = number(self.client.get(f"/api/projects/{project}/"), "task_number")
        require_all(there, len(tasks), project, self.client.url)
        return project

    def pull(self, project: int) -> bytes:
        """The project's export in Label Studio's own JSON, unannotated tasks included."""
        self.sign_in()
        query = {"exportType": "JSON", "download_all_tasks": "true"}
        return self.client.send("GET", f"/api/projects/{project}/export", query=query)

    def page(self, project: int) -> str:
        return f"{self.client.url}/projects/{project}"


def as_task(task: Task, drafted_by: str, taxonomy: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    results = label_studio.answer_results(task.answer, task.label if taxonomy else None)
    predictions = [{"model_version": drafted_by, "result": results}] if results else []
    return {"data": task.data(), **({"predictions": predictions} if predictions else {})}


def read_export(content: bytes, where: str) -> list[Returned]:
    """The tasks of a JSON export. Raises RequestError when it is none."""
    try:
        listed = strict(content)
    except ValueError as error:
        raise RequestError(f"not a JSON export: {error}", where=where, hint="Export as JSON.") from None
    if not isinstance(listed, list) or not all(
        isinstance(one, dict) and isinstance(one.get("data"), dict) for one in listed
    ):
        raise RequestError("not a JSON export of Label Studio", where=where, hint="Export as JSON, not JSON-MIN.")
    found: list[Returned] = []
    for one in listed:
        key = str(one.get("id", len(found) + 1))
        try:
            found.append(Returned(key, one["data"], tuple(label_studio.annotations_of(one)), one))
        except label_studio.Unusable as error:
            found.append(Returned(key, one["data"], (), one, str(error)))
    return found


def number(value: Any, key: str) -> int:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, int):
        raise FitoutError(f"Label Studio answered without `{key}`", hint="Is its version 1.13 or later?")
    return found
