"""The fused forms equal transformers' own code, family by family, and stay out where a family does something else."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fitout.layout import Segment
from fitout.model import fuse as fusing
from fitout.model.attention import NAME, packed_attention, register
from fitout.model.fused import linear_cross_entropy
from fitout.model.methods import LoraSettings, create
from fitout.model.methods.base import trainable

FAMILIES = {  # norms, feed-forwards and rotary embedding replaced
    "llama": (True, True, True),
    "mistral": (True, True, True),
    "qwen2": (True, True, True),
    "qwen3": (True, True, True),
    "gemma": (False, False, True),  # 1 + w; gelu
    "phi3": (True, False, True),  # one product for gate and up
    "stablelm": (False, True, True),  # layer norms; the part of a head that is turned is cut out before
}


def tiny(family: str, dtype=torch.float32):
    config = CONFIG_MAPPING[family](
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for parameter in model.parameters():  # norms at 1 would hide a weight that is left out
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).train()


def loss_and_gradients(model):
    ids = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=ids, use_cache=False).logits.float()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: parameter.grad.float() for name, parameter in trainable(model).items()}


def assert_same(got, want, tolerance):
    assert abs(got[0] - want[0]) <= tolerance * want[0]
    assert got[1].keys() == want[1].keys()
    largest = max(float(grad.abs().max()) for grad in want[1].values())
    for name, grad in want[1].items():
        gap = float((got[1][name] - grad).abs().max())
        assert gap <= tolerance * max(float(grad.abs().max()), 1e-3 * largest), name


def replaced(model) -> tuple[bool, bool, bool]:
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    home = sys.modules[type(model).__module__]
    return (
        any(isinstance(forward, fusing._Norm) for forward in forwards),
        any(isinstance(forward, fusing._Gated) for forward in forwards),
        isinstance(getattr(home, fusing.ROTARY, None), fusing._Rotary),
    )


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_trains_as_its_own_code(family, method):
    model = tiny(family)
    if method == "lora":
        create(LoraSettings(rank=4)).apply(model)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.1)
    want = loss_and_gradients(model)
    with fusing.fused(model):
        assert replaced(model) == FAMILIES[family]
        assert_same(loss_and_gradients(model), want, 1e-4)


def test_afterwards_all_is_as_it_was():
    """Another model of the same modelling file, and this one itself, compute as if nothing had been fused."""
    model, other = tiny("llama"), tiny("llama")
    want = loss_and_gradients(other)
    with fusing.fused(model):
        with fusing.fused(other):
            pass
        assert replaced(model) == (True, True, True) and not any(replaced(other)[:2])
        inside = loss_and_gradients(other)
    assert replaced(model) == replaced(other) == (False, False, False)
    assert not all(grad.equal(inside[1][name]) for name, grad in want[1].items())  # the rotation is the file's
    for one in (model, other):
        got = loss_and_gradients(one)
        assert got[0].equal(want[0]) and all(grad.equal(got[1][name]) for name, grad in want[1].items())


def test_in_bf16_within_its_rounding():
    model = tiny("llama", torch.bfloat16)
    exact = loss_and_gradients(copy.deepcopy(model).float())
    own = loss_and_gradients(model)
    with fusing.fused(model):
        ours = loss_and_gradients(model)
    for name, grad in exact[
        1
    ].items():  # not further from the exact gradient than the original's rounding is, twice over
        off = float((own[1][name] - grad).norm())
        assert float((ours[1][name] - grad).norm()) <= 2 * off + 1e-3 * float(grad.norm()), name


def test_a_norm_that_computes_something_else_keeps_its_own_code():
    class OtherRMSNorm(type(tiny("llama").model.norm)):
        def forward(self, x):
            return super().forward(x) + 1e-3

    model = tiny("llama")
    model.model.norm.__class__ = OtherRMSNorm
    with fusing.fused(model):
        assert "forward" not in vars(model.model.norm)
        assert isinstance(model.model.layers[0].input_layernorm.forward, fusing._Norm)


def test_cross_entropy_of_large_and_equal_logits():
    """Chunks of rows, weights, and logits that overflow exp()."""
    torch.manual_seed(3)
    hidden, weight = (40 * torch.randn(300, 8)).requires_grad_(), torch.randn(20_000, 8)
    targets, weights = torch.randint(20_000, (300,)), torch.rand(300)
    summed, losses = linear_cross_entropy(hidden, weight, None, targets, weights)
    summed.backward()
    want = F.cross_entropy(hidden.detach() @ weight.t(), targets, reduction="none")
    torch.testing.assert_close(losses, want, atol=1e-3, rtol=1e-5)
    again = hidden.detach().requires_grad_()
    (F.cross_entropy(again @ weight.t(), targets, reduction="none") * weights).sum().backward()
    torch.testing.assert_close(hidden.grad, again.grad, atol=1e-4, rtol=1e-4)


def each_alone(leaves, segments):
    """(1, T, H, D): every document through PyTorch's own attention, one by one."""
    q, k, v = leaves
    parts = [
        F.scaled_dot_product_attention(
            q[:, :, s.start : s.end], k[:, :, s.start : s.end].repeat_interleave(q.shape[1] // k.shape[1], 1),
            v[:, :, s.start : s.end].repeat_interleave(q.shape[1] // v.shape[1], 1), is_causal=True, scale=0.3,
        )
        for s in segments
    ]  # fmt: skip
    return torch.cat(parts, 2).transpose(1, 2)


@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_attention_equals_each_document_alone(dtype, width):
    torch.manual_seed(4)
    register()
    assert NAME == "fitout"
    segments = (Segment(0, 5), Segment(5, 6), Segment(6, 23), Segment(23, 600))
    leaves = [torch.randn(1, heads, 600, width, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
    slope = torch.randn(1, 600, 4, width, dtype=dtype)
    out, _ = packed_attention(None, *leaves, None, segments=segments, scaling=0.3)
    ours = [out, *torch.autograd.grad(out, leaves, slope)]
    theirs = each_alone(leaves, segments)
    theirs = [theirs, *torch.autograd.grad(theirs, leaves, slope)]
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact = each_alone(exact_leaves, segments)
    exact = [exact, *torch.autograd.grad(exact, exact_leaves, slope.double())]
    far, their_far = (
        [((a - t).norm() / t.norm()).item() for a, t in zip(x, exact, strict=True)] for x in (ours, theirs)
    )
    assert max(far) <= (1e-6 if dtype == torch.float32 else 1e-2)
    assert all(a <= 1.5 * b for a, b in zip(far, their_far, strict=True))  # no further from the truth than PyTorch's


@pytest.mark.parametrize(("length", "width"), [(9, 8), (300, 64)])
def test_documents_attention_under_autocast(length, width):
    """Full fine-tuning in bf16: queries and keys come in fp32 from the rotation, values in bf16. Autocast says in which
    type they are attended to, and nothing within."""
    torch.manual_seed(5)
    leaves = [torch.randn(1, 4, length, width, requires_grad=True) for _ in range(3)]
    how = {"segments": (Segment(0, length),), "scaling": 0.3}
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = packed_attention(None, *leaves[:2], leaves[2].bfloat16(), None, **how)
    alone, _ = packed_attention(None, *(leaf.bfloat16() for leaf in leaves), None, **how)
    assert out.dtype == torch.bfloat16 and torch.equal(out, alone)
    torch.testing.assert_close(out.float(), each_alone(leaves, how["segments"]), atol=2e-2, rtol=2e-2)
    out.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
