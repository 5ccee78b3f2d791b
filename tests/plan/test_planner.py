"""What fits, what to turn, what `auto` takes; machines; the history. Arithmetic alone: no model is loaded."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fitout.data.batches import Batches
from fitout.errors import RequestError
from fitout.model.methods import cost
from fitout.model.shape import shape_of
from fitout.plan import history
from fitout.plan.machine import CARDS, GIB, Machine, NotMeasured, Probe, _own_seconds, machine
from fitout.plan.planner import choose, make_plan
from fitout.plan.work import AverageLength, work_of
from fitout.train import TrainSettings
from tests.conftest import random_samples
from tests.equal.small import part_of

SHAPE = shape_of(
    {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
     "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000}
)  # fmt: skip
COSTS = {
    "full": cost.full(SHAPE),
    "lora": cost.lora(SHAPE, rank=8),
    "qlora": cost.qlora(SHAPE, rank=8),
    "sparse": cost.sparse(SHAPE, density=0.01),
}


class Fixed:
    def products(self, inputs, outputs, rows, precision):
        return 1e12

    def bandwidth(self):
        return 1e11


def card(gib: float) -> Machine:
    return Machine("a card", "cuda", int(gib * GIB), Fixed(), measured=False)


def planned(gib: float, *, kind="lora", average=200, samples=1024, devices=1, **train):
    settings = TrainSettings(**{"epochs": 2, **train})
    part = AverageLength(average, 1024, samples=256)
    batches = Batches(part, batch_size=settings.batch_size, share=False)
    share = len(part) / samples

    def work_at(budget, ranks):
        return work_of(batches, budget=budget, epochs=2, max_steps=settings.max_steps, ranks=ranks, share=share)

    return make_plan(SHAPE, COSTS, kind, settings, "bf16", work_at, card(gib), devices=devices)


def test_what_fits_needs_no_change():
    plan = planned(80)
    assert plan.chosen.fits and not plan.chosen.change
    assert plan.advice == (f"lora in bf16 needs {plan.chosen.memory.peak / 2**20:,.0f} of 81,920 MB: it fits",)
    assert plan.chosen.epoch_seconds == pytest.approx(plan.chosen.step_seconds * 64)
    assert plan.chosen.total_seconds == pytest.approx(2 * plan.chosen.epoch_seconds)
    assert {(row.kind, row.precision) for row in plan.rows} == {(k, p) for k in COSTS for p in ("bf16", "fp32")}


def test_smaller_micro_batches_make_it_fit():
    """As the loop does when memory runs out: halved micro-batches first, then recomputing."""
    need = planned(200, batch_size=64).chosen.memory.peak / GIB
    plan = planned(0.7 * need, batch_size=64)
    assert not plan.chosen.fits and list(plan.chosen.change) == ["train.micro_batch_tokens"]
    assert plan.chosen.lightest.peak <= 0.7 * need * GIB
    told = " ".join(plan.advice)
    assert (
        "activations" in told and f"train.micro_batch_tokens: {plan.chosen.change['train.micro_batch_tokens']}" in told
    )
    tighter = planned(3.5, batch_size=64)
    assert tighter.chosen.change["train.gradient_checkpointing"] in (0.25, 0.5, 0.75, True)
    assert tighter.chosen.step_seconds > plan.chosen.step_seconds


def test_what_cannot_fit_names_its_term_and_the_way_out():
    plan = planned(12, kind="full")
    assert not plan.chosen.can_run
    told = " ".join(plan.advice)
    assert "the largest term is optimizer" in told and "method: {kind: " in told and "ZeRO 3" in told


def test_dividing_makes_every_device_lighter():
    plan = planned(24, kind="full", devices=4)
    own = [row for row in plan.rows if row.kind == "full" and row.precision == "bf16"]
    peaks = [row.memory.terms["weights"] + row.memory.terms["gradients"] + row.memory.terms["optimizer"] for row in own]
    assert [row.stage for row in own] == [0, 1, 2, 3] and peaks == sorted(peaks, reverse=True)
    assert plan.chosen.stage == 0


def test_auto_takes_the_best_that_fits():
    assert choose(planned(80, samples=100_000), "bf16")[0] == "full"
    kind, reasons = choose(planned(80, samples=1000), "bf16")
    assert kind == "lora" and "1,000 samples" in reasons[0]
    kind, reasons = choose(planned(16, samples=100_000), "bf16")
    assert kind == "lora" and reasons[0].startswith("not full: it needs")
    kind, reasons = choose(planned(3.6, samples=1000, batch_size=1), "bf16")
    assert kind == "qlora" and reasons[1].startswith("not lora")
    with pytest.raises(RequestError, match="no method that fits"):
        choose(planned(1.5), "bf16")


def test_work_is_what_the_loop_will_lay_out(tmp_path):
    """The micro-batches of the plan are those of the steps, prefix trees included."""
    part = part_of(tmp_path, *random_samples(40, prefix=30))
    batches = Batches(part, batch_size=8)
    work = work_of(batches, budget=96, epochs=2, max_steps=None)
    assert (work.total_steps, work.steps_per_epoch, work.samples) == (10, 5, 40)
    for step, found in enumerate(work.steps):
        layouts = batches.layouts(step, budget=96)
        assert [one.tokens for one in found] == [layout.tokens for layout in layouts]
        assert [one.targets for one in found] == [layout.supervised for layout in layouts]
        for one, layout in zip(found, layouts, strict=True):
            seen = np.zeros((layout.tokens, layout.tokens), bool)
            for segment in layout.segments:
                at = np.arange(segment.start, segment.end)
                seen[np.ix_(at, at)] = np.tri(len(at), dtype=bool)
                up = segment
                while up.parent >= 0:
                    up = layout.segments[up.parent]
                    seen[segment.start : segment.end, up.start : up.end] = True
            assert one.pairs == seen.sum()
    assert work.largest.tokens == max(one.tokens for step in work.steps for one in step)


def test_an_average_length_stands_in_for_data():
    part = AverageLength(200, 1024)
    assert part.lengths.mean() == pytest.approx(200, rel=0.05) and part.lengths.max() <= 1024
    batches = Batches(part, batch_size=16)
    apart, computed = batches.saving(10, budget=4096)
    assert apart == computed  # nothing is shared by accident


def test_named_devices():
    assert machine("rtx3090-24g").memory == 24 * GIB and not machine("h100-80g").measured
    assert not CARDS["t4-16g"].bf16 and machine("cpu-48g").memory == 48 * GIB and machine("cpu-48g").kind == "cpu"
    for wrong in ("rtx9999", "cpu-g", "cpu-0g", "24g"):
        with pytest.raises(RequestError, match="no device called"):
            machine(wrong)


def test_a_named_card_is_timed_by_its_data_sheet():
    fast, slow = (CARDS[name].products(4096, 4096, 512, "bf16") for name in ("h100-80g", "rtx3090-24g"))
    assert fast / slow == pytest.approx(989 / 71)


def test_past_plans_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("FITOUT_HOME", str(tmp_path / "home"))
    assert history.past_error("here") is None
    for peak, step in ((110, 1.0), (90, 1.5), (104, None)):
        history.remember({
            "machine": "here", "predicted": {"peak_mb": peak, "step_seconds": 1.2},
            "measured": {"peak_mb": 100, "step_seconds": step},
        })  # fmt: skip
    history.remember({"machine": "elsewhere", "predicted": {}, "measured": {}})
    told = history.past_error("here")
    assert "last 3 runs" in told and "memory by 10 % (at most 10 %)" in told and "time by 20 % (at most 20 %)" in told


def test_a_torn_line_costs_one_plan_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "home", lambda: tmp_path)
    row = {
        "machine": "here",
        "predicted": {"peak_mb": 1, "step_seconds": 1},
        "measured": {"peak_mb": 1, "step_seconds": 1},
    }
    history.remember(row)
    with open(tmp_path / "plans.jsonl", "a") as file:
        file.write('{"machine": "he')
    history.remember(row)
    assert history.past("here") == [row, row]


def test_a_probe_is_remembered_for_its_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("FITOUT_HOME", str(tmp_path))
    with pytest.raises(NotMeasured):
        Probe("cpu", measures=False).products(64, 64, 100, "fp32")
    speed = machine("cpu-24g").speed
    first = speed.products(64, 64, 100, "fp32")
    assert first > 1e6 and speed.products(64, 64, 100, "fp32") == first and speed.bandwidth() > 1e6
    assert Probe("cpu", measures=False).products(64, 64, 100, "fp32") == first
    assert replace(card(1), name="b").name == "b" and (tmp_path / "speeds.json").exists()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux says what a child took")
def test_what_a_living_child_takes_is_this_processs_own():
    busy = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    before = _own_seconds()
    with subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()  # it has worked, and lives on
        alive = _own_seconds() - before
        child.stdin.close()
    ended = _own_seconds() - before
    assert alive >= 0.45 and ended >= 0.45
