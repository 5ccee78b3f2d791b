"""Loss and gradients equal a plain F.cross_entropy; the fused forms equal the formulas they stand for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fitout.data.pack import lay_out
from fitout.model import between, fused
from fitout.model.fused import linear_cross_entropy, lora_linear
from fitout.objectives import SftSettings, create
from tests.conftest import tiny_llama

IDS = [[5, 17, 3, 88, 41, 9], [12, 60, 60, 2], [7, 8, 9, 10, 11, 12, 13, 14]]
TRAINED = [[0, 0, 0, 1, 1, 1], [1, 1, 0, 1], [0, 0, 1, 1, 0, 0, 1, 0]]


@pytest.mark.parametrize("tied", [False, True])
def test_hand_made_batch(tied):
    """Padded by hand, shifted by hand: 3 + 2 + 3 = 8 targets (the first token of a sample has nothing before it)."""
    plain = tiny_llama(packed=False, tied=tied)
    input_ids = torch.tensor([[5, 17, 3, 88, 41, 9, 0, 0], [12, 60, 60, 2, 0, 0, 0, 0], [7, 8, 9, 10, 11, 12, 13, 14]])
    attention = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    labels = torch.tensor(
        [
            [-100, -100, 88, 41, 9, -100, -100],
            [60, -100, 2, -100, -100, -100, -100],
            [-100, 9, 10, -100, -100, 13, -100],
        ]
    )
    logits = plain(input_ids=input_ids, attention_mask=attention).logits[:, :-1]
    want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    want.backward()

    model, objective = tiny_llama(tied=tied), create(SftSettings())
    ids = [np.array(i, np.int32) for i in IDS]
    layout = lay_out(ids, [np.array(t, np.uint8) for t in TRAINED], range(3))
    assert objective.units([layout]) == 8
    got = objective.loss(model, layout, 8)
    got.backward()
    assert got.item() == pytest.approx(want.item(), abs=1e-6)
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-6, rtol=1e-4, msg=name)


def head(rows=200, width=24, vocab=97, *, dtype=torch.float32, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, width, generator=g).to(dtype).requires_grad_(),
        (torch.randn(vocab, width, generator=g) / width**0.5).to(dtype).requires_grad_(),
        torch.randn(vocab, generator=g).requires_grad_() if bias else None,
        torch.randint(vocab, (rows,), generator=g),
        torch.rand(rows, generator=g),
    )


def plain_cross_entropy(hidden, weight, bias, targets, weights):
    logits = F.linear(hidden, weight).float()
    losses = F.cross_entropy(logits if bias is None else logits + bias, targets, reduction="none")
    return (losses * weights).sum(), losses


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 64 * 4 * 97, 32 << 20])
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
def test_linear_cross_entropy(monkeypatch, bias, chunk_bytes, rows):
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", chunk_bytes)  # 1: chunks of 64 rows, the smallest
    ours, theirs = head(rows, bias=bias), head(rows, bias=bias)
    loss, each = linear_cross_entropy(*ours)
    want, want_each = plain_cross_entropy(*theirs)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(each, want_each.detach(), rtol=1e-5, atol=1e-6)
    assert not each.requires_grad
    (3 * loss).backward()
    (3 * want).backward()
    for got, right in zip(ours[: 2 + bias], theirs[: 2 + bias], strict=True):
        torch.testing.assert_close(got.grad, right.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_linear_cross_entropy_trains_only_what_is_asked(trained):
    """A frozen head, a frozen model below a trained head, and a bias alone."""
    ours, theirs = list(head()), list(head())
    at = ["hidden", "weight", "bias"].index(trained)
    for side in (ours, theirs):
        for other in range(3):
            if other != at:
                side[other] = side[other].detach()
    linear_cross_entropy(*ours)[0].backward()
    plain_cross_entropy(*theirs)[0].backward()
    torch.testing.assert_close(ours[at].grad, theirs[at].grad, rtol=1e-4, atol=1e-5)
    assert all(ours[other].grad is None for other in range(3) if other != at)


def test_linear_cross_entropy_without_gradients(monkeypatch):
    """An evaluation forms none, also where the head is trained."""
    hidden, weight, bias, targets, weights = head()
    assert weight.requires_grad and hidden.requires_grad
    monkeypatch.setattr(between, "in_use", replace(between.WRITTEN, loss_slopes=None))
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, bias, targets, weights)
    torch.testing.assert_close(loss, plain_cross_entropy(hidden, weight, bias, targets, weights)[0].detach())


def test_linear_cross_entropy_bf16(monkeypatch):
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", 1)
    ours, theirs = head(dtype=torch.bfloat16), head(dtype=torch.bfloat16)
    loss, _ = linear_cross_entropy(*ours)
    want, _ = plain_cross_entropy(*theirs)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-4)
    loss.backward()
    want.backward()
    for got, right in zip(ours[:3], theirs[:3], strict=True):
        assert got.grad.dtype == got.dtype
        scale = right.grad.abs().max()
        torch.testing.assert_close(got.grad / scale, right.grad / scale, rtol=0, atol=1e-2)


def test_linear_cross_entropy_under_autocast():
    """fp32 weights, bf16 products, as full fine-tuning computes in bf16."""
    ours, theirs = head(), head()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(*ours)
        want, _ = plain_cross_entropy(*theirs)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=1e-3, atol=1e-3)
    loss.backward()
    want.backward()
    for got, right in zip(ours[:3], theirs[:3], strict=True):
        assert got.grad.dtype == torch.float32
        scale = right.grad.abs().max()
        torch.testing.assert_close(got.grad / scale, right.grad / scale, rtol=0, atol=2e-2)


def low_rank(dtype=torch.float32, bias=True, rank=3):
    g = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return draw(2, 5, 7).requires_grad_(), draw(6, 7), draw(6) if bias else None, draw(rank, 7).requires_grad_(), \
        draw(6, rank).requires_grad_()  # fmt: skip


@pytest.mark.parametrize("rank", [1, fused.THIN - 1, fused.THIN])  # products turned round, and as they stand
@pytest.mark.parametrize("bias", [False, True])
def test_lora_linear_is_the_formula(bias, rank):
    ours, theirs = low_rank(bias=bias, rank=rank), low_rank(bias=bias, rank=rank)
    got = lora_linear(*ours, 1.5)
    x, weight, b0, a, b = theirs
    want = F.linear(x, weight, b0) + 1.5 * (x @ a.t()) @ b.t()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    slope = torch.linspace(-1, 1, got.numel()).view_as(got)
    got.backward(slope)
    want.backward(slope)
    for index in (0, 3, 4):
        torch.testing.assert_close(ours[index].grad, theirs[index].grad, rtol=1e-4, atol=1e-5)
        assert ours[index].grad.is_contiguous()


@pytest.mark.parametrize("bias", [False, True])
def test_lora_linear_gradcheck(bias):
    x, weight, b0, a, b = low_rank(torch.float64, bias)
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, weight, b0, a, b, 0.7), (x, a, b))


def test_lora_linear_keeps_masters_in_fp32_under_bf16():
    x, weight, bias, a, b = low_rank()
    a16, b16 = a.detach().bfloat16(), b.detach().bfloat16()
    x16 = x.detach().bfloat16().requires_grad_()
    got = lora_linear(x16, weight.bfloat16(), bias.bfloat16(), a, b, 1.5)
    want = F.linear(x16.float(), weight, bias) + 1.5 * (x16.float() @ a16.float().t()) @ b16.float().t()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=5e-2, atol=2e-1)
    got.sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32 and x16.grad.dtype == torch.bfloat16
