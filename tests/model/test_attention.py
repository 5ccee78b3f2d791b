"""Packed attention over trees of documents against one dense softmax, values and gradients."""

from __future__ import annotations

import pytest
import torch

from fitout.layout import Segment, seen
from fitout.model import native
from fitout.model.attention import packed_attention

FLAT = (Segment(0, 9), Segment(9, 10), Segment(10, 43))
TREE = (
    Segment(0, 20), Segment(20, 33, 0), Segment(33, 34, 1), Segment(34, 50, 1), Segment(50, 57, 3), Segment(57, 90, 0),
    Segment(90, 91), Segment(91, 100, 6),
)  # fmt: skip
LARGE = tuple(Segment(s.start * 12, s.end * 12, s.parent) for s in TREE)  # up to 396 tokens, 840 behind one of them
ROOT_AFTER_ROOT = (Segment(0, 17), Segment(17, 19, 0), Segment(19, 30, 0), Segment(30, 70), Segment(70, 71, 3))
LONG = (Segment(0, 650), Segment(650, 700))
TOGETHER = (Segment(0, 60), Segment(60, 120, 0))  # neither of them as long as a window of 100


@pytest.fixture(params=["native", "avx2", "kernel"])
def computed_by(request, monkeypatch):
    """Code of our own as this processor gets it, as one with AVX2 and nothing more gets it, and PyTorch's kernel."""
    if request.param == "kernel":
        monkeypatch.setattr(native, "serves", lambda *_: False)
    else:
        request.getfixturevalue("avx2" if request.param == "avx2" else "compiler")
        assert native.why_not() is None
    return request.param


def softmax_over(q, k, v, segments, window=None, cap=None, sinks=None):
    """One softmax of each token over all tokens, everything that it may not see at minus infinity."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if cap is not None:
        assert float((scores.detach().abs() > 2 * cap).double().mean()) > 0.05
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~torch.from_numpy(seen(segments, window)), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, -1, q.shape[2], 1)], -1)
    return (scores.softmax(-1)[..., : q.shape[2]] @ v).transpose(1, 2)


def outcome(attend, q, k, v, slope):
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    out.backward(slope)
    return [out.detach(), q.grad, k.grad, v.grad]


@pytest.mark.parametrize(
    "segments", [FLAT, TREE, ROOT_AFTER_ROOT, LARGE, LONG], ids=["flat", "tree", "two trees", "large", "long"]
)
@pytest.mark.parametrize(("groups", "width"), [(1, 8), (3, 8), (2, 48)])
@pytest.mark.parametrize(("kind", "size"), [(torch.float32, 1), (torch.float32, 30), (torch.bfloat16, 1)])
def test_equals_a_dense_softmax(segments, groups, width, kind, size, computed_by):
    """`size` 30 makes scores so large that a wrong way of joining two parts overflows or forgets one."""
    length = segments[-1].end
    torch.manual_seed(0)
    q, slope = torch.randn(1, 2 * groups, length, width) * size, torch.randn(1, length, 2 * groups, width)
    k, v = torch.randn(1, 2, length, width), torch.randn(1, 2, length, width)
    rounded = [x.to(kind) for x in (q, k, v, slope)]
    want = outcome(lambda *x: softmax_over(*x, segments), *(x.float() for x in rounded))
    got = outcome(lambda *x: packed_attention(None, *x, None, segments=segments)[0], *rounded)
    for a, b in zip(got, want, strict=True):
        bound = 3e-6 * size if kind == torch.float32 else 0.02
        assert a.dtype == kind and float((a.float() - b).abs().max()) <= bound * float(b.abs().max())


@pytest.mark.parametrize("window", [7, 100])
@pytest.mark.parametrize("segments", [TREE, LARGE, LONG, TOGETHER], ids=["tree", "large", "long", "together"])
def test_a_window_over_a_tree(segments, window, computed_by):
    torch.manual_seed(0)
    q, k, v, slope = (torch.randn(1, 2, segments[-1].end, 8) for _ in range(4))
    want = outcome(lambda *x: softmax_over(*x, segments, window), q, k, v, slope.transpose(1, 2))
    got = outcome(
        lambda *x: packed_attention(None, *x, None, segments=segments, sliding_window=window)[0],
        q, k, v, slope.transpose(1, 2),
    )  # fmt: skip
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4e-6)


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cap", "with_sinks"), [(3.0, False), (None, True), (3.0, True)])
def test_capped_scores_and_sinks(cap, with_sinks, kind, window, computed_by):
    """Gemma 2's and gpt-oss' attention over a tree; queries so large that many scores are at the cap."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 100, 16).to(kind) for heads in (4, 2, 2))
    q, slope, sinks = 4 * q, torch.randn(1, 100, 4, 16).to(kind), torch.randn(4) if with_sinks else None

    def truth(q, k, v, sinks):
        return softmax_over(q, k, v, TREE, window, cap, sinks)

    def ours(q, k, v, sinks):
        return packed_attention(
            None, q, k, v, None, segments=TREE, softcap=cap, s_aux=sinks, sliding_window=window
        )[0]  # fmt: skip

    found = []
    for attend, to in ((ours, None), (truth, torch.float64)):
        leaves = [x if x is None else x.detach().clone().to(to).requires_grad_() for x in (q, k, v, sinks)]
        out = attend(*leaves)
        out.backward(slope.to(out.dtype))
        found.append([out.detach(), *(x.grad for x in leaves if x is not None)])
    for a, b in zip(*found, strict=True):
        assert float((a.double() - b).abs().max()) <= (4e-6 if kind == torch.float32 else 0.02) * float(b.abs().max())


@pytest.mark.parametrize("cap", [None, 3.0])
def test_dropout_drops_the_same_in_the_backward(cap):
    """What comes out is linear in the values, so its product with a slope is that of the values and their gradient."""
    torch.manual_seed(0)
    q, k, v, slope = (torch.randn(1, 2, 100, 16) for _ in range(4))
    v.requires_grad_()
    one, other = (packed_attention(None, q, k, v, None, segments=TREE, dropout=0.3, softcap=cap)[0] for _ in range(2))
    assert not torch.equal(one, other)
    same = [x[:, :, :20].repeat(1, 1, 2, 1) for x in (q, k, v.detach())]
    twice = packed_attention(None, *same, None, segments=(Segment(0, 20), Segment(20, 40)), dropout=0.3)[0]
    assert not torch.equal(*twice.chunk(2, 1))
    one.backward(slope.transpose(1, 2))
    torch.testing.assert_close((v.grad * v).sum(), (one * slope.transpose(1, 2)).sum(), rtol=1e-4, atol=1e-4)


def test_values_of_another_width_and_tensors_in_any_order(computed_by):
    """As transformers hands them over (views of a row of tokens), all in one piece, and in bf16 at odd places."""
    if computed_by == "kernel":
        pytest.skip("PyTorch's kernel wants one width")
    torch.manual_seed(0)
    q, k = (torch.randn(1, 100, heads, 24).transpose(1, 2) for heads in (4, 2))
    v, slope = torch.randn(1, 2, 100, 40), torch.randn(1, 100, 4, 40)
    want = outcome(lambda *x: softmax_over(*x, TREE), q, k, v, slope)
    for kind, bound in ((torch.float32, 4e-6), (torch.bfloat16, 0.06)):
        key, value, along = (x.to(kind) for x in (k, v, slope))
        odd = torch.empty(1, 4, 100, 25, dtype=kind)[..., :24].copy_(q)
        for query in (q.to(kind), q.to(kind).contiguous(), odd):
            leaves = [x.detach().requires_grad_() for x in (query, key, value)]
            assert leaves[0].stride() == query.stride()
            out = attend(*leaves, TREE)
            for a, b in zip((out, *torch.autograd.grad(out, leaves, along)), want, strict=True):
                torch.testing.assert_close(a.float(), b, rtol=0, atol=bound)


def attend(query, key, value, segments):
    return packed_attention(None, query, key, value, None, segments=segments)[0]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_bit_for_bit_whatever_stands_beside_it_and_however_many_threads(kind, computed_by):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 840, 16).to(kind) for heads in (4, 2, 2))
    slope = torch.randn(1, 840, 4, 16).to(kind)
    beside = (Segment(0, 110), Segment(110, 640), Segment(640, 840))
    together = outcome(lambda *x: attend(*x, beside), q, k, v, slope)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        alone = outcome(lambda *x: attend(*x, beside), q, k, v, slope)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    part = [x[:, :, 110:640] for x in (q, k, v)]
    alone = outcome(lambda *x: attend(*x, (Segment(0, 530),)), *part, slope[:, 110:640])
    ends = [together[0][:, 110:640], *(x[:, :, 110:640] for x in together[1:])]
    assert all(torch.equal(a, b) for a, b in zip(ends, alone, strict=True))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_nothing_is_read_beyond_what_is_seen(kind, computed_by):
    """An odd number of keys from an odd place on, behind them the end of the memory, which held no numbers before."""
    ends, noise = (Segment(0, 33), Segment(33, 64, 0)), torch.Generator().manual_seed(0)
    attend(*(torch.full((1, 2, 640, 16), float("nan"), dtype=kind) for _ in range(3)), (Segment(0, 640),))
    q, k, v = (torch.randn(1, 2, 64, 16, generator=noise).to(kind) for _ in range(3))
    assert all(x.isfinite().all() for x in outcome(lambda *x: attend(*x, ends), q, k, v, torch.ones(1, 64, 2, 16)))


def test_shapes_that_do_not_fit_are_not_taken(compiler):
    x, whole = torch.randn(1, 2, 10, 8), (Segment(0, 10),)
    assert native.serves(x, x, x, whole)
    assert not native.serves(x, x, x, (Segment(0, 4),)) and not native.serves(x, x, x, (Segment(0, 14),))
    assert not native.serves(x, x[:, :, :6], x[:, :, :6], whole) and not native.serves(x, x, x[:, :1], whole)
    assert not native.serves(x[:, :1], x, x, whole) and not native.serves(x, x[..., :4], x, whole)
    assert not native.serves(x.expand(2, -1, -1, -1), x, x, whole) and not native.serves(x.half(), x, x, whole)
    with torch._subclasses.FakeTensorMode() as fake:
        imagined = fake.from_tensor(x)
        assert not native.serves(imagined, imagined, imagined, whole) and not native.takes(imagined)


def test_what_is_not_a_number_is_not_hidden(computed_by):
    for bad in (float("nan"), float("inf")):
        q, k, v = (torch.randn(1, 2, 70, 16) for _ in range(3))
        k[0, 1, 20, 3] = bad
        segments = (Segment(0, 40), Segment(40, 70))
        found, want = attend(q, k, v, segments).isnan(), softmax_over(q, k, v, segments).isnan()
        assert torch.equal(found, want) and want[0, 20:40, 1].any() and not want[0, 40:].any()


@pytest.mark.parametrize("length", [40, 300])
def test_bf16_without_instructions_for_it_is_fp32_rounded(length, computed_by):
    if computed_by == "native":
        pytest.skip("this processor may have them")
    torch.manual_seed(0)
    rounded = [torch.randn(1, 2, length, 96).bfloat16() for _ in range(3)] + [torch.randn(1, length, 2, 96).bfloat16()]
    segments = (Segment(0, length),)
    wide = outcome(lambda *x: attend(*x, segments), *(x.float() for x in rounded))
    got = outcome(lambda *x: attend(*x, segments), *rounded)
    assert all(one.dtype == torch.bfloat16 for one in got)
    for a, b in zip(got, wide, strict=True):  # rounding alone: 1.7e-3 of a norm
        assert float((a.float() - b).norm() / b.norm()) < 2.2e-3
