"""One micro-batch = eight = unpacked; and the order of batches, which depends on the seed and the epoch alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fitout.data.batches import Batches
from fitout.errors import RequestError
from fitout.objectives import SftSettings, create
from fitout.train.backend import Backend
from fitout.train.step import train_step
from tests.conftest import random_samples, tiny_llama

from .small import (
    CPU,
    LOW_RANK,
    METHODS_UNDER_TEST,
    adapted,
    job_of,
    losses,
    part_of,
    random_part,
    train,
    trained_tensors,
)


def one_step(part, *, budget: int, packing: bool = True, clip: float | None = 0.5, kind: str = "full"):
    """A step of plain SGD at rate 1: the change of the weights is the clipped gradient itself."""
    model = tiny_llama() if kind == "full" else adapted(LOW_RANK[kind])[0]
    before = trained_tensors(model)
    layouts = Batches(part, batch_size=16, packing=packing, share=packing).layouts(0, budget=budget)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    result = train_step(model, create(SftSettings()), layouts, parameters, optimizer, Backend(CPU), clip)
    after = trained_tensors(model)
    return result, {name: before[name] - after[name] for name in before}, len(layouts)


@pytest.mark.parametrize("prefix", [0, 20])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_one_micro_batch_equals_eight_equals_unpacked(tmp_path, prefix, clip):
    part = random_part(tmp_path, 16, prefix=prefix)
    whole, whole_step, count = one_step(part, budget=100_000, clip=clip)
    assert count == 1
    eight, eight_step, count = one_step(part, budget=-(-part.tokens // 8) if not prefix else 60, clip=clip)
    assert count >= 8
    apart, apart_step, count = one_step(part, budget=100_000, packing=False, clip=clip)
    assert count == 16
    for other, step in ((eight, eight_step), (apart, apart_step)):
        assert other.loss == pytest.approx(whole.loss, abs=1e-6)
        assert other.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
        assert other.supervised == whole.supervised == part.supervised
        for name in whole_step:
            torch.testing.assert_close(step[name], whole_step[name], rtol=1e-4, atol=1e-6, msg=name)
    if clip:
        norm = torch.cat([t.flatten() for t in whole_step.values()]).norm()
        assert whole.grad_norm > clip and float(norm) == pytest.approx(clip, rel=1e-4)


@pytest.mark.parametrize("kind", LOW_RANK)
def test_with_adapters_too(tmp_path, kind):
    part = random_part(tmp_path, 16)
    whole, whole_step, count = one_step(part, budget=100_000, kind=kind)
    assert count == 1
    eight, step, count = one_step(part, budget=-(-part.tokens // 8), kind=kind)
    assert count >= 8
    assert eight.loss == pytest.approx(whole.loss, abs=1e-6)
    for name in whole_step:
        torch.testing.assert_close(step[name], whole_step[name], rtol=1e-4, atol=1e-6, msg=name)


def test_mean_is_over_tokens_not_over_micro_batches(tmp_path):
    """A sample of 2 targets and one of 30, apart: the loss is the mean of 32 losses, not the mean of two means."""
    ids, _ = random_samples(2, low=31, high=32)
    train_on = [np.arange(len(ids[0])) >= len(ids[0]) - 2, np.arange(len(ids[1])) >= 1]
    part = part_of(tmp_path, ids, train_on)
    each = []
    plain = tiny_llama(packed=False)
    for one, on in zip(ids, train_on, strict=True):
        whole = torch.tensor(one[None].astype(np.int64))
        logits = plain(whole).logits[0, :-1]
        each.append(torch.nn.functional.cross_entropy(logits, whole[0, 1:], reduction="none")[on[1:]].detach())
    want, wrong = torch.cat(each).mean(), torch.stack([e.mean() for e in each]).mean()
    assert abs(want - wrong) > 1e-4
    for budget in (10, 1000):
        assert one_step(part, budget=budget)[0].loss == pytest.approx(float(want), abs=1e-6)


@pytest.mark.parametrize("kind", METHODS_UNDER_TEST)
def test_whole_trainings_are_equal(tmp_path, kind):
    """12 steps of AdamW: packed in one (prefixes shared), packed in small micro-batches, unpacked."""
    ran = []
    for name, settings in (("one", {}), ("small", {"micro_batch_tokens": 48}), ("off", {"packing": False})):
        model, method = adapted(METHODS_UNDER_TEST[kind])
        part = random_part(tmp_path / name, 20, prefix=12)
        job = job_of(tmp_path / name, model, part, total=12, method=method, **settings)
        train(job)
        ran.append((losses(job.run.log), trained_tensors(model)))
    for log, weights in ran[1:]:
        assert [step for step, _ in log] == list(range(1, 13))
        assert [x for _, x in log] == pytest.approx([x for _, x in ran[0][0]], abs=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, ran[0][1][name], rtol=1e-4, atol=1e-4, msg=name)


def test_every_row_once_an_epoch_and_groups_together(tmp_path):
    ids, train_on = random_samples(23)
    part = part_of(tmp_path, ids, train_on, groups=[i // 3 for i in range(23)])
    batches = Batches(part, batch_size=3, seed=7)
    steps = batches.steps_in_epoch(0)
    assert steps == 3  # 8 groups of up to three rows, three groups a step
    for epoch in range(3):
        rows = [batches.rows(epoch * steps + k).tolist() for k in range(steps)]
        assert sorted(sum(rows, [])) == list(range(23))
        for step in rows:
            assert all(set(range(g * 3, min(23, g * 3 + 3))) <= set(step) for g in {r // 3 for r in step})


def test_answers_to_one_prompt_are_trained_in_one_step_and_steps_are_full(tmp_path):
    """Eleven prompts with three answers each, written prompt after prompt in turn, and nine samples alone."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 97, 20) for _ in range(20)]
    owner = [i % 11 for i in range(33)] + list(range(11, 20))
    ids = [np.concatenate([prompts[n], rng.integers(1, 97, 6)]).astype(np.int32) for n in owner]
    part = part_of(tmp_path, ids, [(np.arange(26) >= 20).astype(np.uint8)] * 42)
    batches = Batches(part, batch_size=8, seed=3)
    for epoch in (0, 1):
        steps = [batches.rows(6 * epoch + k).tolist() for k in range(batches.steps_in_epoch(epoch))]
        assert [len(step) for step in steps] == [8, 8, 8, 8, 8, 2] and sorted(sum(steps, [])) == list(range(42))
        apart = sum(len({k for k, step in enumerate(steps) for row in step if owner[row] == n}) - 1 for n in range(11))
        assert apart <= 2  # only what is left at the end of an epoch is parted
    shuffled = [owner[row] for row in steps[0]]
    assert shuffled != sorted(shuffled)
    tokens, computed = batches.saving(6, budget=10_000)
    prompts_a_step = sum(len({owner[row] for row in batches.rows(k)}) for k in range(6))
    assert (tokens, computed) == (42 * 26, 20 * prompts_a_step + 42 * 6)


def test_groups_larger_than_a_step_and_groups_that_leave_gaps(tmp_path):
    for sizes in ([5] * 40, [19, 3, 1, 8, 7] * 6, [7] * 50):
        prompts = [np.full(20, n + 1) for n in range(len(sizes))]
        ids = [np.append(prompt, 100 + k).astype(np.int32) for prompt, n in zip(prompts, sizes, strict=True)
               for k in range(n)]  # fmt: skip
        part = part_of(tmp_path, ids, [(np.arange(21) >= 20).astype(np.uint8)] * len(ids))
        batches = Batches(part, batch_size=8)
        rows = [batches.rows(k).tolist() for k in range(batches.steps_in_epoch(0))]
        assert sorted(sum(rows, [])) == list(range(len(ids)))
        assert {len(step) for step in rows[:-1]} == {8} and len(rows) == -(-len(ids) // 8)


def test_a_sample_that_is_there_twice_is_not_grouped_with_itself(tmp_path):
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 97, 30).astype(np.int32) for _ in range(50)] * 2
    part = part_of(tmp_path, ids, [(np.arange(30) >= 20).astype(np.uint8)] * 100)
    batches = Batches(part, batch_size=2)
    together = sum(len({row % 50 for row in batches.rows(k).tolist()}) == 1 for k in range(50))
    assert together < 10


def test_order_depends_on_seed_and_epoch_alone(tmp_path):
    part = random_part(tmp_path, 23)

    def order(seed, steps):
        batches = Batches(part, batch_size=5, seed=seed)
        return {step: batches.rows(step).tolist() for step in steps}

    forward = order(1, range(15))
    assert order(1, reversed(range(15))) == forward  # a position is one integer; nothing has to be replayed
    assert order(1, [13])[13] == forward[13]
    assert order(2, range(15)) != forward
    assert [forward[k] for k in range(5)] != [forward[k] for k in range(5, 10)]
    batches = Batches(part, batch_size=5, seed=1)
    assert [batches.epoch_of(k) for k in (0, 4, 5, 14)] == [(0, 0), (0, 4), (1, 0), (2, 4)]
    assert (batches.steps_in(1), batches.steps_in(3), batches.steps_in(0.4), batches.steps_in(1.4)) == (5, 15, 2, 7)


def test_ranks_and_budgets_keep_a_steps_rows(tmp_path):
    batches = Batches(random_part(tmp_path, 11), batch_size=5)
    want = sorted(batches.rows(1).tolist())
    for budget in (20, 100, 10_000):
        for ranks in (1, 2, 3, 8):
            shares = [batches.layouts(1, budget=budget, rank=rank, ranks=ranks) for rank in range(ranks)]
            assert len({len(share) for share in shares}) == 1
            rows = {int(s) for share in shares for layout in share for s in layout.target_sample}
            assert sorted(rows) == want
            tokens = sum(layout.tokens for share in shares for layout in share)
            assert tokens == int(batches.part.lengths[want].sum())


def test_batch_tokens(tmp_path):
    part = random_part(tmp_path, 40, low=5, high=30)
    batches = Batches(part, batch_tokens=64)
    steps = [batches.rows(k) for k in range(batches.steps_in_epoch(0))]
    assert sorted(np.concatenate(steps).tolist()) == list(range(40))
    sizes = [int(part.lengths[rows].sum()) for rows in steps]
    assert max(sizes) <= 64
    following = [int(part.lengths[rows[0]]) for rows in steps[1:]]
    assert all(size + more > 64 for size, more in zip(sizes, following, strict=False))  # as full as the order allows
    assert all(len(rows) == 1 for rows in (Batches(part, batch_tokens=1).rows(k) for k in range(40)))


def test_an_empty_part_is_refused(tmp_path):
    with pytest.raises(RequestError, match="nothing to train on"):
        Batches(part_of(tmp_path, [], []))
