"""ROWS. From a file, folder or hub id to prepared, ordered, resumable batches.

Here live the readers (sources), the row formats, the edits (clean, dedupe, split), the findings (lint), the prepared
store and the order of batches. What a sample looks like as tokens is not decided here but in `chat`; what is minimised
over a batch is not decided here but in `objectives`.
"""

from __future__ import annotations

import math
import re
from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Part = Literal["train", "validation", "test"]
Fix = Literal["off", "report", "fix"]
Drop = Literal["off", "report", "drop"]
Kind = Literal["email", "phone", "card", "iban", "id"]

#: hf://owner/name, hf://owner/name/config, either with :split (train when absent); ms:// is the same on ModelScope.
HUB_ID = re.compile(
    r"(?P<hub>hf|ms)://(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.-]+))?", re.ASCII
)

# Codecs that Python counts as text but that are escapes, not encodings: they can make halves of surrogate pairs.
ESCAPES = {"unicode-escape", "raw-unicode-escape", "utf-7", "idna", "punycode", "undefined"}


class SourceSettings(BaseModel):
    """One place that rows come from.

    path      a file, a folder (all known files in it, sorted), `hf://owner/name[/config][:split]` or the same with `ms://`
    format    a row format by name; detected from the rows when absent
    columns   our field -> the file's column, for files whose columns are named otherwise
    weight    how often a training row of this source is seen an epoch: 2 is twice, 0.5 a seeded half of the rows
    share     the share of this source in the training rows of an epoch, exactly: 0.1 of general data against forgetting
    limit     read at most this many rows
    split     all rows of this source are this part; other sources then give that part nothing
    encoding  of text files; Parquet and the hub have their own
    """

    model_config = ConfigDict(extra="forbid")

    path: str = Field(min_length=1)
    format: str | None = None
    columns: dict[str, str] | None = None
    weight: float = Field(default=1.0, gt=0, le=1000)
    share: float | None = Field(default=None, gt=0, le=1)
    limit: int | None = Field(default=None, ge=1)
    split: Part | None = None
    encoding: str = "utf-8"

    @field_validator("path")
    @classmethod
    def _path(cls, path: str) -> str:
        if "\0" in path:
            raise ValueError("a path cannot hold a NUL character")
        if re.match(r"(hf|ms):", path) and not HUB_ID.fullmatch(path):
            raise ValueError(
                f"{path!r} is not a hub id; write hf://owner/name, hf://owner/name:split or ms://owner/name"
            )
        return path

    @field_validator("format")
    @classmethod
    def _format(cls, name: str | None) -> str | None:
        from .formats import FORMATS  # here, not above: the formats live under this door

        names = [plug.name for plug in FORMATS]
        if name is not None and name not in names:
            near = get_close_matches(name, names, 1, 0.5)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown format {name!r} (known: {', '.join(names)}){meant}")
        return name

    @field_validator("encoding")
    @classmethod
    def _encoding(cls, encoding: str) -> str:
        try:
            "".encode(encoding)
        except (LookupError, UnicodeError, ValueError):
            raise ValueError(f"unknown text encoding {encoding!r}; try utf-8, utf-16, gb18030, cp1252") from None
        if encoding.lower().replace("_", "-") in ESCAPES:
            raise ValueError(f"{encoding!r} is an escape, not the encoding of a data file")
        return encoding

    @model_validator(mode="after")
    def _weight_has_effect(self) -> SourceSettings:
        if self.weight != 1 and self.share is not None:
            raise ValueError("give `weight` or `share`, not both: each decides how often a row is seen")
        if (self.weight != 1 or self.share is not None) and self.split in ("validation", "test"):
            raise ValueError(f"weight has no effect with split: {self.split}; only training rows are weighted")
        return self


class SplitSettings(BaseModel):
    """Shares of the rows for training, validation and test.

    Rows with the same or nearly the same prompt always share a part, and every part has its share of every task.

    group   a column whose equal values must not be parted either: a conversation, an author, a document
    """

    model_config = ConfigDict(extra="forbid")

    train: float = Field(default=0.8, ge=0, le=1)
    validation: float = Field(default=0.1, ge=0, le=1)
    test: float = Field(default=0.1, ge=0, le=1)
    group: str | None = None

    @model_validator(mode="after")
    def _sums_to_one(self) -> SplitSettings:
        total = self.train + self.validation + self.test
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise ValueError(f"train + validation + test is {total:g}, it must be 1")
        return self


class MeaningSettings(BaseModel):
    """Duplicates by meaning: an encoder's folder (transformers), and from which cosine on two prompts mean the same."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1)
    similarity: float = Field(default=0.95, gt=0, le=1)


class DeduplicateSettings(BaseModel):
    """Rows that say what another row says. `deduplicate: false` looks for none.

    exact       the same content up to white space: the first stays
    near        almost the same: off, report (found, shown, kept), drop. Prompts that are nearly the same share a part
                in any case but off
    similarity  from which likeness on (docs/data.md says how it is measured)
    keep        which row of a cluster stays: the one with the longest answer, the first, or a column's name (the
                highest number)
    meaning     also rows that mean the same, where an encoder is given; treated as `near` says
    """

    model_config = ConfigDict(extra="forbid")

    exact: bool = True
    near: Drop = "report"
    similarity: float = Field(default=0.8, ge=0.5, le=1)
    keep: str = Field(default="longest", min_length=1)
    meaning: MeaningSettings | None = None

    @field_validator("near", mode="before")
    @classmethod
    def _yaml_switch(cls, value: object) -> object:
        """YAML 1.1 reads a bare `off` as false."""
        return "off" if value is False else value


class BenchmarkSettings(BaseModel):
    """Files of test questions that must not stand in the training rows.

    action   of a sample that holds one: drop it, or only report it
    overlap  share of a question (by weight) that a sample must hold
    """

    model_config = ConfigDict(extra="forbid")

    files: list[str] = Field(min_length=1)
    action: Literal["report", "drop"] = "drop"
    overlap: float = Field(default=0.7, ge=0.5, le=1)


class PersonalSettings(BaseModel):
    """Personal data in any turn: `off`, only `report` (counted), `mask` ([EMAIL], [PHONE], ...) or `drop` the sample.

    kinds    e-mail addresses, telephone numbers, payment cards, bank accounts, identity numbers; the last three only
             where the check digits are right
    regions  countries (US, CN, ...) whose telephone numbers are also found without their international prefix
    """

    model_config = ConfigDict(extra="forbid")

    action: Literal["off", "report", "mask", "drop"] = "report"
    kinds: list[Kind] = ["email", "phone", "card", "iban", "id"]
    regions: list[str] = []

    @field_validator("regions")
    @classmethod
    def _known(cls, regions: list[str]) -> list[str]:
        from phonenumbers import SUPPORTED_REGIONS

        unknown = sorted(set(regions) - set(SUPPORTED_REGIONS))
        if unknown:
            raise ValueError(f"unknown country {unknown[0]!r}; two capital letters, as in US, CN, DE")
        return regions


class CleanSettings(BaseModel):
    """Rules over single samples, each counted and shown with examples. What changes text by default is only damage.

    end_markers         literal <|endoftext|> and the like at the end of an answer
    control_characters  NUL, escape and others that no text means; byte order marks inside a text
    mojibake            text that was decoded wrongly (ftfy)
    unicode             letters whose accents are stored apart (not NFC)
    html                tags and entities left in a text that does not speak of HTML
    refusals            boilerplate such as "As an AI language model"
    copied              answers that only repeat the question
    language            answers in another language than their question, or than `languages` where it is given
    personal            personal data; `personal: mask` for short
    """

    model_config = ConfigDict(extra="forbid")

    end_markers: Fix = "fix"
    control_characters: Fix = "fix"
    mojibake: Fix = "fix"
    unicode: Fix = "report"
    html: Fix = "report"
    refusals: Drop = "report"
    copied: Drop = "report"
    language: Drop = "report"
    languages: list[Annotated[str, Field(pattern=r"^[a-z]{2,3}(-[A-Za-z]+)?$")]] = []  # codes: en, zh, zh-Hant
    personal: PersonalSettings = PersonalSettings()

    @field_validator("end_markers", "control_characters", "mojibake", "unicode", "html", "refusals", "copied",
                     "language", mode="before")  # fmt: skip
    @classmethod
    def _yaml_switch(cls, value: object) -> object:
        """YAML 1.1 reads a bare `off` as false."""
        return "off" if value is False else value

    @field_validator("personal", mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        value = "off" if value is False else value
        return {"action": value} if isinstance(value, str) else value


class TaskRule(BaseModel):
    """A task for samples whose prompt contains one of these texts (case aside), or matches a regular expression."""

    model_config = ConfigDict(extra="forbid")

    task: str = Field(min_length=1)
    contains: list[str] = []
    matches: str | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> TaskRule:
        if not self.contains and self.matches is None:
            raise ValueError("a rule needs `contains` or `matches`")
        if self.matches is not None:
            try:
                re.compile(self.matches)
            except re.error as error:
                raise ValueError(f"`matches` is no regular expression: {error}") from None
        return self


class TaskSettings(BaseModel):
    """What each sample is an exercise in, on two levels: `logical reasoning / common sense`.

    field    a column (`task / sub-task`, a choice or a list of choices), two columns [task, sub-task], or `file`: the
             file's name up to its first underscore, and the rest
    rules    for samples that the field says nothing of; the first that fits
    suggest  what is still without a task gets the one that a classifier, trained on the others, is sure of
    weights  task or `task / sub-task` -> how often its training samples are seen an epoch
    caps     the same -> at most so many training samples
    """

    model_config = ConfigDict(extra="forbid")

    field: str | list[str] | None = None
    rules: list[TaskRule] = []
    suggest: bool = False
    weights: dict[str, float] = {}
    caps: dict[str, int] = {}

    @model_validator(mode="after")
    def _sensible(self) -> TaskSettings:
        if isinstance(self.field, list) and len(self.field) != 2:
            raise ValueError("`field` is a column, or two: [task, sub-task]")
        if any(not (weight > 0 and math.isfinite(weight)) for weight in self.weights.values()):
            raise ValueError("weights must be above zero")
        if any(cap < 1 for cap in self.caps.values()):
            raise ValueError("caps must be at least one")
        return self


class BalanceSettings(BaseModel):
    """Training samples chosen so that they are spread as one wants.

    by     length (tokens of a sample), position (of the key information in the prompt: head, middle, tail), or phrasing
           (the first words of the prompt)
    to     `equal`, or a share for each class: {head: 1, middle: 1, tail: 2}. What it does not name
           stays as it is
    cap    at most this share of all that there were (below 1) or so many (from 1) of each class
    how    drop what is too many, or repeat what is too few (at most four times)
    edges  where one class of lengths ends and the next begins; without it the quartiles
    """

    model_config = ConfigDict(extra="forbid")

    by: Literal["length", "position", "phrasing"]
    to: Literal["equal"] | dict[str, float] | None = None
    cap: float | None = Field(default=None, gt=0)
    how: Literal["drop", "repeat"] = "drop"
    edges: list[int] | None = None

    @model_validator(mode="after")
    def _sensible(self) -> BalanceSettings:
        if (self.to is None) == (self.cap is None):
            raise ValueError("give either `to` (a distribution) or `cap` (the most of each class)")
        if self.by == "phrasing" and self.to is not None:
            raise ValueError("phrasings can only be capped (`cap`)")
        if isinstance(self.to, dict) and not any(share > 0 for share in self.to.values()):
            raise ValueError("`to` needs a share above zero")
        if isinstance(self.to, dict) and any(share < 0 for share in self.to.values()):
            raise ValueError("a share cannot be below zero")
        if self.edges is not None and (self.by != "length" or sorted(set(self.edges)) != self.edges):
            raise ValueError("`edges` are rising lengths, for `by: length`")
        return self


class PositionSettings(BaseModel):
    """Where in the prompt the key information stands.

    field    a column that says: head, middle or tail, or holds the key passage itself; measured by what prompt and
             answer have in common where it is absent
    augment  training samples whose key passage is marked also come with it moved to the head, the middle, the tail
    """

    model_config = ConfigDict(extra="forbid")

    field: str | None = None
    augment: bool = False

    @model_validator(mode="after")
    def _marked(self) -> PositionSettings:
        if self.augment and self.field is None:
            raise ValueError("`augment` needs `field`: the column that holds the key passage")
        return self


class DataSettings(BaseModel):
    """What to train on, and how it is cut up.

    repairs      file of accepted repairs (`fitout data repair`); by default repairs.jsonl in the run directory
    split_seed   draws the split (and what weights repeat or leave out); train.seed where it is not given. A value of
                 its own keeps the parts the same while train.seed changes
    max_length   tokens a sample may have; `too_long` says what happens to longer ones
    packing      several samples to a forward pass, each attending only to itself
    clean        what is looked for in single samples, and what happens to it
    deduplicate  rows that say what another row says (counted, and named in the report); false for none of it
    benchmarks   files whose questions must not stand in the training rows
    tasks        what each sample is an exercise in
    position     where in the prompt the key information stands
    balance      training samples spread over lengths, positions or phrasings as one wants, in the order given
    """

    model_config = ConfigDict(extra="forbid")

    sources: list[SourceSettings] = Field(min_length=1)
    repairs: str | None = None
    split: SplitSettings = SplitSettings()
    split_seed: int | None = Field(default=None, ge=0, lt=2**63)
    max_length: int = Field(default=1024, ge=8)
    too_long: Literal["drop", "truncate", "error"] = "drop"
    packing: bool = True
    clean: CleanSettings = CleanSettings()
    deduplicate: DeduplicateSettings = DeduplicateSettings()
    benchmarks: BenchmarkSettings | None = None
    tasks: TaskSettings = TaskSettings()
    position: PositionSettings = PositionSettings()
    balance: list[BalanceSettings] = []

    @field_validator("deduplicate", mode="before")
    @classmethod
    def _switch(cls, value: object) -> object:
        if isinstance(value, bool):
            return DeduplicateSettings() if value else DeduplicateSettings(exact=False, near="off")
        return value

    @model_validator(mode="after")
    def _no_source_twice(self) -> DataSettings:
        seen: set[str] = set()
        for source in self.sources:
            if source.path in seen:
                raise ValueError(f"{source.path!r} is a source twice; `weight: 2` shows its rows twice an epoch")
            seen.add(source.path)
        shares = [source.share for source in self.sources if source.share is not None]
        others = any(source.share is None and source.split in (None, "train") for source in self.sources)
        if shares and others and sum(shares) >= 1:
            raise ValueError(f"the shares of the sources add up to {sum(shares):g} and leave nothing for the others")
        if shares and not others and not math.isclose(sum(shares), 1, abs_tol=1e-6):
            raise ValueError(f"every source has a share, and they add up to {sum(shares):g} instead of 1")
        return self
