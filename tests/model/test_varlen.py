"""The variable-length form of packed attention, with a slow kernel of the same contract in CUDA's place."""

from __future__ import annotations

import pytest
import torch

from fitout.layout import Segment
from fitout.model import varlen
from fitout.model.attention import packed_attention

CPU = torch.device("cpu")


def slow_kernel(q, k, v, ends_q, ends_k, longest_q, longest_k, *, scale, window_size, aligned="end"):
    """What flash attention's contract says: sequence by sequence, a query at the end of its keys, (left, 0) window."""
    lengths_q, lengths_k = ends_q.diff().tolist(), ends_k.diff().tolist()
    assert (max(lengths_q), max(lengths_k)) == (longest_q, longest_k) and ends_q.dtype == torch.int32
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    parts = []
    for one, many, values in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
        first = len(many) - len(one) if aligned == "end" else 0
        rows = []
        for at in range(len(one)):
            end = first + at + 1
            begin = max(0, end - 1 - window_size[0]) if window_size[0] >= 0 else 0
            scores = torch.einsum("hd,khd->hk", one[at], many[begin:end]) * (scale or q.shape[-1] ** -0.5)
            rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1), values[begin:end]))
        parts.append(torch.stack(rows))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_kernel_that_keeps_the_contract_passes_the_trial(groups, window):
    assert varlen.trial(slow_kernel, CPU, torch.float32, 8, groups, window) < 1e-5


def test_one_that_lines_up_with_the_beginning_is_found_out():
    def other(*args, **more):
        return slow_kernel(*args, aligned="beginning", **more)

    assert varlen.trial(other, CPU, torch.float32, 8, 1, None) > varlen.TOLERANCE


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("tree", [False, True])
def test_equals_packed_attention(tree, window, monkeypatch):
    segments = (Segment(0, 11), Segment(11, 30, 0 if tree else -1), Segment(30, 43, 1 if tree else -1), Segment(43, 44))
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 44, 8), torch.randn(1, 2, 44, 8), torch.randn(1, 2, 44, 8)
    want, _ = packed_attention(None, q, k, v, None, segments=segments, scaling=0.3, sliding_window=window)
    monkeypatch.setattr(varlen, "_kernel", lambda: slow_kernel)
    got = varlen.varlen_attention(q, k, v, segments, 0.3, window)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_a_missing_kernel_is_said_and_not_used(monkeypatch):
    def none():
        raise ImportError("no varlen here")

    monkeypatch.setattr(varlen, "_kernel", none)
    varlen._tried.cache_clear()
    assert not varlen._tried(CPU, torch.bfloat16, 8, 1, None)
    assert varlen.unused.pop("cpu") == "ImportError: no varlen here"
    varlen._tried.cache_clear()
