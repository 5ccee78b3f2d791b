"""The two forms of what lies between products agree with double precision and with each other, and a form that does not
is not used."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fitout.data.pack import lay_out
from fitout.model import between, fuse
from fitout.model.attention import NAME, register
from fitout.model.between import NATIVE, WRITTEN
from fitout.model.methods import LoraSettings, create
from fitout.model.methods.base import trainable
from fitout.objectives.base import token_losses
from tests.conftest import tiny_llama

KINDS = [torch.float32, torch.bfloat16]


@pytest.fixture
def plain(monkeypatch):
    """The form that is compiled, run as it stands."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return between.compiled()


def numbers(*shape, kind, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(kind)


def slope_of(function, at, along, *others):
    """The gradient of `at` by autograd in double precision, and the value."""
    wide = [x.double().requires_grad_() if x.is_floating_point() else x for x in (at, *others)]
    value = function(*wide)
    return value.detach(), *torch.autograd.grad((value * along.double()).sum(), wide[:1])


def form_of(name, plain, request):
    if name in ("native", "avx2"):
        request.getfixturevalue("compiler" if name == "native" else name)
        assert between.best(torch.device("cpu")) is NATIVE
        return NATIVE
    return WRITTEN if name == "written" else plain


def assert_near(got, want, kind):
    gap = (got.double() - want).abs().max() / want.abs().max()
    assert got.dtype in (kind, torch.float32) and float(gap) <= (1e-6 if kind == torch.float32 else 0.01)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("form", ["written", "native", "avx2", "plain"])
def test_each_function_against_autograd_in_double_precision(form, kind, plain, request):
    form = form_of(form, plain, request)
    gate, up, grad = (numbers(7, 44, kind=kind, seed=n) for n in range(3))

    def gated(gate, up):
        return F.silu(gate) * up

    value, slope_gate = slope_of(gated, gate, grad, up)
    _, slope_up = slope_of(lambda up, gate: gated(gate, up), up, grad, gate)
    assert_near(form.gated(gate.clone(), up), value, kind)
    for got, want in zip(form.gated_slopes(grad, gate, up), (slope_gate, slope_up), strict=True):
        assert_near(got, want, kind)

    x, weight = numbers(3, 5, 44, kind=kind), numbers(44, kind=kind, seed=1)
    grad = numbers(3, 5, 44, kind=kind, seed=2)
    value, slope = slope_of(lambda x, w: F.rms_norm(x, (44,), w, 1e-3), x, grad, weight)
    out, inverse = form.norm(x, weight, 1e-3)
    assert_near(out, value, kind)
    assert inverse.dtype == torch.float32 and inverse.shape == (3, 5, 1)
    assert_near(form.norm_slope(grad, x, weight, inverse), slope, kind)

    x, grad = numbers(1, 5, 2, 44, kind=kind).transpose(1, 2), numbers(1, 2, 5, 44, kind=kind, seed=1)
    angle = numbers(1, 1, 5, 44, kind=torch.float32)  # the two halves turn by different angles
    cos, sin = angle.cos().to(kind), angle.sin().to(kind)

    def turned(x, cos, sin):
        return x * cos + torch.cat([-x[..., 22:], x[..., :22]], -1) * sin

    value, slope = slope_of(turned, x, grad, cos, sin)
    assert_near(form.turned(x, cos, sin), value, kind)
    assert_near(form.turned_back(grad, cos, sin), slope, kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("form", ["written", "native", "avx2", "plain"])
def test_the_loss_against_cross_entropy_in_double_precision(form, kind, plain, request):
    form = form_of(form, plain, request)
    logits = numbers(9, 33, kind=kind) * 30  # so far apart that exp overflows where the largest is not taken off
    targets, weights = torch.arange(9)[:, None] * 3, torch.linspace(0, 2, 9)
    want, slope = slope_of(lambda x: F.cross_entropy(x, targets.squeeze(1), reduction="none"), logits, weights)
    torch.testing.assert_close(form.losses(logits.clone(), targets).double(), want, rtol=1e-6, atol=1e-5)
    losses, got = form.loss_slopes(logits.clone(), targets, weights, kind)
    torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=1e-5)
    assert got.dtype == kind
    assert_near(got, slope, kind)


def test_what_native_code_does_not_take_is_computed_as_written():
    """fp16, a weight in another type, a batch of two, rows that are not in one piece."""
    half, wide = (numbers(2, 3, 4, 8, kind=kind) for kind in (torch.float16, torch.bfloat16))
    weight, cos, sin = numbers(8, kind=torch.float32), *(numbers(1, 1, 4, 8, kind=torch.bfloat16) for _ in range(2))
    for name, given in {
        "gated": (half, half), "norm": (wide, weight, 1e-5), "turned": (wide, cos, sin),
        "turned_back": (wide[:1].transpose(2, 3).contiguous().transpose(2, 3), cos, sin),
    }.items():  # fmt: skip
        found, want = (getattr(form, name)(*given) for form in (NATIVE, WRITTEN))
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, want)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("target", [-1, 33])
def test_a_target_beyond_the_logits_is_an_error(target):
    logits, targets = numbers(2, 33, kind=torch.float32), torch.tensor([[3], [target]])
    for form in (NATIVE, WRITTEN):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            form.losses(logits.clone(), targets)
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            form.loss_slopes(logits.clone(), targets, torch.ones(2), torch.float32)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_native_functions_hide_nothing_that_is_not_a_number(kind):
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = numbers(5, 40, kind=kind)
        x[2, 7] = bad
        targets, weights = torch.arange(5)[:, None], torch.ones(5)
        for name, given in {
            "gated": (x, x), "gated_slopes": (x, x, x), "norm": (x, x[0], 1e-5),
            "losses": (x, targets), "loss_slopes": (x, targets, weights, kind),
        }.items():  # fmt: skip
            found, want = (
                getattr(form, name)(*(x.clone() if x is y else y for y in given)) for form in (NATIVE, WRITTEN)
            )
            for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, want)), strict=True):
                assert torch.equal(a.isfinite(), b.isfinite()), (name, bad)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_native_functions_add_up_the_same_with_any_number_of_threads(kind):
    x, weights = numbers(300, 700, kind=kind), torch.linspace(0, 1, 300)
    targets = torch.arange(300)[:, None]

    def all_of_them():
        return [*NATIVE.norm(x, x[0], 1e-5), *NATIVE.loss_slopes(x.clone(), targets, weights, kind), NATIVE.gated(x, x)]

    one, threads = all_of_them(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(a, b) for a, b in zip(one, all_of_them(), strict=True))
    finally:
        torch.set_num_threads(threads)


def model_of(kind):
    model = tiny_llama().to(kind)
    create(LoraSettings(rank=4)).apply(model)
    return model.train()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile builds its functions by g++")
def test_compiled_it_agrees_on_a_model_and_nothing_is_compiled_after_the_trial():
    """Head norms, heads of queries and of keys, one head of keys: three widths, three numbers of dimensions."""
    register()
    config = CONFIG_MAPPING["qwen3"](
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=1, attn_implementation=NAME,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    create(LoraSettings(rank=4)).apply(model.train())
    form, written = between.compiled(), []
    with fuse.fused(model):
        assert fuse.why_not(model, form) is None
        assert model.training and all(p.grad is None for p in model.parameters())
        for lengths in ((30, 1, 12), (9,), (150, 40)):
            ids = [np.arange(n, dtype=np.int32) % 97 for n in lengths]
            layout = lay_out(ids, [np.ones(n, np.uint8) for n in lengths], range(len(ids)))
            for one in (between.WRITTEN, form):
                with between.using(one), torch._dynamo.config.patch(error_on_recompile=True):
                    with torch.no_grad():
                        unseen, _ = token_losses(model, layout)
                    loss, _ = token_losses(model, layout)
                    loss.backward()
                written.append((unseen, loss.detach(), *(p.grad for p in trainable(model).values())))
                model.zero_grad(set_to_none=True)
            for a, b in zip(*written[-2:], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_under_autocast_rounding_is_allowed_for(plain):
    """Full fine-tuning: weights in fp32, what lies between products in bf16 and in fp32."""
    model = tiny_llama().train()
    with fuse.fused(model), torch.autocast("cpu", torch.bfloat16):
        assert fuse.why_not(model, plain) is None
        wrong = dataclasses.replace(plain, gated=lambda gate, up: 1.1 * WRITTEN.gated(gate, up))
        assert "results of gated differ" in fuse.why_not(model, wrong)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_form_that_computes_something_else_is_found_out(kind, plain):
    model = model_of(kind)

    def other(name):
        wrong = {
            "gated": lambda gate, up: F.gelu(gate) * up,
            "gated_slopes": lambda grad, gate, up: (grad * up, grad),
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
            assert f"results of {field.name} differ" in (fuse.why_not(model, other(field.name)) or ""), field.name
        first = []

        def once(x, w, eps):
            out, inverse = WRITTEN.norm(x, w, eps)
            first.append(1)
            return out * (torch.nan if len(first) == 1 else 1), inverse

        assert "results of norm differ by nan" in fuse.why_not(model, dataclasses.replace(plain, norm=once))


def test_what_a_compiler_says_is_the_reason(plain):
    def fails(*_):
        raise RuntimeError("no C compiler here\nand more")

    model = model_of(torch.float32)
    with fuse.fused(model):
        assert fuse.why_not(model, dataclasses.replace(plain, norm=fails)) == "RuntimeError: no C compiler here"
    assert between.in_use is WRITTEN
