"""Packed attention on CUDA: all documents of a block in one call of PyTorch's variable-length flash attention.

A branch of a prefix tree is a sequence whose keys are its ancestors' tokens followed by its own. The kernel lines
queries up with the end of their keys, so one causal call serves plain documents and trees; the keys of a shared prefix
are copied for each branch that looks at them, nothing else is computed twice.

Kernels differ by version and card, so the first block of each kind is preceded by a trial: random trees through the
kernel and through a dense softmax in fp32, values and gradients. A kernel that does not agree is not used, and
`unused` says why (`fitout doctor` prints it).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from ..layout import Segment, seen
from .dense import dense
from .send import send

DTYPES = (torch.bfloat16, torch.float16)  # what flash attention computes in
TOLERANCE = 0.03  # of the largest value; bf16 keeps 8 bits of a number
TRIAL = (Segment(0, 70), Segment(70, 75, 0), Segment(75, 140, 0), Segment(140, 149, 2), Segment(149, 150))

unused: dict[str, str] = {}  # device -> why the kernel is not used there


def serves(query: Tensor, key: Tensor, window: int | None) -> bool:
    """Whether these tensors, (1, H, T, D) and (1, K, T, D), can go through `varlen_attention`."""
    if query.device.type != "cuda" or query.dtype not in DTYPES:
        return False
    kind = (query.shape[-1], query.shape[1] // key.shape[1], None if window is None else 20)
    return _tried(query.device, query.dtype, *kind)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scale: float, window: int | None
) -> Tensor:
    """query (1, H, T, D), key and value (1, K, T, D); returns (1, T, H, D). A token sees its own segment up to itself
    and all of its ancestors, or the last `window` tokens of these."""
    return _attend(_kernel(), query, key, value, segments, scale, window)


def _attend(
    kernel: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    scale: float,
    window: int | None,
) -> Tensor:
    looked_at, ends_q, ends_k, longest_q, longest_k = _sequences(tuple(segments), query.device)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # x[0] would be copied in the backward
    if looked_at is not None:
        k, v = k.index_select(0, looked_at), v.index_select(0, looked_at)
    left = -1 if window is None else window - 1
    out = kernel(q, k, v, ends_q, ends_k, longest_q, longest_k, scale=scale, window_size=(left, 0))
    return out.unsqueeze(0)


@lru_cache(maxsize=64)  # every layer of a forward, and its backward, asks for the same block
def _sequences(segments: tuple[Segment, ...], device: torch.device) -> tuple[Tensor | None, Tensor, Tensor, int, int]:
    """(places of the keys, one sequence after the other, None when they stand so already), ends of the query sequences
    and of the key sequences (n + 1, int32), longest of each."""
    seen: list[list[Segment]] = []
    for segment in segments:
        seen.append([*(seen[segment.parent] if segment.parent >= 0 else []), segment])
    lengths_q = [segment.length for segment in segments]
    lengths_k = [sum(s.length for s in line) for line in seen]
    needed = [
        torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        for lengths in (lengths_q, lengths_k)
    ]
    if any(segment.parent >= 0 for segment in segments):
        needed.append(torch.cat([torch.arange(s.start, s.end) for line in seen for s in line]))
    ends_q, ends_k, *looked_at = send(needed, device)
    return looked_at[0] if looked_at else None, ends_q, ends_k, max(lengths_q), max(lengths_k)


@cache
def _kernel() -> Callable[..., Any]:
    """`varlen_attn` with fewer key than query heads: since torch 2.12 by itself, before by repeating them."""
    from torch.nn.attention.varlen import varlen_attn

    if "enable_gqa" in inspect.signature(varlen_attn).parameters:

        def call(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Any:
            return varlen_attn(q, k, v, *rest, enable_gqa=k.shape[1] != q.shape[1], **more)
    else:

        def call(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Any:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            return varlen_attn(q, k, v, *rest, **more)

    return call


@cache
def _tried(device: torch.device, dtype: torch.dtype, width: int, groups: int, window: int | None) -> bool:
    """Whether the kernel is there and agrees with a dense softmax."""
    try:
        gap = trial(_kernel(), device, dtype, width, groups, window)
    except (ImportError, RuntimeError, TypeError, NotImplementedError) as error:
        unused[str(device)] = f"{type(error).__name__}: {error}".splitlines()[0]
        return False
    if gap > TOLERANCE:
        unused[str(device)] = f"it differs from a plain softmax by {gap:.2g} of the largest value"
    return gap <= TOLERANCE


@torch.enable_grad()
def trial(
    kernel: Callable[..., Any], device: torch.device, dtype: torch.dtype, width: int, groups: int, window: int | None
) -> float:
    """The largest difference from a dense softmax in fp32, of values and gradients, over the largest value of each."""
    generator = torch.Generator().manual_seed(0)
    length = TRIAL[-1].end
    shapes = [
        (1, 2 * groups, length, width),
        (1, 2, length, width),
        (1, 2, length, width),
        (1, length, 2 * groups, width),
    ]
    scale = width**-0.5
    numbers = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]

    def outcome(attend: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        q, k, v = (x.to(kind).clone().requires_grad_() for x in numbers[:3])
        out = attend(q, k, v)
        out.backward(numbers[3].to(kind))
        return [x.detach().float() for x in (out, q.grad, k.grad, v.grad) if x is not None]

    ours = outcome(lambda q, k, v: _attend(kernel, q, k, v, TRIAL, scale, window), dtype)
    looks = torch.from_numpy(seen(TRIAL, window)).to(device)
    truth = outcome(lambda q, k, v: dense(q, k, v, looks, scale).transpose(1, 2), torch.float32)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, truth, strict=True))
