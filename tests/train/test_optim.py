"""The optimizers: 8-bit moments against the ones of bitsandbytes used directly, their state, and what is said."""

from __future__ import annotations

import pytest
import torch

from fitout.errors import RequestError
from fitout.train import TrainSettings, optim
from fitout.train.optim import load_state_tensors, make_optimizer, optimizer_notes, state_tensors

SHAPES = {"wide": (80, 64), "small": (5, 7), "norm": (64,)}  # the first has moments in 8 bits, the others in 32


def parameters():
    torch.manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


def step(optimizer, named, seed):
    torch.manual_seed(seed)
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 * group["factor"]
    optimizer.step()


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_moments_are_those_of_bitsandbytes(kind):
    from bitsandbytes.optim import AdamW8bit

    ours, theirs, exact = parameters(), parameters(), parameters()
    settings = TrainSettings(optimizer=kind, weight_decay=0.1)
    optimizer = make_optimizer(ours, settings, {"small": 3.0})
    direct = AdamW8bit(
        [{"params": [theirs["wide"]], "factor": 1, "weight_decay": 0.1},
         {"params": [theirs["small"]], "factor": 3, "weight_decay": 0.1},
         {"params": [theirs["norm"]], "factor": 1, "weight_decay": 0}],
    )  # fmt: skip
    plain = make_optimizer(exact, TrainSettings(weight_decay=0.1), {"small": 3.0})
    for seed in range(5):
        for one, named in ((optimizer, ours), (direct, theirs), (plain, exact)):
            step(one, named, seed)
    for name in SHAPES:
        assert torch.equal(ours[name], theirs[name])
        assert (ours[name] - exact[name]).abs().max() < 2e-2  # of five steps of up to 1e-2 (3e-2) each
    assert not torch.equal(ours["wide"], exact["wide"])
    torch.testing.assert_close(ours["norm"], exact["norm"], rtol=1e-5, atol=1e-5)
    saved = state_tensors(optimizer, ours)
    assert saved["wide|state1"].dtype == torch.uint8 and saved["norm|state1"].dtype == torch.float32
    assert not any("qmap" in key for key in saved)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_state_comes_back_bit_for_bit(kind):
    whole, first = parameters(), parameters()
    settings = TrainSettings(optimizer=kind)
    one, other = make_optimizer(whole, settings, {}), make_optimizer(first, settings, {})
    for seed in range(3):
        step(one, whole, seed)
        step(other, first, seed)
    saved = {key: tensor.clone() for key, tensor in state_tensors(other, first).items()}
    resumed = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in first.items()}
    again = make_optimizer(resumed, settings, {})
    load_state_tensors(again, resumed, saved)
    for seed in range(3, 6):
        step(one, whole, seed)
        step(again, resumed, seed)
    assert all(torch.equal(whole[name], resumed[name]) for name in SHAPES)


def test_what_a_cpu_costs_is_said_and_a_missing_package_is_named(monkeypatch):
    cpu = torch.device("cpu")
    assert optimizer_notes(TrainSettings(), cpu) == []
    assert "slower" in optimizer_notes(TrainSettings(optimizer="adamw_8bit"), cpu)[0]
    assert "nothing to page" in optimizer_notes(TrainSettings(optimizer="paged_adamw_8bit"), cpu)[0]
    assert optimizer_notes(TrainSettings(optimizer="adamw_8bit"), torch.device("cuda")) == []
    monkeypatch.setattr(optim, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match="bitsandbytes") as error:
        make_optimizer(parameters(), TrainSettings(optimizer="adamw_8bit"), {})
    assert "fitout[qlora]" in error.value.hint
