"""Row formats: what the columns of a row mean. Each turns a row into samples or says why not.

A new format is one file with a plug (see `plug.Format`) and one entry in FORMATS. Reading files is not done here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from ...chat.types import Sample
from ...errors import DataError
from ..readers import RawRow
from .alpaca import Alpaca
from .doccano import Doccano, FastText
from .label_studio import LabelStudio, LabelStudioMin
from .oasst import Oasst, OasstPairs
from .openai import OpenAI
from .plug import Columns, Format, Refused, Row, RowError, renamed
from .preference import Preference
from .prompt_completion import PromptCompletion
from .published import Clinc, CrossWoz, Gsm8kSolutions
from .sharegpt import ShareGPT
from .text import PlainText

__all__ = ["FORMATS", "Columns", "Format", "Refused", "Row", "RowError", "choose", "convert", "detect"]

#: In order of how much they ask of a row; the first that fits the most rows is taken.
FORMATS: tuple[Format, ...] = (
    LabelStudio(),
    LabelStudioMin(),
    Clinc(),
    CrossWoz(),
    Gsm8kSolutions(),
    Oasst(),
    OasstPairs(),
    Doccano("doccano"),
    Doccano("doccano_labels", "labels"),
    Doccano("doccano_answers", "answers"),
    FastText(),
    Preference(),
    ShareGPT(),
    OpenAI(),
    Alpaca(),
    PromptCompletion(),
    PlainText(),
)


def convert(plug: Format, row: RawRow, columns: Columns | None = None) -> Iterator[Sample | Refused]:
    """The samples of a row and what of it is none; a row that is bad as a whole is one Refused."""
    try:
        yield from plug.convert(row.row, row.origin, columns)
    except RowError as error:
        yield Refused(row.origin, error.reason, row.row)


def choose(rows: Sequence[Row], name: str | None = None, columns: Columns | None = None, where: str = "") -> Format:
    """The format of a source: the named one, else the detected. `rows` are some of its rows, for detection and checks.

    Raises DataError when nothing fits, and when `columns` names what neither the format nor the rows have.
    """
    if columns:
        check_columns_exist(rows, columns, where)
    if name is None:
        plug = detect(rows, columns, where)
    else:
        plug = next((plug for plug in FORMATS if plug.name == name), None) or unknown_format(name, where)
    for ours in columns or {}:
        if ours not in plug.fields:
            raise DataError(
                f"`columns` maps {ours!r}, which the format {plug.name} does not read",
                where=where,
                harm="The column would be left out without a word.",
                hint=f"It reads {', '.join(plug.fields)}." + did_you_mean(ours, plug.fields),
            )
    return plug


def detect(rows: Sequence[Row], columns: Columns | None = None, where: str = "") -> Format:
    """The format that fits the most of the rows. Raises DataError with the keys seen and the formats known."""
    rows = [renamed(row, columns) for row in rows]
    fits = {plug.name: sum(plug.matches(row) for row in rows) for plug in FORMATS}
    best = max(FORMATS, key=lambda plug: fits[plug.name])
    if fits[best.name]:
        return best
    seen = Counter(key for row in rows for key in row)
    keys = ", ".join(str(key)[:40] for key, _ in seen.most_common(12)) or "none"
    texts = [key for key, _ in seen.most_common() if any(isinstance(row.get(key), str) for row in rows)]
    asked, answered = (texts + ["QUESTION", "ANSWER"])[:2] if len(texts) >= 2 else ("QUESTION", "ANSWER")
    known = "\n".join(f"  {plug.name}: {plug.keys}" for plug in FORMATS)
    raise DataError(
        f"the format of the rows is not recognised; the keys seen are: {keys}",
        where=where,
        harm="Guessing could train on the wrong column.",
        hint=f"Say which column is which, for example `columns: {{prompt: {asked}, completion: {answered}}}`. "
        f"Known formats:\n{known}",
    )


def check_columns_exist(rows: Sequence[Row], columns: Columns, where: str) -> None:
    seen = sorted({str(key) for row in rows for key in row})
    for ours, theirs in columns.items():
        if rows and theirs not in seen:
            raise DataError(
                f"`columns` names {theirs!r} for {ours!r}, and no row has it",
                where=where,
                harm="Every row would lack that field.",
                hint=f"The rows have {', '.join(seen[:12]) or 'no keys'}." + did_you_mean(theirs, seen),
            )


def unknown_format(name: str, where: str) -> Format:
    names = [plug.name for plug in FORMATS]
    raise DataError(
        f"the format {name!r} is not known",
        where=where,
        harm="Its rows could be read wrongly.",
        hint=f"Known are {', '.join(names)}." + did_you_mean(name, names),
    )


def did_you_mean(word: str, words: Sequence[str]) -> str:
    near = get_close_matches(word, words, 1, 0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
