"""How often each training sample is seen in an epoch: caps, distributions, weights, exact shares of sources.

Everything here counts in whole samples and decides by seed and name, never by place. 0 means left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import BalanceSettings
from .content import digest
from .split import spread, times_seen

MOST = 4  # times a sample is repeated to fill a class


def cap_classes(
    times: np.ndarray, classes: Sequence[Any], most: Mapping[Any, int], names: Sequence[str], seed: int
) -> np.ndarray:
    """(n,) `times` with no class seen more often than its cap; seed and name choose who stays."""
    result = times.copy()
    members: dict[Any, list[int]] = {}
    for at in np.flatnonzero(times).tolist():
        if classes[at] in most:
            members.setdefault(classes[at], []).append(at)
    for label, rows in members.items():
        if times[rows].sum() > most[label]:
            result[rows] = spread(most[label], [names[at] for at in rows], seed)
    return result


def distribute(
    times: np.ndarray, classes: Sequence[str], settings: BalanceSettings, names: Sequence[str], seed: int
) -> np.ndarray:
    """(n,) `times` changed so that the classes have the shares that the settings ask for.

    Counted is how often samples are seen. By dropping: as many as the scarcest class allows. By repeating: as many as
    the commonest has, but in the mean no sample more than MOST times. Classes that the settings do not name, and those
    without samples, are left alone.
    """
    here = seen_of(times, classes)
    distinct = Counter(classes[at] for at in np.flatnonzero(times).tolist())
    wanted = dict.fromkeys(here, 1.0) if settings.to == "equal" else dict(settings.to or {})
    shares = {label: share for label, share in wanted.items() if here.get(label)}
    dropped = [label for label, share in shares.items() if share == 0]
    shares = {label: share for label, share in shares.items() if share > 0}
    if not shares:
        return times
    sizes = [here[label] / share for label, share in shares.items()]
    scale = min(sizes)
    if settings.how == "repeat":
        scale = min(max(sizes), *(MOST * distinct[label] / share for label, share in shares.items()))
    result = times.copy()
    for label in dropped:
        result[[at for at in np.flatnonzero(times).tolist() if classes[at] == label]] = 0
    for label, share in shares.items():
        rows = [at for at in np.flatnonzero(times).tolist() if classes[at] == label]
        total = min(round(scale * share), here[label]) if settings.how == "drop" else round(scale * share)
        result[rows] = apportioned(max(1, total), times[rows], [names[at] for at in rows], seed)
    return result


def seen_of(times: np.ndarray, classes: Sequence[Any]) -> Counter[Any]:
    """How often the samples of each class are seen."""
    seen: Counter[Any] = Counter()
    for at in np.flatnonzero(times).tolist():
        seen[classes[at]] += int(times[at])
    return seen


def apportioned(total: int, times: np.ndarray, names: Sequence[str], seed: int) -> np.ndarray:
    """(n,) whole numbers that add up to `total` and have the proportions of `times` to within one; seed and name choose
    who has more."""
    if (times == times[0]).all():
        return spread(total, names, seed)
    order = sorted(range(len(names)), key=lambda at: digest(seed, names[at]))
    upto = np.floor(np.cumsum(times[order]) * (total / times.sum()) + 0.5).astype(np.int64)
    upto[-1] = total
    result = np.empty(len(names), np.int64)
    result[order] = np.diff(upto, prepend=0)
    return result


def weigh(times: np.ndarray, weights: np.ndarray, names: Sequence[str], seed: int) -> np.ndarray:
    """(n,) `times` multiplied by what the samples weigh."""
    here = np.flatnonzero(times)
    result = times.copy()
    result[here] = times[here] * times_seen(weights[here], [names[at] for at in here.tolist()], seed)
    return result


def give_shares(
    times: np.ndarray, source_of: Sequence[int], shares: Mapping[int, float], names: Sequence[str], seed: int
) -> np.ndarray:
    """(n,) `times` such that each source in `shares` (by number) has exactly its share of all, to a sample.

    The other sources keep what they have; where every source has a share, the sum stays what it is.
    """
    result = times.copy()
    of = np.asarray(source_of)
    shared = {source: np.flatnonzero((of == source) & (times > 0)) for source in shares}
    shared = {source: rows for source, rows in shared.items() if len(rows)}
    taken = sum(shares[source] for source in shared)
    others = int(times[~np.isin(of, list(shares))].sum())
    whole = others / (1 - taken) if others else float(times.sum())
    if not others:
        whole, taken = float(times.sum()), taken or 1.0
        shares = {source: shares[source] / taken for source in shared}
    for source, rows in shared.items():
        result[rows] = spread(max(1, round(whole * shares[source])), [names[at] for at in rows.tolist()], seed)
    return result


def length_classes(lengths: np.ndarray, edges: Sequence[int] | None) -> tuple[list[str], list[str]]:
    """((n,) the class of each sample by its tokens, all classes in order), as `1-64`, `65-128`, `129-`."""
    if edges is None:
        edges = sorted({int(edge) for edge in np.quantile(lengths, (0.25, 0.5, 0.75), method="higher")}) if len(
            lengths) else []  # fmt: skip
    starts = [1, *(edge + 1 for edge in edges)]
    names = [f"{low}-{high}" for low, high in zip(starts, edges, strict=False)] + [f"{starts[-1]}-"]
    at = np.searchsorted(np.asarray(edges), lengths, side="left")
    return [names[one] for one in at], names
