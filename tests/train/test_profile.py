"""Where the time goes: FLOPs against torch's own counter, times against a stopwatch held beside the profiler."""

from __future__ import annotations

import gzip
import json
import time

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fitout.data.pack import lay_out
from fitout.files import read_json
from fitout.layout import Layout, Segment
from fitout.model import methods, native
from fitout.model.attention import _Documents, _Native
from fitout.model.fuse import fused
from fitout.model.memory import recompute_activations
from fitout.model.methods import AdapterSettings, DoraSettings, FullSettings, LoraSettings
from fitout.model.shape import shape_of
from fitout.objectives import SftSettings, create
from fitout.plan.products import Products
from fitout.train import profile
from fitout.train.backend import Backend
from fitout.train.profile import Profile
from tests.conftest import random_samples, tiny_llama
from tests.equal.small import CPU, Around, adapted, events, job_of, random_part, train

OBJECTIVE = create(SftSettings())
CALLED = _Documents if native.why_not() else _Native  # what attention goes through here


class OneFlop:
    """A machine that does one FLOP a second, whatever its shape."""

    def products(self, inputs, outputs, rows, precision):
        return 1.0

    def bandwidth(self):
        return 1.0


def counted(settings, *, tied=False, recompute=False):
    """(FLOPs by torch's counter without attention, ours by part) of one layout, forward and backward."""
    method, model = methods.create(settings), tiny_llama(tied=tied)
    method.apply(model)
    model.train()
    again = recompute_activations(model) if recompute else 0.0
    ids, train_on = random_samples(5, prefix=20)
    layout = lay_out(ids, train_on, range(5))
    with fused(model):
        OBJECTIVE.loss(model, layout, 1.0).backward()  # what is made once is made
    model.zero_grad()
    aten = torch.ops.aten

    def product(own, a, b, *rest, out_shape=None, **more):
        return 2 * a[0] * a[1] * b[1]

    with fused(model), FlopCounterMode(display=False, custom_mapping={aten.addmm_: product}) as counter:
        OBJECTIVE.loss(model, layout, 1.0).backward()
    by_operation = counter.get_flop_counts()["Global"]
    matrix = (aten.mm, aten.addmm, aten.addmm_)
    theirs = sum(flops for operation, flops in by_operation.items() if operation in matrix)
    shape = shape_of({**model.config.to_dict(), "tie_word_embeddings": tied})
    cost = settings.cost(shape)
    ours = Products(shape, cost, "fp32", OneFlop(), 64)
    return theirs, ours.count(layout.tokens, layout.supervised, layout.pairs, again)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("settings", "tied", "tolerance"),
    [
        (FullSettings(), False, 0),
        (FullSettings(), True, 0),
        (FullSettings(last_layers=1), False, 0),
        (LoraSettings(rank=4), False, 0.01),  # the gradient that A of the lowest layer would give to its input
        (LoraSettings(rank=4, targets=["q_proj", "v_proj"]), True, 0.01),
        (LoraSettings(rank=4, train_also=["embed_tokens"]), False, 0),
        (AdapterSettings(style="houlsby", reduction=4), False, 0.2),  # at most a layer: one of two here
    ],
)
def test_flops_are_those_that_torch_counts(settings, tied, tolerance, recompute):
    theirs, ours = counted(settings, tied=tied, recompute=recompute)
    total = ours["linears"].flops + ours["head and loss"].flops
    assert theirs <= total * (1 + 1e-9)
    assert total <= theirs * (1 + tolerance + 0.08 * recompute) + 1e-6  # recomputing may stop before the last product
    assert ours["linears"].seconds == pytest.approx(ours["linears"].flops)


def test_pairs_are_the_entries_of_the_mask():
    segments = (Segment(0, 4), Segment(4, 7, 0), Segment(7, 9, 1), Segment(9, 10, 0), Segment(10, 15))
    lines = {0: [0], 1: [0, 1], 2: [0, 1, 2], 3: [0, 3], 4: [4]}
    seen = np.zeros((15, 15), bool)
    for index, segment in enumerate(segments):
        for row in range(segment.start, segment.end):
            for other in lines[index]:
                seen[row, segments[other].start : min(row + 1, segments[other].end)] = True
    nothing = np.zeros(0)
    layout = Layout(np.arange(15), np.arange(15), segments, nothing, nothing, nothing, nothing)
    assert layout.pairs == seen.sum()


class Stopwatch:
    """Adds up what calls of a function took."""

    def __init__(self):
        self.seconds = 0.0

    def over(self, function):
        def timed(*args, **more):
            start = time.perf_counter()
            try:
                return function(*args, **more)
            finally:
                if self.running():
                    self.seconds += time.perf_counter() - start

        return timed

    def running(self):
        return torch.autograd._profiler_enabled()


def test_parts_add_up_and_agree_with_a_stopwatch(tmp_path, monkeypatch):
    attention, update = Stopwatch(), Stopwatch()
    for name in ("forward", "backward"):
        monkeypatch.setattr(CALLED, name, staticmethod(attention.over(getattr(CALLED, name))))
    for name in ("clip", "update"):
        monkeypatch.setattr(Backend, name, update.over(getattr(Backend, name)))
    model, method = adapted(LoraSettings(rank=4))
    part = random_part(tmp_path, 40, low=60, high=120)
    job = job_of(tmp_path, model, part, total=6, batch_size=16, micro_batch_tokens=400, method=method)
    shape = shape_of(model.config.to_dict())
    products = Products(shape, LoraSettings(rank=4).cost(shape), "fp32", OneFlop(), 64)
    object.__setattr__(job, "profile", Profile(job.run, products, CPU))
    with fused(model):
        train(job)
    [told] = events(job.run.log, "profiled")
    report = read_json(job.run.profile_parts)
    assert {key: told[key] for key in report} == report and told["step"] == 4
    assert report["steps"] == profile.STEPS == 3
    parts = {name: one["seconds"] for name, one in report["parts"].items()}
    assert list(parts) == list(profile.PARTS)
    assert sum(parts.values()) == pytest.approx(report["step_seconds"], rel=1e-6)
    assert sum(one["share"] for one in report["parts"].values()) == pytest.approx(1)
    assert report["step_seconds"] == pytest.approx(report["clock_seconds"], rel=0.05)
    assert all(seconds > 0 for seconds in parts.values())
    apart = 0.05 * report["step_seconds"]  # views around attention; emptying gradients after the update
    assert parts["attention"] == pytest.approx(attention.seconds / 3, abs=apart)
    assert parts["optimizer"] == pytest.approx(update.seconds / 3, abs=apart)
    with gzip.open(job.run.profile_trace) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {profile.STEP, "fitout: attention", "_LoraLinear"} <= names
    assert report["padding"] == 0 and report["recomputed"] == 0
    assert not torch.autograd._profiler_enabled()


def test_a_run_of_one_step_is_profiled_and_one_that_fails_leaves_no_profiler(tmp_path):
    for name, total in (("one", 1), ("crash", 9)):
        model, method = adapted(LoraSettings(rank=4))
        job = job_of(tmp_path / name, model, random_part(tmp_path / name, 20), total=total, method=method)
        object.__setattr__(job, "profile", Profile(job.run, None, CPU))
        if name == "one":
            train(job)
        else:
            monkey = job.objective.loss
            calls = []

            def fail(*args, monkey=monkey, calls=calls):
                calls.append(1)
                if len(calls) > 3:
                    raise RuntimeError("no")
                return monkey(*args)

            failing = Around()
            failing.objective, failing.loss = job.objective, fail
            object.__setattr__(job, "objective", failing)
            with pytest.raises(RuntimeError, match="no"):
                train(job)
            assert not torch.autograd._profiler_enabled()
        report = read_json(job.run.profile_parts)
        assert report["whole"] is None and report["recomputed"] is None and report["step_seconds"] > 0


@pytest.mark.parametrize("kind", ["lora", "dora", "full", "recompute"])
def test_the_backward_of_a_part_belongs_to_it(kind):
    """Attention and head of a model whose linears are left out: nothing of their backwards lands among the linears."""
    settings = {"dora": DoraSettings(rank=4), "lora": LoraSettings(rank=4)}.get(kind, FullSettings())
    model, _ = adapted(settings) if kind in ("lora", "dora") else adapted(settings, packed=True)
    model.train()
    if kind == "recompute":
        recompute_activations(model)
    ids, train_on = random_samples(4)
    layout = lay_out(ids, train_on, range(4))
    restore = profile.mark_attention(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler, \
            torch.profiler.record_function(profile.STEP):  # fmt: skip
        OBJECTIVE.loss(model, layout, 1.0).backward()
    restore()
    where: dict[str, set[str]] = {}
    original = profile._part

    def noted(name, around, forward):
        here = original(name, around, forward)
        where.setdefault(name, set()).add(here)
        return here

    profile._part = noted
    try:
        profile.times(profiler.events())
    finally:
        profile._part = original
    assert where[f"{CALLED.__name__}Backward"] == {"attention"}
    assert where["_LinearCrossEntropyBackward"] == {"head and loss"}
    assert "linears" in where["aten::mm"]
    linear = {"dora": "_AdaptedLinearBackward", "lora": "_LoraLinearBackward"}.get(kind, "MmBackward0")
    assert where[linear] == {"linears"}
    assert where["autograd::engine::evaluate_function: EmbeddingBackward0"] == {"other operations"} if kind == "full" \
        else True  # fmt: skip
