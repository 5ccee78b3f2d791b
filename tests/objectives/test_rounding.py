"""Rows filled up to a round length for bf16 compute the same losses and gradients, to its rounding."""

from __future__ import annotations

import numpy as np
import torch

from fitout.data.pack import lay_out
from fitout.objectives import base
from tests.conftest import random_samples, tiny_llama


def computed(model, layout):
    model.zero_grad()
    summed, losses = base.token_losses(model, layout)
    summed.backward()
    return losses, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_filling_changes_nothing(monkeypatch):
    ids, train_on = random_samples(5, prefix=20)
    layout = lay_out(ids, train_on, range(5), share=True)
    assert layout.tokens % base.ROUND_TO and any(segment.parent >= 0 for segment in layout.segments)
    model = tiny_llama().to(torch.bfloat16)
    filled, _ = base.inputs(layout, torch.device("cpu"), filling=base.padding(model, layout))
    assert filled["input_ids"].shape[1] % base.ROUND_TO == 0
    assert filled["segments"][-1].end == filled["input_ids"].shape[1] == filled["position_ids"].shape[1]
    assert np.array_equal(filled["input_ids"][0, : layout.tokens], layout.ids)
    losses, gradients = computed(model, layout)
    monkeypatch.setattr(base, "ROUND_TO", 1)
    plain_losses, plain_gradients = computed(model, layout)
    torch.testing.assert_close(losses, plain_losses, rtol=2e-2, atol=2e-2)
    for name, gradient in gradients.items():
        gap = (gradient.float() - plain_gradients[name].float()).norm()
        assert gap <= 2e-2 * plain_gradients[name].float().norm() + 1e-6, name


def test_without_packing_rows_are_filled_at_their_end_where_there_are_positions(monkeypatch):
    ids, train_on = random_samples(1)
    layout = lay_out(ids, train_on, range(1))
    model = tiny_llama(packed=False).to(torch.bfloat16)
    losses, gradients = computed(model, layout)
    filled = base.padding(model, layout)
    assert filled == -layout.tokens % base.ROUND_TO > 1
    positions = base.inputs(layout, torch.device("cpu"), filling=filled, packed=False)[0]["position_ids"]
    assert torch.equal(positions[0], torch.arange(layout.tokens + filled))
    model.config.max_position_embeddings = layout.tokens + 1
    assert base.padding(model, layout) == 1
    model.config.max_position_embeddings = layout.tokens
    assert base.padding(model, layout) == 0
    monkeypatch.setattr(base, "ROUND_TO", 1)
    plain_losses, plain_gradients = computed(model, layout)
    torch.testing.assert_close(losses, plain_losses, rtol=2e-2, atol=2e-2)
    for name, gradient in gradients.items():
        gap = (gradient.float() - plain_gradients[name].float()).norm()
        assert gap <= 2e-2 * plain_gradients[name].float().norm() + 1e-6, name


def test_the_head_meets_round_numbers_of_rows(monkeypatch):
    """oneDNN would keep a kernel for each number of trained tokens: 800 MB on 30 steps of Alpaca rows."""
    met = []
    original = base.head_cross_entropy

    def noted(model, hidden, targets, weights):
        met.append((len(hidden), float(weights.sum())))
        return original(model, hidden, targets, weights)

    monkeypatch.setattr(base, "head_cross_entropy", noted)
    model = tiny_llama().to(torch.bfloat16)
    for number in (3, 5):
        ids, train_on = random_samples(number)
        layout = lay_out(ids, train_on, range(number))
        assert layout.supervised % base.ROUND_TO
        _, losses = base.token_losses(model, layout)
        assert len(losses) == layout.supervised
        rows, weight = met.pop()
        assert rows % base.ROUND_TO == 0 and weight == float(layout.target_weight.sum())
