"""What `fitout init` finds out before it writes: the form and lengths of the data, the shape of the model.

Nothing is written and nothing is fetched: a hub model that is not on this machine has no shape here.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..data import HUB_ID
from ..errors import DataError, ModelError, RequestError
from ..model.shape import Shape, read_shape

LOOKED_AT = 2000  # samples whose lengths are measured
MOST_LABELS = 200  # different answers that can be a label set
LONGEST = 32_768  # tokens; longer samples count as too long when lengths are measured


@dataclass(frozen=True)
class Seen:
    """A data file or folder: every row was read and converted once. `labels` are the different answers, most frequent
    first, when they are few and come again and again; empty otherwise."""

    path: str  # absolute, or a hub id
    form: str
    samples: int
    bad: int
    labels: tuple[str, ...]
    answer_characters: float  # of a middling answer
    characters: float  # of an average sample
    pairs: bool = False  # a chosen and a rejected answer each

    @property
    def stem(self) -> str:
        """A short name: of the file without its endings, or of the hub's data set."""
        hub = HUB_ID.fullmatch(self.path)
        return hub["name"].rpartition("/")[2] if hub else Path(Path(self.path).name.removesuffix(".gz")).stem

    @property
    def plain(self) -> bool:
        return self.form == "text"

    @property
    def objective(self) -> str:
        """What trains on such samples."""
        return "pretrain" if self.plain else "orpo" if self.pairs else "sft"

    def told(self) -> str:
        bad = f"; {self.bad:,} bad rows go to quarantine (`fitout data check` names them)" if self.bad else ""
        return f"{self.samples:,} samples, read as {self.form}{bad}"


@dataclass(frozen=True)
class Base:
    """A base model as the recipe names it. `folder` is where its files are on this machine, when they are."""

    name: str
    folder: str | None
    shape: Shape | None
    note: str

    @property
    def small(self) -> bool:
        """As small as the embedded model, which takes larger learning rates (docs/methods.md)."""
        return self.shape is not None and self.shape.hidden < 512


@dataclass(frozen=True)
class Lengths:
    """Tokens of the first samples: the longest, what 99 % stay under, and the same of their trained tokens. `too_long`
    are those that the model has no positions for, `rows` all that would be trained (a text gives several blocks)."""

    samples: int
    rows: int
    longest: int
    most: int
    answers: int
    too_long: int


def look_at_data(path: str) -> Seen:
    """Reads every row of a file, a folder or a hub id. Raises DataError when nothing is there, or the form is not
    known."""
    from ..chat.types import Pair, Text
    from ..data.formats import Refused, choose, convert
    from ..data.sources import RawRow, named, probe, read

    source = named(path)
    plug = choose(probe(source, Path()), where=path)
    samples = bad = characters = pairs = 0
    answers: Counter[str] = Counter()
    sizes = []
    for row in read(source, Path()):
        if not isinstance(row, RawRow):
            bad += 1
            continue
        for sample in convert(plug, row):
            if isinstance(sample, Refused):
                bad += 1
                continue
            samples += 1
            if isinstance(sample, Text):
                characters += len(sample.text)
            else:
                if isinstance(sample, Pair):
                    pairs += 1
                    sample, other = sample.answered
                    characters += len(other.messages[-1].content)
                answer = sample.messages[-1].content
                characters += sum(len(message.content) for message in sample.messages)
                if samples <= LOOKED_AT:
                    sizes.append(len(answer))
                if len(answers) <= MOST_LABELS:
                    answers[answer.strip()] += 1
    if not samples:
        raise DataError(f"none of its {bad:,} rows is a sample", where=path, hint=f"See: fitout data check {path}")
    few = 2 <= len(answers) <= min(MOST_LABELS, samples / 5)
    labels = tuple(label for label, _ in answers.most_common() if label) if few else ()
    middling = median(sizes) if sizes else 0.0
    if 0 < pairs < samples:
        raise DataError(
            f"{pairs:,} of {samples:,} samples are preference pairs, the others are not",
            where=path,
            hint="Give each kind a file of its own.",
        )
    lasting = path if HUB_ID.fullmatch(path) else str(Path(path).expanduser().resolve())
    return Seen(lasting, plug.name, samples, bad, labels, middling, characters / samples, pairs > 0)


def look_at_model(name: str) -> Base:
    """Raises ModelError for a folder that is none."""
    from ..model import EMBEDDED
    from ..model.load import resolve

    found = resolve(name)
    if found.adapter:
        raise RequestError(
            "this is an adapter, not a base model",
            where=name,
            hint=f"Name its base ({found.base}); to go on from the adapter set model.adapter in the recipe.",
        )
    here = Path(found.base).exists()
    folder = found.base if here else _cached(found.base)
    said = str(Path(name).resolve()) if here and name != EMBEDDED else name
    if folder is None:
        return Base(said, None, None, "it is not on this machine yet, so its sizes and what fits are not known")
    if not (Path(folder) / "config.json").exists():
        raise ModelError("this folder has no config.json", where=name, hint="Give a Hugging Face model folder.")
    try:
        shape = read_shape(folder)
    except ModelError as error:
        return Base(said, folder, None, error.message)
    note = f"{shape.family}, {shape.parameters / 1e6:,.1f} M parameters, {shape.layers} layers of width {shape.hidden}"
    return Base(said, folder, shape, note + (f", {shape.context:,} positions" if shape.context else ""))


def _cached(hub_id: str) -> str | None:
    """The folder of a hub model that was downloaded before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(hub_id, "config.json")
    except HFValidationError as error:
        raise ModelError("this is no folder and no hub id", where=hub_id, hint="A hub id is owner/name.") from error
    return str(Path(found).parent) if isinstance(found, str) else None


def measure(seen: Seen, base: Base) -> Lengths | None:
    """Tokenises the first samples as training would; None where the model's tokenizer is not here."""
    from .. import verbs
    from ..config import build

    if base.folder is None:
        return None
    limit = min((base.shape.context if base.shape else None) or LONGEST, LONGEST)
    raw: dict[str, Any] = {
        "name": "look",
        "model": {"base": base.folder},
        "data": {
            "sources": [{"path": seen.path, "limit": LOOKED_AT}],
            "split": {"train": 1, "validation": 0, "test": 0},
            "max_length": block(limit) if seen.plain else limit,
        },
        "objective": {"kind": seen.objective},
    }
    with tempfile.TemporaryDirectory(prefix="fitout-init-") as folder:
        try:
            view = verbs.xray(build(raw), out=folder)
        except ModelError:
            return None
        part = view.part
        trained = [int(part.train_on(row).sum()) for row in range(len(part))]
        return Lengths(
            samples=view.report["kept"]["train"],
            rows=len(np.unique(part.groups)),
            longest=int(part.lengths.max()),
            most=int(np.quantile(part.lengths, 0.99, method="higher")),
            answers=int(np.quantile(trained, 0.99, method="higher")),
            too_long=view.report["removed"].get("too long", 0),
        )


def block(context: int | None) -> int:
    """Tokens of the blocks that plain text is cut into."""
    return min(context or 1024, 1024)
