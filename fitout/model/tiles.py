"""Attention of one document on a CPU, by matrix products over tiles of queries.

PyTorch's own kernel multiplies blocks too small for a processor's matrix products to come to their speed. Here a tile
of queries of several heads at once meets all keys it may see; what stands between the products stays in the cache.
Which of the two is taken is read from type, shape and processor alone, so a run that goes on adds up in the same
order. Measured by `python -m benchmarks.attention`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from .precision import has_amx, has_bf16

ROWS = 128  # queries of a tile
CELLS = 1 << 19  # scores of a tile: 2 MB in fp32
ENOUGH = {torch.bfloat16: 16_000, torch.float32: 24_000}  # numbers of a head's queries; with fewer PyTorch's is as fast
NARROW = 64  # numbers a head
LONG, LONG_WIDE = 640, 1024  # queries beyond which PyTorch's is as fast in fp32, for heads no wider and for wider ones
MOST = 4096  # queries and keys; beyond, tiles of heads that share their keys would be large
FEW = 512  # queries up to which the kernel's backward is faster in fp32 than in bf16, casts included
GRAIN = 32  # bf16 is filled up to multiples, beyond LONG of ROWS: oneDNN compiles and keeps a product for each shape
PARTS = 3  # bf16 numbers that add up to one of fp32
PAD = 16  # columns that hold them


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention and the logarithm of each softmax's denominator.

    query (1, H, L, D), key and value (1, K, S, D), H a multiple of K; `causal` (L = S): query i sees the keys up to i,
    else all. Returns (1, H, L, D) in the query's dtype and (1, H, L) in fp32.
    """
    if _emulated(query):
        out, norm = attend(query.float(), key.float(), value.float(), causal, scale)
        return out.to(query.dtype), norm
    if not pays(query, key):
        key, value = (_repeat(x, query.shape[1]) for x in (key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    queries, keys = (x.shape[2] for x in (query, key))
    grain = _grain(query.dtype, max(queries, keys))
    scaled, across = _filled(query, grain, torch.float32).mul(scale), _filled(key, grain, torch.float32)
    value = _filled(value, grain)
    out, norm = value.new_empty(*scaled.shape[:-1], value.shape[-1]), scaled.new_empty(scaled.shape[:-1])
    for its, few in _heads(scaled, across):
        k, v = across[few].transpose(1, 2), value[few]
        for rows, seen in _tiles(scaled.shape[1], across.shape[1], grain, causal):
            scores = _scores(_fold(scaled[its, rows], v), k[:, :, seen], rows, None if causal else keys)
            weights = torch.softmax(scores, -1)
            norm[its, rows] = _norm(scores, weights).view(norm[its, rows].shape)
            out[its, rows] = torch.bmm(weights.to(out.dtype), v[:, seen]).view(out[its, rows].shape)
    return out[None, :, :queries], norm[None, :, :queries]


def slopes(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    norm: Tensor,
    causal: bool,
    scale: float,
    alone: bool,
) -> list[Tensor]:
    """Gradients of query, key and value, from that of the output.

    Shapes as in `attend`. `out` and `norm` may be those of a softmax over more keys than these, of which this is the
    share; `alone` says that they are not. In bf16 gradients of scores are rounded once their row's mean is taken off,
    inside the product, so that what cancels costs no digits.
    """
    if _emulated(query):
        g, q, k, v, o = (x.float() for x in (grad, query, key, value, out))
        return [slope.to(query.dtype) for slope in slopes(g, q, k, v, o, norm, causal, scale, alone)]
    if not pays(query, key):
        return _slopes_of_kernel(grad, query, key, value, out, norm, causal, scale)
    (queries, keys), wide = (x.shape[2] for x in (query, key)), query.dtype == torch.float32
    grain = _grain(query.dtype, max(queries, keys))
    mean = _filled((grad.float() * out).sum(-1, keepdim=True).neg_(), grain)
    whole = None if alone else _filled(norm.unsqueeze(-1), grain)
    scaled, across = _filled(query, grain, torch.float32).mul(scale), _filled(key, grain, torch.float32)
    grad, query, key, value = (_filled(x, grain) for x in (grad, query, key, value))
    left, right = (grad, value) if wide else (_beside(grad, mean), _beside(value, None))
    nothing = query.new_zeros(())
    slope_q = torch.empty_like(query)
    slope_k, slope_v = (torch.zeros(x.shape, dtype=torch.float32) for x in (key, value))
    for its, few in _heads(query, key):
        k, v = across[few].transpose(1, 2), right[few].transpose(1, 2)
        for rows, seen in _tiles(query.shape[1], key.shape[1], grain, causal):
            q, g = _fold(query[its, rows], key[few]), _fold(grad[its, rows], key[few])
            scores = _scores(_fold(scaled[its, rows], key[few]), k[:, :, seen], rows, None if causal else keys)
            weights = torch.softmax(scores, -1)
            if whole is not None:
                weights *= (_norm(scores, weights).unsqueeze(-1) - _fold(whole[its, rows], key[few])).exp_()
            offset, beta = (_fold(mean[its, rows], key[few]), scale) if wide else (nothing, 0)
            slope = torch.baddbmm(offset, _fold(left[its, rows], key[few]), v[:, :, seen], beta=beta, alpha=scale)
            shares, slope = weights.to(q.dtype), (slope * weights).to(q.dtype)
            slope_q[its, rows] = torch.bmm(slope, key[few, seen]).view(slope_q[its, rows].shape)
            _add(slope_k[few, seen], slope.transpose(1, 2), q)
            _add(slope_v[few, seen], shares.transpose(1, 2), g)
    return [
        x[None, :, :own].to(query.dtype)
        for x, own in zip((slope_q, slope_k, slope_v), (queries, keys, keys), strict=True)
    ]


def _emulated(query: Tensor) -> bool:
    """Whether this is bf16 and the processor has no instructions for it: products then take much longer than in fp32,
    casts included."""
    return query.dtype == torch.bfloat16 and not has_bf16()


def pays(query: Tensor, key: Tensor) -> bool:
    """Whether tiles are faster than PyTorch's kernel for queries (1, H, L, D) and keys (1, K, S, D). In bf16 they are
    taken up to MOST, where the two are about as fast: the kernel's backward compiles anew for each length there."""
    batch, _, length, width = query.shape
    low = query.dtype == torch.bfloat16
    if batch > 1 or length * width < ENOUGH.get(query.dtype, math.inf) or key.shape[2] > MOST:
        return False
    if low and has_amx():
        return False  # not measured there, where PyTorch's kernel has instructions of its own
    return length <= (MOST if low else LONG if width <= NARROW else LONG_WIDE)


def sizes_in_bf16(width: int, longest: int) -> int:
    """How many sizes of tiles documents of up to `longest` tokens can have, with heads of `width` numbers."""
    lengths = range(math.ceil(ENOUGH[torch.bfloat16] / width), min(longest, MOST) + 1)
    return len({length + -length % _grain(torch.bfloat16, length) for length in lengths})


def _grain(kind: torch.dtype, longest: int) -> int:
    if kind == torch.float32:
        return 1
    return GRAIN if longest <= LONG else ROWS


def _heads(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Heads of queries (H, L, D) whose tiles fit into the cache, and the heads of keys (K, S, D) that they look at."""
    groups = len(query) // len(key)
    at_once = max(1, CELLS // (groups * min(ROWS, query.shape[1]) * key.shape[1]))
    for first in range(0, len(key), at_once):
        last = min(first + at_once, len(key))
        yield slice(first * groups, last * groups), slice(first, last)


def _tiles(queries: int, keys: int, grain: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Tiles of queries and the keys that each may see."""
    size = ROWS if grain > 1 else -(-queries // -(-queries // ROWS))  # as few sizes as can be; as even as can be
    for first in range(0, queries, size):
        last = min(first + size, queries)
        yield slice(first, last), slice(0, last if causal else keys)


def _fold(x: Tensor, few: Tensor) -> Tensor:
    """Rows of the heads that look at the same of a `few` keys as one matrix: (H, L, D) to (K, H / K * L, D)."""
    return x if len(x) == len(few) else x.reshape(len(few), -1, x.shape[-1])


def _scores(scaled: Tensor, across: Tensor, rows: slice, keys: int | None) -> Tensor:
    """(K, H / K * rows, seen), minus infinity where a query may not look: at what comes after it, or beyond `keys`."""
    scores = torch.bmm(scaled, across)
    if keys is None:
        size = rows.stop - rows.start
        scores.view(len(scores), -1, size, scores.shape[-1])[..., rows] += _later(size)
    elif keys < scores.shape[-1]:
        scores[..., keys:] = -math.inf
    return scores


@cache
def _later(size: int) -> Tensor:
    return torch.full((size, size), -math.inf).triu_(1)


def _norm(scores: Tensor, weights: Tensor) -> Tensor:
    """The logarithm of the denominator of weights = softmax(scores): where the weight is largest it loses no digits."""
    return scores.amax(-1) - weights.amax(-1).log_()


def _add(whole: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b to `whole`, which is fp32."""
    if a.dtype == whole.dtype:
        whole.baddbmm_(a, b)
    else:
        whole += torch.bmm(a, b)


def _filled(x: Tensor, grain: int, kind: torch.dtype | None = None) -> Tensor:
    """x (1, H, L, D) as (H, L', D) with zeros behind, L' the next multiple of `grain`; where it is not 1 in one piece,
    as oneDNN wants it."""
    if grain == 1:
        return x[0] if kind is None else x[0].to(kind)
    length = x.shape[2]
    out = torch.empty(x.shape[1], length + -length % grain, x.shape[3], dtype=kind or x.dtype)
    out[:, :length] = x[0]
    if length % grain:
        out[:, length:] = 0
    return out


def _beside(x: Tensor, number: Tensor | None) -> Tensor:
    """bf16 x (H, L, D) with columns beside it: an fp32 `number` (H, L, 1) in parts, or the ones that each part meets in
    the other factor, so that the product has the number added before it is rounded."""
    width = x.shape[-1]
    out = x.new_empty(*x.shape[:-1], width + PAD)
    out[..., :width] = x
    out[..., width:] = 1 if number is None else 0
    if number is not None:
        for at in range(width, width + PARTS):
            out[..., at : at + 1] = number
            number = number - out[..., at : at + 1]
    return out


def _slopes_of_kernel(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, norm: Tensor, causal: bool, scale: float
) -> list[Tensor]:
    """By PyTorch's kernel."""
    kinds = query, key, value
    part = [grad, query, _repeat(key, query.shape[1]), _repeat(value, query.shape[1]), out]
    if query.dtype == torch.bfloat16 and query.shape[2] <= FEW:
        part = [x.float() for x in part]
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*part, norm, 0.0, causal, scale=scale)
    return [
        slope if slope.shape[1] == kind.shape[1] else slope.unflatten(1, (kind.shape[1], -1)).sum(2)
        for kind, slope in zip(kinds, found, strict=True)
    ]


def _repeat(states: Tensor, heads: int) -> Tensor:
    """Heads of keys or values, each as often as heads of queries look at it."""
    batch, own, length, width = states.shape
    if own == heads:
        return states
    return states[:, :, None].expand(batch, own, heads // own, length, width).reshape(batch, heads, length, width)
