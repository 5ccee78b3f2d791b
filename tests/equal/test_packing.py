"""Packed = unpacked, shared prefixes = apart, and both = a plain cross-entropy over padded batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fitout.data.pack import lay_out, pack
from fitout.objectives import SftSettings, create
from tests.conftest import random_samples, tiny_llama

from .small import LOW_RANK, adapted

OBJECTIVE = create(SftSettings())


def plain_loss_and_gradients(ids, train_on, **model_kwargs):
    """The slow obvious computation: each sample alone through plain SDPA, shifted logits, F.cross_entropy, one mean."""
    model = tiny_llama(packed=False, **model_kwargs)
    loss = plain_loss(model, ids, train_on)
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters()}


def plain_loss(model, ids, train_on):
    total = sum(int(on[1:].sum()) for on in train_on)
    loss = 0.0
    for one, on in zip(ids, train_on, strict=True):
        logits = model(torch.tensor(one[None].astype(np.int64))).logits[0, :-1]
        losses = F.cross_entropy(logits, torch.tensor(one[1:].astype(np.int64)), reduction="none")
        loss = loss + (losses * torch.tensor(on[1:].astype(np.float32))).sum() / total
    return loss


def our_loss_and_gradients(ids, train_on, *, budget, share, **model_kwargs):
    model = tiny_llama(**model_kwargs)
    layouts = [
        lay_out([ids[i] for i in block], [train_on[i] for i in block], block, share=share)
        for block in pack(ids, budget, share=share)
    ]
    total = OBJECTIVE.units(layouts)
    loss = sum(OBJECTIVE.loss(model, layout, total) for layout in layouts)
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters()}, layouts


@pytest.mark.parametrize("prefix", [0, 24])
@pytest.mark.parametrize("budget", [64, 10_000])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_packed_equals_each_sample_alone(prefix, budget, share, tied):
    ids, train_on = random_samples(9, prefix=prefix)
    want, want_grads = plain_loss_and_gradients(ids, train_on, tied=tied)
    got, grads, layouts = our_loss_and_gradients(ids, train_on, budget=budget, share=share, tied=tied)
    assert got == pytest.approx(want, abs=1e-6)
    for name, grad in want_grads.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-6, rtol=1e-4, msg=name)
    tokens = sum(len(i) for i in ids)
    computed = sum(layout.tokens for layout in layouts)
    assert computed < tokens if share and prefix else computed == tokens


@pytest.mark.parametrize("kind", LOW_RANK)
def test_with_adapters_too(kind):
    """Packed with a shared prefix against each sample alone through plain SDPA."""
    ids, train_on = random_samples(6, prefix=24)
    model, _ = adapted(LOW_RANK[kind])
    layouts = [
        lay_out([ids[i] for i in block], [train_on[i] for i in block], block, share=True)
        for block in pack(ids, 10_000, share=True)
    ]
    total = OBJECTIVE.units(layouts)
    loss = sum(OBJECTIVE.loss(model, layout, total) for layout in layouts)
    loss.backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, _ = adapted(LOW_RANK[kind], packed=False)
    want = plain_loss(plain, ids, train_on)
    want.backward()
    assert sum(layout.tokens for layout in layouts) < sum(len(i) for i in ids)
    assert float(loss.detach()) == pytest.approx(float(want.detach()), abs=1e-6)
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, atol=2e-6, rtol=1e-4, msg=name)


def test_a_tree_with_branches_ends_and_twins():
    """Two levels of sharing, a sample that is the trunk itself, and two identical samples; every token trained."""
    rng = np.random.default_rng(3)
    root, limb = rng.integers(1, 97, 20), rng.integers(1, 97, 18)
    tails = [rng.integers(1, 97, n) for n in (3, 7, 11)]
    ids = [
        root,
        np.concatenate([root, limb]),
        np.concatenate([root, limb, tails[0]]),
        np.concatenate([root, limb, tails[1]]),
        np.concatenate([root, tails[2]]),
        np.concatenate([root, tails[2]]),
        rng.integers(1, 97, 9),
    ]
    ids = [i.astype(np.int32) for i in ids]
    train_on = [np.ones(len(i), np.uint8) for i in ids]
    want, want_grads = plain_loss_and_gradients(ids, train_on)
    got, grads, layouts = our_loss_and_gradients(ids, train_on, budget=10_000, share=True)
    assert got == pytest.approx(want, abs=1e-6)
    for name, grad in want_grads.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-6, rtol=1e-4, msg=name)
    assert layouts[0].tokens == 20 + 18 + 3 + 7 + 11 + 11 + 9  # twins shorter than MIN_SHARED past the fork stay apart
    assert layouts[0].supervised == sum(len(i) - 1 for i in ids)


def test_documents_do_not_see_each_other():
    """Changing one document of a block moves no logit of the others."""
    ids, _ = random_samples(4)
    model = tiny_llama().eval()

    def logits(samples):
        layout = lay_out(samples, [np.ones(len(i), np.uint8) for i in samples], range(len(samples)))
        out = model(
            input_ids=torch.from_numpy(layout.ids)[None],
            position_ids=torch.from_numpy(layout.positions)[None],
            segments=layout.segments,
            use_cache=False,
        )
        return out.logits[0], layout

    with torch.no_grad():
        before, layout = logits(ids)
        changed = [ids[0], ids[1], (ids[2] + 1) % 97, ids[3]]
        after, _ = logits(changed)
    touched = layout.segments[2]
    same = torch.ones(len(before), dtype=torch.bool)
    same[touched.start : touched.end] = False
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[~same], after[~same])


@pytest.mark.parametrize("window", [4, 7])
def test_sliding_window_is_honoured(window):
    """Against transformers' own Mistral with eager attention."""
    from transformers import MistralConfig, MistralForCausalLM

    from fitout.model.attention import NAME, register

    register()
    ids, train_on = random_samples(3, low=10)
    config = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window,
    )  # fmt: skip
    torch.manual_seed(0)
    ours = MistralForCausalLM(MistralConfig(**config, attn_implementation=NAME)).eval()
    theirs = MistralForCausalLM(MistralConfig(**config, attn_implementation="eager")).eval()
    theirs.load_state_dict(ours.state_dict())
    layout = lay_out(ids, train_on, range(3))
    with torch.no_grad():
        got = ours(
            input_ids=torch.from_numpy(layout.ids)[None],
            position_ids=torch.from_numpy(layout.positions)[None],
            segments=layout.segments,
            use_cache=False,
        ).logits[0]
        for segment, one in zip(layout.segments, ids, strict=True):
            want = theirs(torch.tensor(one[None].astype(np.int64))).logits[0]
            torch.testing.assert_close(got[segment.start : segment.end], want, atol=1e-5, rtol=1e-4)
