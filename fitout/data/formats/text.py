"""Plain text for pretraining: every token of it is trained."""

from __future__ import annotations

from ...chat.types import Origin, Sample, Text
from .plug import Columns, Row, RowError, renamed, rest, text

#: Columns that say the row is labelled data: it is then not taken for plain text unless `format: text` says so.
LABELS = ("entities", "cats", "labels", "annotations", "intent", "relations", "summary")


class PlainText:
    name = "text"
    keys = "text"
    fields: tuple[str, ...] = ("text",)

    def matches(self, row: Row) -> bool:
        return "text" in row and not any(label in row for label in LABELS)

    def convert(self, row: Row, origin: Origin, columns: Columns | None = None) -> list[Sample]:
        row = renamed(row, columns)
        content = text(row, "text")
        if not content.strip():
            raise RowError("the text is empty" if "text" in row else "no `text`")
        return [Text(content, origin, rest(row, ("text",)))]
