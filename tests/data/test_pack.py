"""Packing as pure functions: nothing lost, nothing twice, targets as computed slowly."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fitout.data.pack import MIN_SHARED, common_prefix, lay_out, pack

QUICK = settings(deadline=None, max_examples=150)


@st.composite
def sample_sets(draw, least=0):
    """Samples over a small alphabet; many begin like an earlier one, some are twins or beginnings of it."""
    seed = draw(st.integers(0, 2**31))
    count = draw(st.integers(least, 12))
    rng = np.random.default_rng(seed)
    made: list[np.ndarray] = []
    for _ in range(count):
        own = rng.integers(0, 5, int(rng.integers(1, 40)))
        if made and rng.random() < 0.6:
            trunk = made[int(rng.integers(len(made)))]
            trunk = trunk[: int(rng.integers(1, len(trunk) + 1))]
            own = trunk if rng.random() < 0.2 else np.concatenate([trunk, own])
        made.append(own.astype(np.int32))
    trained = [(rng.random(len(one)) < 0.5).astype(np.uint8) for one in made]
    return made, trained


@QUICK
@given(sample_sets(), st.integers(1, 120), st.integers(1, 5), st.booleans())
def test_every_sample_is_in_one_block(made, budget, multiple, share):
    ids, _ = made
    blocks = pack(ids, budget, multiple=multiple, share=share)
    assert sorted(i for block in blocks for i in block) == list(range(len(ids)))
    assert len(blocks) % multiple == 0 and blocks


@QUICK
@given(sample_sets(least=1), st.integers(1, 120), st.integers(1, 4), st.booleans())
def test_the_budget_is_kept_but_for_a_sample_longer_than_it(made, budget, multiple, share):
    ids, trained = made
    for block in pack(ids, budget, multiple=multiple, share=share):
        layout = lay_out([ids[i] for i in block], [trained[i] for i in block], block, share=share)
        # Planned sharing may count up to MIN_SHARED - 1 tokens a sample that the tree does not share after all.
        slack = (MIN_SHARED - 1) * len(block) if share else 0
        assert layout.tokens <= max(budget, max(map(len, ids))) + slack


@QUICK
@given(sample_sets(), st.integers(1, 120))
def test_packing_depends_on_nothing_but_its_input(made, budget):
    ids, _ = made
    assert pack(ids, budget) == pack([one.copy() for one in ids], budget)


def ancestors(layout, at: int) -> list[int]:
    """Positions in the layout of the document that ends with segment `at`, from its beginning."""
    line = []
    while at >= 0:
        segment = layout.segments[at]
        line = list(range(segment.start, segment.end)) + line
        at = segment.parent
    return line


@QUICK
@given(sample_sets(least=1), st.booleans())
def test_targets_are_those_of_each_sample_alone(made, share):
    """For every trained token of every sample, the tokens that its logits would see are its own context."""
    ids, trained = made
    rows = [100 + i for i in range(len(ids))]
    layout = lay_out(ids, trained, rows, share=share)

    segment_of = {p: at for at, s in enumerate(layout.segments) for p in range(s.start, s.end)}
    got = []
    for at, token, weight, sample in zip(
        layout.target_at.tolist(), layout.target_token.tolist(), layout.target_weight, layout.target_sample, strict=True
    ):
        line = [p for p in ancestors(layout, segment_of[at]) if p <= at]
        seen = tuple(layout.ids[line].tolist())
        assert layout.positions[line].tolist() == list(range(len(line)))
        assert weight == 1
        got.append((int(sample), seen, token))

    want = [
        (row, tuple(one[:t].tolist()), int(one[t]))
        for row, one, on in zip(rows, ids, trained, strict=True)
        for t in range(1, len(one))
        if on[t]
    ]
    assert sorted(got) == sorted(want)


@QUICK
@given(sample_sets(), st.booleans())
def test_segments_cover_the_layout_in_preorder(made, share):
    ids, trained = made
    layout = lay_out(ids, trained, range(len(ids)), share=share)
    at, open_segments = 0, []
    for index, segment in enumerate(layout.segments):
        assert segment.start == at < segment.end
        while open_segments and open_segments[-1] != segment.parent:
            open_segments.pop()  # nothing may continue it any more
        assert segment.parent == (open_segments[-1] if open_segments else -1)
        open_segments.append(index)
        at = segment.end
    assert at == layout.tokens == len(layout.positions)
    assert all(array.dtype == np.int64 for array in (layout.ids, layout.positions, layout.target_at))


@QUICK
@given(sample_sets())
def test_a_tree_is_never_larger_than_its_samples(made):
    ids, trained = made
    apart, tree = (lay_out(ids, trained, range(len(ids)), share=share).tokens for share in (False, True))
    assert tree <= apart == sum(map(len, ids))
    shared = any(common_prefix(a, b) >= MIN_SHARED for i, a in enumerate(ids) for b in ids[:i])
    assert (tree < apart) == shared


def test_a_long_sample_has_a_block_of_its_own():
    ids = [np.arange(n, dtype=np.int32) + 100 * n for n in (50, 9, 8, 7)]
    blocks = pack(ids, 20)
    assert [0] in blocks and len(blocks) > 1


def test_ranks_that_outnumber_samples_get_empty_blocks():
    blocks = pack([np.arange(5, dtype=np.int32)], 100, multiple=4)
    assert sorted(map(len, blocks)) == [0, 0, 0, 1]
    empty = lay_out([], [], [])
    assert empty.tokens == empty.supervised == 0 and empty.segments == ()


def test_nothing_to_pack():
    assert pack([], 100, multiple=2) == [[], []]
