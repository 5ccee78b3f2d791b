"""Label Studio exports: JSON (a row is a task with its annotations), JSON-MIN and CSV (a row is one annotation).

What the answer is depends on what was annotated:
    written text                         the answer (several texts: several samples)
    a chat                               its turns
    a choice of two, a ranking           preference pairs, each candidate against every worse one
    marked pieces, and a question asked  the pieces, a line each
    marked pieces                        a JSON list of {"text", "label"}; with relations {"entities", "relations"}
    labels alone                         the label; several joined by ", "; several fields a line each, "field: label"
Labels beside a written answer, ratings, annotator and time are the sample's meta.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from ...chat.types import Conversation, Message, Origin, Pair, Sample
from ..annotate import label_studio
from ..annotate.agreement import Undecided, decide
from ..annotate.annotation import Annotation
from ..annotate.label_studio import RESPONSE, TASK, Unusable
from ..readers import json_kind
from . import openai
from .plug import Columns, Refused, Row, RowError, parsed, renamed
from .turns import ROLES, check_answered, check_order, read_tools

#: Data fields that hold what is asked and what it is asked about, in the order in which they are put to the model.
ASKED = ("system", "instruction", "prompt", "task_description")
ABOUT = ("context", "passage", "document", "article", "reference_text", "text", "input", "sentence", "content")
QUESTION = ("question", "query")
DIALOGUE = (
    "messages",
    "dialogue",
    "dialog",
    "conversation",
    "conversations",
    "chat",
    "humanMachineDialogue",
    "input_chat",
)
KNOWN = (*ASKED, *ABOUT, *QUESTION, *DIALOGUE)

#: Columns of JSON-MIN and CSV that are about the annotation.
ABOUT_IT = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement", "history")


class LabelStudio:
    """A task and its annotations. Of several annotators the majority's answer is taken; a tie is refused with its
    reason, and `fitout data pull label-studio --file` decides by other rules."""

    name = "label_studio"
    keys = "data, annotations (Label Studio JSON)"
    fields: tuple[str, ...] = ("prompt", "question", "context", "messages", "system", "left", "right", "items")

    def matches(self, row: Row) -> bool:
        return isinstance(row.get("data"), dict) and ("annotations" in row or "completions" in row)

    def convert(self, row: Row, origin: Origin, columns: Columns | None = None) -> Sequence[Sample | Refused]:
        data = row.get("data")
        if not isinstance(data, dict):
            raise RowError("no `data`")
        try:
            annotations = label_studio.annotations_of(row)
            if not annotations:
                raise RowError("the task has no annotation")
            chosen = decide(annotations, "majority")
        except (Unusable, Undecided) as error:
            raise RowError(str(error)) from None
        return answered(renamed(data, columns), chosen, len(annotations), row.get("id"), origin)


class LabelStudioMin:
    """One annotation with its task's data in one flat row, as JSON-MIN and CSV have it.

    JSON-MIN writes the data before `id` and what was annotated behind it, so that order tells them apart; in CSV, whose
    columns are sorted, whatever is no field of a known name was annotated.
    """

    name = "label_studio_min"
    keys = "annotation_id, annotator, lead_time and the task's data (Label Studio JSON-MIN, CSV)"
    fields: tuple[str, ...] = (*LabelStudio.fields, "answer")

    def matches(self, row: Row) -> bool:
        return "annotation_id" in row and "annotator" in row and "lead_time" in row

    def convert(self, row: Row, origin: Origin, columns: Columns | None = None) -> Sequence[Sample | Refused]:
        if not self.matches(row):
            raise RowError("no `annotation_id`, `annotator` and `lead_time`")
        data, annotated = parts(row, columns)
        if not annotated:
            raise RowError("no column holds what was annotated; say `columns: {answer: NAME}`")
        try:
            annotation = label_studio.read_results([one for item in annotated.items() for one in results(*item)], data)
        except Unusable as error:
            raise RowError(str(error)) from None
        meta = {"annotator": label_studio.person(row["annotator"]), "task_id": row.get("id")}
        if row.get("created_at"):
            meta["annotated_at"] = row["created_at"]
        if re.fullmatch(r"\d+(\.\d+)?", str(row["lead_time"])):
            meta["seconds"] = float(row["lead_time"])
        return samples_of(data, annotation, origin, meta | judged(annotation))


def parts(row: Row, columns: Columns | None) -> tuple[Row, Row]:
    """The task's data, by our names, and what was annotated."""
    keys = [key for key in row if key not in ABOUT_IT]
    values = {key: structured(row[key], key) for key in keys}
    order = list(row)
    if order != sorted(order) and "id" in row:  # JSON-MIN
        after = set(order[order.index("id") :])
        annotated = [key for key in keys if key in after]
    elif compared := [key for key in keys if is_result(values[key], ("selected", "ranker"))]:
        annotated = compared
    else:
        annotated = [key for key in keys if key not in KNOWN and not is_list_of_others(values[key])]
    taken = {theirs: ours for ours, theirs in (columns or {}).items()}
    annotated = [key for key in keys if (taken[key] == "answer" if key in taken else key in annotated)]
    data = {key: value for key, value in values.items() if key not in annotated}
    return renamed(data, {ours: key for key, ours in taken.items() if ours != "answer"}), {
        key: values[key] for key in annotated if values[key] not in (None, "", [])
    }


def is_result(value: Any, kinds: Iterable[str]) -> bool:
    """Whether a value is a list of results, of any of these kinds."""
    return isinstance(value, list) and any(
        isinstance(one, dict) and any(kind in one for kind in kinds) for one in value
    )


def is_list_of_others(value: Any) -> bool:
    """Whether a value is a list of objects that are no results: part of the task, such as the candidates."""
    objects = isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)
    return objects and not is_result(value, (*MIN_KINDS, "role"))


def structured(value: Any, key: str) -> Any:
    """A cell of a CSV file that holds a list or an object as JSON text."""
    if isinstance(value, str) and value[:1] in "[{" and value.rstrip()[-1:] in ("]", "}"):
        try:
            return parsed(value, f"`{key}`")
        except RowError:
            return value
    return value


def results(name: str, value: Any) -> list[dict[str, Any]]:
    """What JSON-MIN made short, as results again."""
    if isinstance(value, str):  # one choice and one text are both written as bare text
        kind = "textarea" if name in (RESPONSE, *ANSWERS) else "choices"
        return [{"type": kind, "from_name": name, "value": {"text": value, "choices": value}}]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [{"type": "rating", "from_name": name, "value": {"rating": value}}]
    if isinstance(value, dict) and "choices" in value:
        return [{"type": "choices", "from_name": name, "value": value}]
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return [{"type": "textarea", "from_name": name, "value": {"text": value}}]
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise RowError(f"`{name}` is {json_kind(value)}; say which columns are which with `columns:`")
    found = []
    for one in value:
        if "role" in one and "content" in one:
            found.append({"type": "chatmessage", "from_name": name, "value": {"chatmessage": one}})
            continue
        known = next((kind for kind in MIN_KINDS if kind in one), None)
        if known is None:
            raise RowError(f"`{name}` holds objects of {', '.join(map(str, one))[:80]}, which is not about text")
        found.append({"type": MIN_KINDS[known], "from_name": name, "value": one})
    return found


#: A value's own key, and the type of result it is the value of.
MIN_KINDS = {
    "labels": "labels",
    "hypertextlabels": "hypertextlabels",
    "paragraphlabels": "paragraphlabels",
    "text": "textarea",
    "taxonomy": "taxonomy",
    "rating": "rating",
    "number": "number",
    "choices": "choices",
    "selected": "pairwise",
    "ranker": "ranker",
}
#: Names under which a bare text is an answer that was written, not a label that was chosen.
ANSWERS = ("answer", "summary", "response", "output", "completion", "translation", "transcription", "instruction")


# --- from an annotation to samples -------------------------------------------------------------------------------


def answered(data: Row, annotation: Annotation, of: int, task_id: Any, origin: Origin) -> list[Sample | Refused]:
    """The samples of the annotation that was chosen of a task's `of`; `data` are its fields by our names."""
    meta = provenance(annotation, of)
    if isinstance(task_id, int | str):
        meta["task_id"] = task_id
    return samples_of(data, annotation, origin, meta)


def provenance(annotation: Annotation, of: int) -> dict[str, Any]:
    meta: dict[str, Any] = {"annotator": annotation.annotator} if annotation.annotator else {}
    if of > 1:
        meta["annotations"] = of
    if annotation.created:
        meta["annotated_at"] = annotation.created
    if annotation.seconds is not None:
        meta["seconds"] = annotation.seconds
    if annotation.review:
        meta["review"] = annotation.review
    return meta | judged(annotation)


def judged(annotation: Annotation) -> dict[str, Any]:
    """Rating and labels; the label of our own task field as `task` and `subtask`."""
    meta: dict[str, Any] = {} if annotation.rating is None else {"rating": annotation.rating}
    for name, chosen in annotation.labels.items():
        if name == TASK and len(chosen) == 1:
            task, _, subtask = chosen[0].partition(" / ")
            meta |= {"task": task, "subtask": subtask} if subtask else {"task": task}
        else:
            meta[name] = chosen[0] if len(chosen) == 1 else list(chosen)
    return meta


def samples_of(data: Row, annotation: Annotation, origin: Origin, meta: dict[str, Any]) -> list[Sample | Refused]:
    """The samples of one annotation; `data` are the task's fields by our names."""
    if annotation.order:
        return pairs(data, annotation, origin, meta)
    if annotation.messages:
        turns = [openai.message(one, number) for number, one in enumerate([*chat_of(data), *annotation.messages], 1)]
        return [checked(turns, origin, data, meta)]
    if annotation.texts:
        asked = question(data, as_turns=True)
        answers = [text for texts in annotation.texts.values() for text in texts]
        if len(answers) == 1:
            return [checked([*asked, Message("assistant", answers[0])], origin, data, meta)]
        return [one_of(answers, number, asked, origin, data, meta) for number in range(1, len(answers) + 1)]
    if annotation.labels and not annotation.spanned:
        meta = {key: value for key, value in meta.items() if key not in annotation.labels or key == TASK}
    said = Message("assistant", judgement(annotation, data))
    return [checked([*question(data, as_turns=False), said], origin, data, meta)]


def one_of(
    answers: list[str], number: int, asked: list[Message], origin: Origin, data: Row, meta: dict[str, Any]
) -> Sample | Refused:
    here = Origin(origin.file, origin.line, origin.part + number)
    answer = answers[number - 1]
    try:
        return checked([*asked, Message("assistant", answer)], here, data, meta)
    except RowError as error:
        return Refused(here, error.reason, answer)


def judgement(annotation: Annotation, data: Row) -> str:
    """What was marked or chosen, as an answer."""
    if annotation.spanned:
        asked_for = any(isinstance(data.get(key), str) for key in QUESTION)
        return "\n".join(span.text for span in annotation.spans) if asked_for else marked(annotation)
    if annotation.labels:
        fields = {name: ", ".join(chosen) for name, chosen in annotation.labels.items()}
        alone = len(fields) == 1
        return "\n".join(chosen if alone else f"{name}: {chosen}" for name, chosen in fields.items())
    raise RowError("only a rating; there is no answer to train on" if annotation.ratings else "the annotation is empty")


def marked(annotation: Annotation) -> str:
    entities = [span.as_dict() for span in annotation.spans]
    if not annotation.relations:
        return json.dumps(entities, ensure_ascii=False)
    relations = [relation.as_dict() for relation in annotation.relations]
    return json.dumps({"entities": entities, "relations": relations}, ensure_ascii=False)


def checked(messages: list[Message], origin: Origin, data: Row, meta: dict[str, Any]) -> Conversation:
    check_order(messages)
    check_answered(messages)
    return Conversation(tuple(messages), origin, read_tools(data.get("tools")), others(data) | meta)


def others(data: Row) -> dict[str, Any]:
    """The fields of a task that are not put to the model; `meta` is what `data push` sent along."""
    along = data.get("meta")
    left = {key: value for key, value in data.items() if key not in (*KNOWN, "tools") and value not in (None, "", [])}
    if isinstance(along, dict):
        del left["meta"]
        left |= {key: value for key, value in along.items() if key not in left}
    return left


def question(data: Row, as_turns: bool) -> list[Message]:
    """What is asked: a dialogue as turns, or as one text where it is judged; else the fields of known names."""
    system = text_of(data, "system")
    head = [Message("system", system)] if system.strip() else []
    if as_turns and (dialogue := chat_of(data)):
        turns = [openai.message(one, number) for number, one in enumerate(dialogue, 1)]
        return turns if turns[0].role == "system" else [*head, *turns]
    said = [text_of(data, key) for key in (*ASKED[1:], *ABOUT)]
    said += [script(dialogue_of(data)), *(text_of(data, key) for key in QUESTION)]
    asked = "\n\n".join(part for part in said if part.strip())
    if not asked:
        texts = [key for key, value in data.items() if isinstance(value, str) and value.strip()]
        if len(texts) != 1:
            raise RowError(
                f"which of the fields {', '.join(map(str, data))[:100] or '(none)'} is asked is not known; "
                "say `columns: {prompt: NAME}`"
            )
        asked = data[texts[0]]
    return [*head, Message("user", asked)]


def text_of(data: Row, key: str) -> str:
    value = data.get(key)
    return value if isinstance(value, str) else ""


def dialogue_of(data: Row) -> list[dict[str, Any]]:
    """The task's dialogue as it stands, a list of {role, content} or of {author, text}; [] when it has none."""
    for key in DIALOGUE:
        listed = data.get(key)
        if isinstance(listed, list) and listed and all(isinstance(one, dict) for one in listed):
            for who, what in (("role", "content"), ("author", "text")):
                if all(isinstance(one.get(who), str) and isinstance(one.get(what), str | None) for one in listed):
                    return listed
    return []


def script(dialogue: list[dict[str, Any]]) -> str:
    """A dialogue as one text, where it is not gone on with but judged."""
    return "\n".join(f"{one.get('role', one.get('author'))}: {one.get('content', one.get('text'))}" for one in dialogue)


def chat_of(data: Row) -> list[dict[str, Any]]:
    """The task's dialogue as {role, content}; of {author, text} the last author is the user."""
    dialogue = dialogue_of(data)
    if dialogue and "role" not in dialogue[0]:
        return spoken([(one["author"], one.get("text") or "") for one in dialogue])
    return dialogue


def spoken(lines: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """A dialogue of two as turns: whoever spoke last is the user; what one says in a row is one turn."""
    people = list(dict.fromkeys(author for author, _ in lines))
    known = all(author.strip().lower() in ROLES for author in people)
    if len(people) > 2 and not known:
        raise RowError(f"a dialogue of {len(people)} people; only two can be user and assistant")
    turns: list[dict[str, Any]] = []
    for author, text in lines:
        role = author if known else "user" if author == lines[-1][0] else "assistant"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n" + text
        else:
            turns.append({"role": role, "content": text})
    return turns


# --- preferences -------------------------------------------------------------------------------------------------

MOST_CANDIDATES = 50
SIDES = re.compile(r"(.*?)[ _-]?(1|2|a|b|left|right|one|two)", re.IGNORECASE)


def pairs(data: Row, annotation: Annotation, origin: Origin, meta: dict[str, Any]) -> list[Sample | Refused]:
    """A pair for every two candidates of a ranking, the better one chosen."""
    candidates = sides(data) if set(annotation.order) == {"left", "right"} else items(data)
    missing = [key for key in annotation.order if key not in candidates]
    if missing:
        raise RowError(f"the ranking names {missing[0]!r}, which the task does not have")
    if len(annotation.order) > MOST_CANDIDATES:
        raise RowError(f"a ranking of {len(annotation.order)}, more than {MOST_CANDIDATES}")
    used = {key for key, value in data.items() if value in candidates.values() or isinstance(value, list)}
    prompt = question({key: value for key, value in data.items() if key not in used or key in DIALOGUE}, as_turns=True)
    ordered = [candidates[key] for key in annotation.order]
    found: list[Sample | Refused] = []
    left = {key: value for key, value in others(data).items() if key not in used}
    for better, good in enumerate(ordered):
        for bad in ordered[better + 1 :]:
            here = Origin(origin.file, origin.line, origin.part + len(found) + 1) if len(ordered) > 2 else origin
            try:
                if good == bad:
                    raise RowError("the two answers are the same")
                chosen = Message("assistant", good)
                check_order([*prompt, chosen])
                check_order([*prompt, Message("assistant", bad)])
                found.append(Pair(tuple(prompt), chosen, Message("assistant", bad), here, left | meta))
            except RowError as error:
                found.append(Refused(here, error.reason, {"chosen": good, "rejected": bad}))
    if not found:
        raise RowError("a ranking of one candidate says nothing")
    return found


def sides(data: Row) -> dict[str, str]:
    """The two candidates of a comparison: `left` and `right`, else two fields named alike, answer1 and answer2."""
    if all(isinstance(data.get(key), str) for key in ("left", "right")):
        return {"left": data["left"], "right": data["right"]}
    alike: dict[str, list[str]] = {}
    for key, value in data.items():
        named = SIDES.fullmatch(str(key))
        if named and isinstance(value, str):
            alike.setdefault(named[1], []).append(key)
    couples = [sorted(keys) for keys in alike.values() if len(keys) == 2]
    if len(couples) != 1:
        raise RowError("which fields were compared is not known; say `columns: {left: NAME, right: NAME}`")
    return {"left": data[couples[0][0]], "right": data[couples[0][1]]}


def items(data: Row) -> dict[str, str]:
    """The candidates of a ranking by their ids: the list of objects with id and text (body, html or title)."""
    listed = data.get("items")
    if not isinstance(listed, list):
        lists = [
            value for key, value in data.items() if key not in DIALOGUE and isinstance(value, list) and value
            and all(isinstance(one, dict) and "id" in one for one in value)
        ]  # fmt: skip
        if len(lists) != 1:
            raise RowError("which list was ranked is not known; say `columns: {items: NAME}`")
        listed = lists[0]
    found = {}
    for one in listed:
        said = next((one[key] for key in ("body", "text", "html", "title") if isinstance(one.get(key), str)), None) \
            if isinstance(one, dict) else None  # fmt: skip
        if said is None:
            raise RowError("a candidate without a text (body, text, html or title)")
        found[str(one.get("id"))] = said
    return found
