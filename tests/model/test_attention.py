"""Packed attention over trees of documents against one dense softmax, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from fitout.layout import Segment
from fitout.model import tiles
from fitout.model.attention import packed_attention
from fitout.model.varlen import _dense

FLAT = (Segment(0, 9), Segment(9, 10), Segment(10, 43))
TREE = (
    Segment(0, 20), Segment(20, 33, 0), Segment(33, 34, 1), Segment(34, 50, 1), Segment(50, 57, 3), Segment(57, 90, 0),
    Segment(90, 91), Segment(91, 100, 6),
)  # fmt: skip
LARGE = tuple(Segment(s.start * 12, s.end * 12, s.parent) for s in TREE)  # up to 396 tokens, 840 behind one of them
ROOT_AFTER_ROOT = (Segment(0, 17), Segment(17, 19, 0), Segment(19, 30, 0), Segment(30, 70), Segment(70, 71, 3))


def outcome(attend, q, k, v, slope):
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    out.backward(slope)
    return [out.detach(), q.grad, k.grad, v.grad]


@pytest.mark.parametrize(
    "cells", [None, tiles.CELLS, 1]
)  # PyTorch's kernel, in tiles, in tiles of one head of the keys
@pytest.mark.parametrize("segments", [FLAT, TREE, ROOT_AFTER_ROOT, LARGE], ids=["flat", "tree", "two trees", "large"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(
    ("kind", "size", "instructions"),
    [(torch.float32, 1, True), (torch.float32, 30, True), (torch.bfloat16, 1, True), (torch.bfloat16, 1, False)],
)
def test_equals_a_dense_softmax(segments, groups, kind, size, instructions, cells, monkeypatch):
    """`size` 30 makes scores so large that a wrong way of joining two parts overflows or forgets one; `instructions`:
    whether the processor has some for bf16."""
    length = segments[-1].end
    monkeypatch.setattr(tiles, "ENOUGH", dict.fromkeys(tiles.ENOUGH, 0 if cells else math.inf))
    monkeypatch.setattr(tiles, "LONG", length)
    monkeypatch.setattr(tiles, "has_amx", lambda: False)
    monkeypatch.setattr(tiles, "has_bf16", lambda: instructions)
    monkeypatch.setattr(tiles, "CELLS", cells)
    torch.manual_seed(0)
    q, slope = torch.randn(1, 2 * groups, length, 8) * size, torch.randn(1, length, 2 * groups, 8)
    k, v = torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)
    rounded = [x.to(kind) for x in (q, k, v, slope)]
    want = outcome(lambda *x: _dense(*x, segments, None), *(x.float() for x in rounded))
    got = outcome(lambda *x: packed_attention(None, *x, None, segments=segments)[0], *rounded)
    for a, b in zip(got, want, strict=True):
        bound = 2e-6 * size if kind == torch.float32 else 0.02
        assert a.dtype == kind and float((a.float() - b).abs().max()) <= bound * float(b.abs().max())


def test_a_window_over_a_tree():
    torch.manual_seed(0)
    q, k, v, slope = (torch.randn(1, 2, 100, 8) for _ in range(4))
    want = outcome(lambda *x: _dense(*x, TREE, 7), q, k, v, slope.transpose(1, 2))
    got = outcome(
        lambda *x: packed_attention(None, *x, None, segments=TREE, sliding_window=7)[0], q, k, v, slope.transpose(1, 2)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("longest", [100, 300, 2000, 5000])
def test_the_sizes_of_tiles_that_a_plan_counts(width, longest, monkeypatch):
    monkeypatch.setattr(tiles, "has_amx", lambda: False)
    monkeypatch.setattr(tiles, "has_bf16", lambda: True)
    sizes = set()
    monkeypatch.setattr(tiles, "_heads", lambda query, key: sizes.add(query.shape[1]) or ())
    for n in range(1, longest + 1):
        x = torch.empty(1, 1, n, width, dtype=torch.bfloat16)
        if tiles.pays(x, x):
            tiles.attend(x, x, x, True, 1.0)
    assert tiles.sizes_in_bf16(width, longest) == len(sizes)


@pytest.mark.parametrize("length", [40, 300, 700])  # by PyTorch's kernel, in tiles, by the kernel again
def test_bf16_without_instructions_for_it_is_fp32_rounded(length, monkeypatch):
    monkeypatch.setattr(tiles, "has_bf16", lambda: False)
    torch.manual_seed(0)
    rounded = [torch.randn(1, 2, length, 96).bfloat16() for _ in range(3)] + [torch.randn(1, length, 2, 96).bfloat16()]

    def attend(*x):
        return packed_attention(None, *x, None, segments=(Segment(0, length),))[0]

    wide, got = outcome(attend, *(x.float() for x in rounded)), outcome(attend, *rounded)
    assert all(one.dtype == torch.bfloat16 for one in got)
    for a, b in zip(got, wide, strict=True):  # rounding alone: 1.7e-3 of a norm
        assert float((a.float() - b).norm() / b.norm()) < 2.2e-3


def test_what_pytorch_computes_itself(monkeypatch):
    """Other types than fp32 and bf16, several rows at once, bf16 where the processor has AMX."""
    x = torch.empty(1, 2, 400, 64, device="meta")
    assert tiles.pays(x, x)
    assert not tiles.pays(x.double(), x.double()) and not tiles.pays(x.half(), x.half())
    assert not tiles.pays(x.expand(2, -1, -1, -1), x)
    monkeypatch.setattr(tiles, "has_amx", lambda: True)
    assert tiles.pays(x, x) and not tiles.pays(x.bfloat16(), x.bfloat16())
