"""Inputs that the backward forms again: gone after the forward, and the gradients are the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from fitout.model import formed, fused
from fitout.model.fuse import fused as fused_forms
from fitout.model.methods import DoraSettings, FullSettings, LoraSettings, SparseSettings, create
from fitout.model.methods.lora import LoraLinear
from tests.model.test_fuse import loss_and_gradients, tiny

METHODS = {
    "full": FullSettings(), "lora": LoraSettings(rank=4), "dora": DoraSettings(rank=4),
    "sparse": SparseSettings(density=0.05),
}  # fmt: skip


def layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Linear(8, 6, bias=False)
    if kind == "lora":
        made = LoraLinear(made, rank=2, scale=2.0, dropout=0.0)
        nn.init.normal_(made.lora_B)
    made.forward = formed.Sparing(made.forward)
    return made


def normed() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    return x, fused.rms_norm(x, torch.ones(8), 1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_input_is_gone_after_the_forward(kind, autocast):
    one, two = layer(kind), layer(kind)
    for source in (normed, lambda: (None, fused.swiglu(*(torch.randn(1, 5, 8).requires_grad_() for _ in range(2))))):
        x, h = source()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = one(h).float().sum() + two(h).float().sum()
        here = StorageWeakRef(h.untyped_storage())
        del h
        assert here.expired()
        out.backward()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_gradients_are_the_same_bits(monkeypatch, method, autocast):
    model, taken = tiny("llama"), []
    create(METHODS[method]).apply(model)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)

    def trained():
        torch.manual_seed(3)
        with fused_forms(model), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return loss_and_gradients(model)

    original = formed.Formed.taken
    monkeypatch.setattr(formed.Formed, "taken", lambda self: taken.append(self) or original(self))
    loss, gradients = trained()
    inputs = 2 * 6  # of every linear layer of both blocks but o_proj, whose input attention keeps
    assert len(taken) == inputs
    monkeypatch.setattr(fused, "remember", lambda x, make, source: x)
    plain_loss, plain = trained()
    assert len(taken) == inputs
    assert loss.equal(plain_loss) and all(grad.equal(plain[name]) for name, grad in gradients.items())


def test_a_second_backward_and_a_graph_that_is_used_in_part():
    one, two = layer("full"), layer("lora")
    x, h = normed()
    left, right = one(h).square().sum(), two(h).square().sum()
    first = torch.autograd.grad(right, x, retain_graph=True)[0]
    both = torch.autograd.grad(left + right, x, retain_graph=True)[0]
    torch.testing.assert_close(both, first + torch.autograd.grad(left, x)[0])


def test_a_source_that_was_changed_is_an_error():
    x = torch.randn(1, 5, 8, requires_grad=True)
    source = x * 1
    out = layer("full")(fused.rms_norm(source, torch.ones(8), 1e-6))
    source.add_(1)
    with pytest.raises(RuntimeError, match="modified"):
        out.sum().backward()


def test_checkpointing_decides_for_itself():
    """It keeps nothing between forward and backward; a note would hold on to what it lets go."""
    one = layer("full")

    def block(x):
        middle = x * 2
        places.append(StorageWeakRef(middle.untyped_storage()))
        return one(fused.rms_norm(middle, torch.ones(8), 1e-6))

    places: list[StorageWeakRef] = []
    x, _ = normed()
    out = checkpoint(block, x, use_reentrant=False)
    assert places[0].expired()
    again = torch.autograd.grad(out.square().sum(), x)[0]
    torch.testing.assert_close(again, torch.autograd.grad(block(x).square().sum(), x)[0])
