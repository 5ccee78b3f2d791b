"""The prepared samples of a recipe in the forms of other tools."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Recipe
from ..errors import CheckError, RequestError
from .preparing import prepare_data
from .working import Screen, chat_of, run_directory, working

if TYPE_CHECKING:
    from ..chat.types import Sample

FORMS = ("openai", "alpaca", "sharegpt", "hf", "label-studio")
PARTS = ("train", "validation", "test")
LONGEST = 65_536  # tokens of a line that OpenAI's models for fine-tuning take


@dataclass
class Written:
    """What was written: rows by part; samples = rows + left out, by reason. `tokens` (openai) by part, as counted by
    `counted_with`; `cost` is the training part's for one epoch, where a price was given."""

    form: str
    folder: Path
    rows: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    counted_with: str = ""
    cost: float | None = None
    files: list[str] = field(default_factory=list)


def export_data(
    recipe: Recipe,
    form: str,
    to: Path | None = None,
    *,
    price: float | None = None,
    longest: int = LONGEST,
    out: str | Path | None = None,
    screen: Screen | None = None,
) -> Written:
    """Prepares the data where that has not been done and writes its parts in a form; `price` is of a million tokens.

    What the form cannot say is left out, counted, and written to left_out.jsonl with the reason.
    """
    from ..data.prepare import kept_samples
    from ..files import staged_folder, write_jsonl

    if form not in FORMS:
        raise RequestError(f"the form {form!r} is not known", where="--format", hint=f"Known are {', '.join(FORMS)}.")
    to = to or Path(f"{recipe.name}-{form}")
    if to.exists():
        raise RequestError("this folder exists already", where=str(to), hint="Choose another with --to.")
    screen = screen or Screen()
    directory = run_directory(recipe, out)
    with working(directory, recipe, screen):
        chat = chat_of(recipe)
        _, report = prepare_data(recipe, directory, chat, screen)
        result = Written(form, to)
        left: list[dict[str, Any]] = []

        def count(text: str) -> int:
            return len(chat.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

        with staged_folder(to) as folder:
            for part in PARTS:
                rows = list(_rows(kept_samples(directory, part), form, part, left, result, count, longest))  # type: ignore[arg-type]
                if rows:
                    result.rows[part] = len(rows)
                    result.files.append(_write(rows, form, folder, part))
            if form == "label-studio":
                result.files.append(_interface(folder, directory))
            if form == "hf":
                result.files.append(_card(folder, recipe, result, report))
            if left:
                write_jsonl(folder / "left_out.jsonl", left)
                result.files.append("left_out.jsonl")
    result.left_out = dict(Counter(row["reason"] for row in left).most_common())
    kept = sum(report["kept"].values())
    if kept != sum(result.rows.values()) + len(left):
        raise CheckError(f"{kept} samples were kept and {sum(result.rows.values()) + len(left)} are accounted for")
    if form == "openai":
        result.counted_with = recipe.model.base
        if price is not None:
            result.cost = result.tokens.get("train", 0) * price / 1e6
    return result


def _rows(
    samples: Iterator[Sample],
    form: str,
    part: str,
    left: list[dict[str, Any]],
    result: Written,
    count: Callable[[str], int],
    longest: int,
) -> Iterator[dict[str, Any]]:
    from ..data import writers
    from ..data.rows import as_row

    for sample in samples:
        try:
            row = _row(sample, form)
            if form == "openai":
                if faults := writers.openai_faults(row):
                    raise writers.Unwritable(faults[0])
                tokens = writers.openai_tokens(row, count)
                if tokens > longest:
                    raise writers.Unwritable(f"more than {longest:,} tokens")
                result.tokens[part] = result.tokens.get(part, 0) + tokens
        except writers.Unwritable as error:
            left.append({"part": part, "reason": str(error), "row": as_row(sample)})
            continue
        yield row


def _row(sample: Sample, form: str) -> dict[str, Any]:
    from ..data import writers

    if form != "label-studio":
        forms: dict[str, Callable[[Sample], dict[str, Any]]] = {
            "openai": writers.as_openai_finetuning,
            "alpaca": writers.as_alpaca,
            "sharegpt": writers.as_sharegpt,
            "hf": writers.as_openai,
        }
        return forms[form](sample)
    from ..data.annotate.label_studio_server import as_task
    from ..data.annotate.tasks import Task, task_of
    from ..data.readers import RawRow

    task = task_of(sample, RawRow({}, sample.origin))
    if not isinstance(task, Task):
        raise writers.Unwritable(task)
    return as_task(task, "as it was", {task.label: []} if task.label else {})


def _write(rows: Sequence[dict[str, Any]], form: str, folder: Path, part: str) -> str:
    from ..files import write_json, write_jsonl

    if form == "hf":
        return _parquet(rows, folder, part)
    if form in ("alpaca", "sharegpt", "label-studio"):
        write_json(folder / f"{part}.json", list(rows))
        return f"{part}.json"
    write_jsonl(folder / f"{part}.jsonl", rows)
    return f"{part}.jsonl"


def _parquet(rows: Sequence[dict[str, Any]], folder: Path, part: str) -> str:
    """A Parquet file whose columns have one type each: text stays text, what varies becomes JSON text."""
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, list[Any]] = {}
    names = list(dict.fromkeys(key for row in rows for key in row))
    for name in names:
        values = [row.get(name) for row in rows]
        columns[name] = [_messages(value) for value in values] if name in TURNS else _one_type(values)
    name = f"data/{part}-00000-of-00001.parquet"
    (folder / "data").mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / name)
    return name


TURNS = ("messages", "prompt", "chosen", "rejected")


def _messages(turns: Any) -> Any:
    if not isinstance(turns, list):
        return turns
    return [
        {
            key: value if isinstance(value, str | bool) else json.dumps(value, ensure_ascii=False)
            for key, value in turn.items()
        }
        for turn in turns
    ]


def _one_type(values: list[Any]) -> list[Any]:
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) == 1 and kinds <= {str, int, float, bool}:
        return values
    return [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]


def _interface(folder: Path, directory: Any) -> str:
    from ..data.annotate.label_studio import interface
    from ..data.annotate.tasks import Task, levels, task_of
    from ..data.prepare import kept_samples
    from ..data.readers import RawRow
    from ..files import write_text

    sent = [task_of(sample, RawRow({}, sample.origin)) for part in PARTS for sample in kept_samples(directory, part)]  # type: ignore[arg-type]
    write_text(folder / "interface.xml", interface(levels([task for task in sent if isinstance(task, Task)])) + "\n")
    return "interface.xml"


def _card(folder: Path, recipe: Recipe, result: Written, report: dict[str, Any]) -> str:
    """The README.md that tells the `datasets` library where the parts are, and people where they came from."""
    import yaml

    from ..files import write_text

    files = [{"split": part, "path": f"data/{part}-*.parquet"} for part in result.rows]
    head = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": files}]}, sort_keys=False)
    sources = "\n".join(f"- {source['path']}: {source['samples']:,} samples" for source in report["sources"])
    counts = ", ".join(f"{count:,} {part}" for part, count in result.rows.items())
    text = f"---\n{head}---\n\n# {recipe.name}\n\nPrepared by Fitout: {counts}.\n\n{sources}\n"
    write_text(folder / "README.md", text)
    return "README.md"
