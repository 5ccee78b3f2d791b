"""Softmax attention written out, the slow obvious way: what faster code is tried against, and what computes where no
faster code does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scale: float,
    *,
    cap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """query (1, H, T, D), key (1, K, S, D), value (1, K, S, V) with H a multiple of K, seen (T, S) bool; returns
    (1, H, T, V). `cap` c bounds scores to c tanh(score / c); `sinks` (H,) are scores that lead nowhere. Softmax in fp32
    or wider; all scores are there at once.
    """
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3)) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return F.dropout(weights, dropout)[..., : key.shape[2]] @ value
