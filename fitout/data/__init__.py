"""ROWS. From a file, folder or hub id to prepared, ordered, resumable batches.

Here live the readers (sources), the row formats, the edits (clean, dedupe, split), the findings (lint), the prepared
store and the order of batches. What a sample looks like as tokens is not decided here but in `chat`; what is minimised
over a batch is not decided here but in `objectives`.
"""

from __future__ import annotations

import math
import re
from difflib import get_close_matches
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Part = Literal["train", "validation", "test"]

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
    limit     read at most this many rows
    split     all rows of this source are this part; other sources then give that part nothing
    encoding  of text files; Parquet and the hub have their own
    """

    model_config = ConfigDict(extra="forbid")

    path: str = Field(min_length=1)
    format: str | None = None
    columns: dict[str, str] | None = None
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
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
        if self.weight != 1 and self.split in ("validation", "test"):
            raise ValueError(f"weight has no effect with split: {self.split}; only training rows are weighted")
        return self


class SplitSettings(BaseModel):
    """Shares of the rows for training, validation and test."""

    model_config = ConfigDict(extra="forbid")

    train: float = Field(default=0.8, ge=0, le=1)
    validation: float = Field(default=0.1, ge=0, le=1)
    test: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _sums_to_one(self) -> SplitSettings:
        total = self.train + self.validation + self.test
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise ValueError(f"train + validation + test is {total:g}, it must be 1")
        return self


class DataSettings(BaseModel):
    """What to train on, and how it is cut up.

    split_seed   draws the split (and what weights repeat or leave out); train.seed where it is not given. A value of
                 its own keeps the parts the same while train.seed changes
    max_length   tokens a sample may have; `too_long` says what happens to longer ones
    packing      several samples to a forward pass, each attending only to itself
    deduplicate  rows that say the same as an earlier row are dropped (counted, and named in the report)
    """

    model_config = ConfigDict(extra="forbid")

    sources: list[SourceSettings] = Field(min_length=1)
    split: SplitSettings = SplitSettings()
    split_seed: int | None = Field(default=None, ge=0)
    max_length: int = Field(default=1024, ge=8)
    too_long: Literal["drop", "truncate", "error"] = "drop"
    packing: bool = True
    deduplicate: bool = True

    @model_validator(mode="after")
    def _no_source_twice(self) -> DataSettings:
        seen: set[str] = set()
        for source in self.sources:
            if source.path in seen:
                raise ValueError(f"{source.path!r} is a source twice; `weight: 2` shows its rows twice an epoch")
            seen.add(source.path)
        return self
