"""The two forms of what lies between products agree with double precision and with each other, and a form that does not
is not used."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fitout.model import between, fuse
from fitout.model.between import WRITTEN
from fitout.model.methods import LoraSettings, create
from tests.conftest import tiny_llama

KINDS = [torch.float32, torch.bfloat16]


@pytest.fixture
def plain(monkeypatch):
    """The form that is compiled, run as it stands."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    return between.compiled()


def numbers(*shape, kind, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(kind)


def slope_of(function, at, along, *others):
    """The gradient of `at` by autograd in double precision, and the value."""
    wide = [x.double().requires_grad_() if x.is_floating_point() else x for x in (at, *others)]
    value = function(*wide)
    return value.detach(), *torch.autograd.grad((value * along.double()).sum(), wide[:1])


def assert_near(got, want, kind):
    gap = (got.double() - want).abs().max() / want.abs().max()
    assert got.dtype in (kind, torch.float32) and float(gap) <= (1e-6 if kind == torch.float32 else 0.01)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("form", ["written", "plain"])
def test_each_function_against_autograd_in_double_precision(form, kind, plain):
    form = WRITTEN if form == "written" else plain
    gate, up, grad = (numbers(7, 12, kind=kind, seed=n) for n in range(3))

    def gated(gate, up):
        return F.silu(gate) * up

    value, slope_gate = slope_of(gated, gate, grad, up)
    _, slope_up = slope_of(lambda up, gate: gated(gate, up), up, grad, gate)
    assert_near(form.gated(gate.clone(), up), value, kind)
    product, kept = form.gated_again(gate, up)
    assert_near(product, value, kind)
    for again in (kept, None):
        for got, want in zip(form.gated_slopes(grad, gate, up, again), (slope_gate, slope_up), strict=True):
            assert_near(got, want, kind)

    x, weight = numbers(3, 5, 16, kind=kind), numbers(16, kind=kind, seed=1)
    grad = numbers(3, 5, 16, kind=kind, seed=2)
    value, slope = slope_of(lambda x, w: F.rms_norm(x, (16,), w, 1e-3), x, grad, weight)
    out, inverse = form.norm(x, weight, 1e-3)
    assert_near(out, value, kind)
    assert inverse.dtype == torch.float32 and inverse.shape == (3, 5, 1)
    assert_near(form.norm_slope(grad, x, weight, inverse), slope, kind)

    x, grad = numbers(1, 2, 5, 8, kind=kind), numbers(1, 2, 5, 8, kind=kind, seed=1)
    angle = numbers(1, 1, 5, 8, kind=torch.float32)  # the two halves turn by different angles
    cos, sin = angle.cos().to(kind), angle.sin().to(kind)

    def turned(x, cos, sin):
        return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin

    value, slope = slope_of(turned, x, grad, cos, sin)
    assert_near(form.turned(x, cos, sin), value, kind)
    assert_near(form.turned_back(grad, cos, sin), slope, kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("form", ["written", "plain"])
def test_the_loss_against_cross_entropy_in_double_precision(form, kind, plain):
    form = WRITTEN if form == "written" else plain
    logits = numbers(9, 33, kind=kind) * 30  # so far apart that exp overflows where the largest is not taken off
    targets, weights = torch.arange(9)[:, None] * 3, torch.linspace(0, 2, 9)
    want, slope = slope_of(lambda x: F.cross_entropy(x, targets.squeeze(1), reduction="none"), logits, weights)
    torch.testing.assert_close(form.losses(logits.clone(), targets).double(), want, rtol=1e-6, atol=1e-5)
    losses, got = form.loss_slopes(logits.clone(), targets, weights, kind)
    torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=1e-5)
    assert got.dtype == kind
    assert_near(got, slope, kind)


def model_of(kind):
    model = tiny_llama().to(kind)
    create(LoraSettings(rank=4)).apply(model)
    return model.train()


def test_compiled_it_agrees_on_a_model():
    model = model_of(torch.float32)
    with fuse.fused(model):
        assert fuse.why_not(model, between.compiled()) is None
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_form_that_computes_something_else_is_found_out(kind, plain):
    model = model_of(kind)

    def other(name):
        wrong = {
            "gated": lambda gate, up: F.gelu(gate) * up,
            "gated_slopes": lambda grad, gate, up, kept: (grad * up, grad),
            "norm": lambda x, w, eps: (WRITTEN.norm(x, w, eps)[0] * 1.1, WRITTEN.norm(x, w, eps)[1]),
            "norm_slope": lambda grad, x, w, inverse: grad * inverse,
            "turned": lambda x, cos, sin: x,
            "turned_back": lambda grad, cos, sin: grad,
            "losses": lambda logits, targets: torch.zeros(len(logits)),
            "loss_slopes": lambda x, t, w, kind: (WRITTEN.losses(x.clone(), t), torch.zeros_like(x)),
        }
        return dataclasses.replace(plain, **{name: wrong[name]})

    with fuse.fused(model):
        assert fuse.why_not(model, plain) is None
        for field in dataclasses.fields(between.Between):
            if field.name != "gated_again":  # it is `gated` in another place
                assert f"results of {field.name} differ" in (fuse.why_not(model, other(field.name)) or ""), field.name
        nothing = dataclasses.replace(plain, losses=lambda logits, targets: torch.full((len(logits),), torch.nan))
        assert "results of losses differ by nan" in fuse.why_not(model, nothing)


def test_what_a_compiler_says_is_the_reason(plain):
    def fails(*_):
        raise RuntimeError("no C compiler here\nand more")

    model = model_of(torch.float32)
    with fuse.fused(model):
        assert fuse.why_not(model, dataclasses.replace(plain, norm=fails)) == "RuntimeError: no C compiler here"
    assert between.in_use is WRITTEN
