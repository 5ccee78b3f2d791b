"""Removal of rows that say what another row says already."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..chat.types import Sample
from .content import content_key


def exact(samples: Sequence[Sample], protected: Collection[str] = ()) -> tuple[list[Sample], list[tuple[Sample, str]]]:
    """(kept, dropped): of samples with equal content (roles, texts up to white space, tools) the first is kept.

    `protected` names files (as in `origin.file`) whose samples come first whatever their place, so that a training row
    that repeats a row of a given test file is the one to go. Order is kept. Time and memory are linear.
    """
    order = sorted(range(len(samples)), key=lambda at: samples[at].origin.file not in protected)  # sorted is stable
    first: dict[bytes, int] = {}
    repeats: dict[int, int] = {}
    for at in order:
        seen = first.setdefault(content_key(samples[at]), at)
        if seen != at:
            repeats[at] = seen
    kept = [sample for at, sample in enumerate(samples) if at not in repeats]
    dropped = [(samples[at], f"repeats {samples[seen].origin}") for at, seen in sorted(repeats.items())]
    return kept, dropped
