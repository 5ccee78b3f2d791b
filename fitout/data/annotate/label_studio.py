"""Label Studio's words: the results of an annotation, the labelling interface, tasks and predictions.

Results follow its JSON export (labelstud.io, "Label Studio JSON format of annotated tasks"): a list of
{type, from_name, to_name, value}, where `value` has one key of the type's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from xml.sax.saxutils import quoteattr

from ...files import fingerprint
from ..readers import json_kind
from .annotation import Annotation, Relation, Span

SPANS = ("labels", "hypertextlabels", "paragraphlabels")


class Unusable(ValueError):
    """Why an annotation cannot be read as text."""


def annotations_of(task: Mapping[str, Any]) -> list[Annotation]:
    """The annotations of an exported task; those that were cancelled (skipped) are none. Raises Unusable."""
    listed = task.get("annotations", task.get("completions"))
    if not isinstance(listed, list):
        raise Unusable(f"`annotations` is {json_kind(listed)}, not a list")
    found = []
    for number, one in enumerate(listed, 1):
        if not isinstance(one, dict) or not isinstance(one.get("result"), list):
            raise Unusable(f"annotation {number} is no object with a `result`")
        if one.get("was_cancelled"):
            continue
        annotation = read_results(one["result"], task.get("data"))
        seconds = one.get("lead_time")
        found.append(
            replace(
                annotation,
                annotator=person(one.get("completed_by")),
                review=review_of(one),
                truth=one.get("ground_truth") is True,
                seconds=float(seconds) if isinstance(seconds, int | float) else None,
                created=one["created_at"] if isinstance(one.get("created_at"), str) else "",
            )
        )
    return found


def person(value: Any) -> str:
    """An annotator's id. Names and addresses, which an export also has, are not taken along; an address that stands
    for the id becomes a number of its own."""
    if isinstance(value, dict):
        value = value.get("id", value.get("email"))
    if isinstance(value, str) and "@" in value:
        return "annotator-" + fingerprint(value)[:8]
    return str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""


def review_of(annotation: Mapping[str, Any]) -> str:
    """ "accepted" or "rejected" by the latest review (the enterprise edition has them), "" without one."""
    reviews = annotation.get("reviews")
    verdicts = [one["accepted"] for one in reviews if isinstance(one, dict) and isinstance(one.get("accepted"), bool)] \
        if isinstance(reviews, list) else []  # fmt: skip
    return ("accepted" if verdicts[-1] else "rejected") if verdicts else ""


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_results(results: Sequence[Any], data: Any = None) -> Annotation:
    """An annotation from its results; `data` is the task's, to check marked pieces against. Raises Unusable."""
    texts: dict[str, list[str]] = {}
    labels: dict[str, tuple[str, ...]] = {}
    ratings: dict[str, float] = {}
    spans: dict[str, Span] = {}
    relations: list[tuple[str, str, str]] = []
    messages: list[dict[str, Any]] = []
    order: tuple[str, ...] = ()
    spanned = False
    for result in results:
        kind = result.get("type") if isinstance(result, dict) else None
        if not isinstance(kind, str):
            raise Unusable("a result without a type")
        if kind == "relation":
            names = result.get("labels")
            named = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else "related"
            relations.append((str(result.get("from_id")), str(result.get("to_id")), named))
            continue
        value, name = result.get("value"), result.get("from_name")
        if not isinstance(value, dict) or not isinstance(name, str):
            raise Unusable(f"a result of type {kind!r} without value or name")
        if kind == "textarea":
            texts.setdefault(name, []).extend(strings(value.get("text"), kind))
        elif kind == "choices":
            labels[name] = labels.get(name, ()) + tuple(strings(value.get("choices"), kind))
        elif kind == "taxonomy":
            labels[name] = labels.get(name, ()) + tuple(paths(value.get("taxonomy")))
        elif kind in ("rating", "number"):
            if not is_number(value.get(kind)):
                raise Unusable(f"a {kind} that is {json_kind(value.get(kind))}")
            ratings[name] = float(value[kind])
        elif kind in SPANS:
            spanned = True
            span = read_span(value, kind, data)
            key = str(result.get("id")) if result.get("id") else f"#{len(spans)}"
            spans[key] = span
        elif kind == "pairwise":
            order = pair_order(value.get("selected"))
        elif kind == "ranker":
            order = ranking(value.get("ranker"))
        elif kind == "chatmessage":
            messages.append(chat_message(value.get("chatmessage")))
        else:
            raise Unusable(f"a result of type {kind!r}, which is not about text")
    ordered = sorted(spans.values(), key=lambda span: (span.start, span.end))
    related = tuple(
        Relation(spans[a].text, spans[b].text, kind) for a, b, kind in relations if a in spans and b in spans
    )
    return Annotation(
        "", texts, labels, tuple(ordered), spanned, related, ratings, tuple(messages), order
    )  # fmt: skip


def strings(value: Any, kind: str) -> list[str]:
    """The texts of a value, which Label Studio writes as a list, and as one text where there is one."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise Unusable(f"a {kind} that is {json_kind(value)}, not texts")
    return listed


def paths(value: Any) -> list[str]:
    """Choices of a tree: each is the labels from the root on, joined by " / "."""
    if not isinstance(value, list) or not all(isinstance(path, list) and path for path in value):
        raise Unusable("a taxonomy that is no list of paths")
    return [" / ".join(strings(path, "taxonomy")) for path in value]


def read_span(value: Mapping[str, Any], kind: str, data: Any) -> Span:
    """A marked piece. Where the task's text is at hand, what stands there must be what was marked."""
    names = tuple(strings(value.get(kind), kind))
    start, end, text = value.get("start"), value.get("end"), value.get("text")
    if kind != "labels":  # positions in the elements of a page or of a dialogue, not in one text
        start, end = value.get("startOffset", 0), value.get("endOffset", 0)
    if not (isinstance(start, int) and isinstance(end, int)) or not isinstance(text, str | None):
        raise Unusable("a marked piece without a place in the text (of a picture or a recording?)")
    if kind == "labels" and isinstance(data, dict):
        whole = [one for one in data.values() if isinstance(one, str)]
        if text is None:
            text = next((one[start:end] for one in whole if 0 <= start < end <= len(one)), None)
        elif whole and not any(text in (one[start:end], in_utf16(one, start, end)) for one in whole):
            raise Unusable(f"{text[:40]!r} was marked at {start}-{end}, where the text says something else")
    if not text:
        raise Unusable("a marked piece without its text")
    return Span(start, end, text, names)


def in_utf16(text: str, start: int, end: int) -> str:
    """A piece by positions as a browser counts them, in units of UTF-16."""
    return text.encode("utf-16-le", "surrogatepass")[2 * start : 2 * end].decode("utf-16-le", "replace")


def pair_order(selected: Any) -> tuple[str, ...]:
    if selected not in ("left", "right"):
        raise Unusable(f"a comparison whose choice is {json_kind(selected)}, not left or right")
    return ("left", "right") if selected == "left" else ("right", "left")


def ranking(value: Any) -> tuple[str, ...]:
    """The keys of a ranking, best first; a drawer that was left unused ("_") does not count."""
    if isinstance(value, dict):
        filled = [keys for bucket, keys in value.items() if keys and bucket != "_"] or [value.get("_")]
        if len(filled) > 1:
            raise Unusable(f"a ranking into {len(filled)} groups; the export does not say which group is better")
        value = filled[0]
    if not isinstance(value, list) or not all(isinstance(key, str | int) for key in value):
        raise Unusable(f"a ranking that is {json_kind(value)}, not a list of keys")
    return tuple(map(str, value))


def chat_message(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise Unusable("a chat message without a role")
    return {
        key: child for key, child in value.items() if key in ("role", "content", "tool_calls") and child is not None
    }


# --- what is pushed ----------------------------------------------------------------------------------------------

#: Names of the fields of our own interface; `pull` and the format know them.
RESPONSE, TASK, QUALITY = "response", "task", "quality"
STARS = 5


def interface(taxonomy: Mapping[str, Iterable[str]]) -> str:
    """The labelling interface: the conversation with its roles, the answer to write, the task on two levels, stars.

    `taxonomy` is task -> sub-tasks; without one there is no field for it.
    """
    choices = "".join(
        f"<Choice value={quoteattr(task)}>" + "".join(f"<Choice value={quoteattr(sub)}/>" for sub in subs) + "</Choice>"
        for task, subs in taxonomy.items()
    )
    tree = (
        f'<Header value="Task"/><Taxonomy name="{TASK}" toName="dialogue" leafsOnly="true" required="true">'
        f"{choices}</Taxonomy>"
        if choices
        else ""
    )
    return (
        '<View style="display: flex; gap: 1.5em; max-width: 90em;">'
        '<View style="flex: 3;">'
        '<Paragraphs name="dialogue" value="$messages" layout="dialogue" nameKey="role" textKey="content"/>'
        '<Header value="Answer"/>'
        f'<TextArea name="{RESPONSE}" toName="dialogue" rows="8" editable="true" maxSubmissions="1" '
        'showSubmitButton="false" required="true" requiredMessage="Write the answer"/>'
        "</View>"
        '<View style="flex: 2;">'
        f"{tree}"
        '<Header value="Quality"/>'
        f'<Rating name="{QUALITY}" toName="dialogue" maxRating="{STARS}"/>'
        "</View>"
        "</View>"
    )


def answer_results(answer: str | None, task: str | None = None) -> list[dict[str, Any]]:
    """Results of our interface for an answer and a task label ("logical reasoning / common sense")."""
    results = []
    if answer is not None:
        results.append(result(RESPONSE, "textarea", {"text": [answer]}))
    if task:
        results.append(result(TASK, "taxonomy", {"taxonomy": [task.split(" / ")]}))
    return results


def result(name: str, kind: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"from_name": name, "to_name": "dialogue", "type": kind, "value": value}
