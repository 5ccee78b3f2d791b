"""From hidden states to losses: the head on the rows that are asked for, in chunks, whatever a model makes of logits.

A plain linear head goes through `fused.linear_cross_entropy`. Any other (soft-capped or scaled logits, hidden states
scaled before it, an adapted head) is the model's own forward with given hidden states in the decoder's place, so
nothing about a family needs to be known. Which of the two it is, is tried, not read from names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused import chunk_rows, linear_cross_entropy

PLAIN, OWN, WHOLE = "plain", "own", "whole"
TRIED = 16  # tokens of the small head that a forward is tried with
SAME = 1e-6  # largest difference of logits over the largest logit


def kind_of_head(model: Any) -> str:
    """`plain`: the logits are the linear head's output and nothing else; `own`: the model's own forward makes them of
    any hidden states; `whole`: its forward cannot be taken apart, and all supervised rows go through it at once."""
    head = model.get_output_embeddings()
    known = getattr(model, "fitout_head", None)
    if known is None or known[0] is not head:
        known = model.fitout_head = (head, _tried(model, head))
    return known[1]


def head_cross_entropy(model: Any, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies of a model's logits at `hidden`, without all logits at once.

    hidden (N, D), the decoder's output; targets (N) int64, weights (N) float32. Returns the sum (scalar, differentiable
    once) and the unweighted losses (N), detached. The head must not be `whole`.
    """
    head = model.get_output_embeddings()
    if kind_of_head(model) == PLAIN:
        return linear_cross_entropy(hidden, head.weight, head.bias, targets, weights)
    below = {id(p) for p in model.get_decoder().parameters()} - {id(p) for p in head.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in below]
    if not torch.is_grad_enabled():  # which autograd's functions are not told
        hidden, trained = hidden.detach(), []
    rows = chunk_rows(len(head.weight), hidden.device.type)

    def logits_of(chunk: Tensor) -> Tensor:
        return _own_logits(model, chunk)

    return _HeadCrossEntropy.apply(hidden, targets, weights, logits_of, rows, *trained)


class _HeadCrossEntropy(torch.autograd.Function):
    """As `linear_cross_entropy`: gradients are formed in the forward, chunk by chunk; here by autograd."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weights: Tensor, logits_of: Callable[[Tensor], Tensor], rows: int,
        *trained: Tensor,
    ):  # fmt: skip
        need_hidden, needed = ctx.needs_input_grad[0], any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grads = [torch.zeros_like(one, dtype=torch.float32) for one in trained] if needed else []
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            with torch.set_grad_enabled(needed):
                chunk = hidden[part].detach().requires_grad_(need_hidden)
                each = F.cross_entropy(logits_of(chunk).float(), targets[part], reduction="none")
                losses[part] = each.detach()
                if needed:
                    wanted = [chunk, *trained] if need_hidden else trained
                    found = list(torch.autograd.grad((each * weights[part]).sum(), wanted, allow_unused=True))
                    if grad_hidden is not None:
                        grad_hidden[part] = found.pop(0)
                    for whole, one in zip(grads, found, strict=True):
                        if one is not None:
                            whole += one
        ctx.save_for_backward(grad_hidden, *grads)
        ctx.dtypes = [one.dtype for one in trained]
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *outer: Tensor):
        scale, (grad_hidden, *grads) = outer[0], ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden.mul_(scale.to(grad_hidden.dtype)),
            *(None, None, None, None),
            *(one.mul_(scale).to(dtype) for one, dtype in zip(grads, ctx.dtypes, strict=True)),
        )


# the model's forward, taken apart


def _own_logits(model: Any, hidden: Tensor) -> Tensor:
    """The logits (N, V) that the model's own forward makes of hidden states (N, D)."""
    ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
    with _replaced(model, model.get_decoder(), _Given(hidden[None])):
        return model.forward(input_ids=ids, use_cache=False).logits[0]


@contextmanager
def _replaced(model: Any, module: Any, stand_in: nn.Module) -> Iterator[None]:
    """Another module in the place of one of the model's, until the block ends."""
    holder, name = next((one, name) for one in model.modules() for name, part in one._modules.items() if part is module)
    holder._modules[name] = stand_in
    try:
        yield
    finally:
        holder._modules[name] = module


class _Given(nn.Module):
    """Stands in a decoder's place and hands on hidden states, and None for whatever else it is asked for."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> Any:
        return _Output((self.hidden,))


class _Output(tuple):
    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _tried(model: Any, head: Any) -> str:
    """The model's own forward around given hidden states and a small random head, against that head alone. No weight of
    the model's head is read: it may be divided, or on another device."""
    weight = getattr(head, "weight", None)
    if weight is None or weight.ndim != 2 or head in (model, model.get_decoder()):
        return WHOLE
    noise = torch.Generator().manual_seed(0)
    biased = getattr(head, "bias", None) is not None
    small = nn.Linear(weight.shape[1], TRIED, bias=biased, device="meta").to_empty(device="cpu")
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        for parameter in small.parameters():
            parameter.normal_(generator=noise)
        rows = torch.randn(3, weight.shape[1], generator=noise)
        plain = small(rows)
        try:
            with _replaced(model, head, small):
                own = _own_logits(model, rows)
        except (AttributeError, IndexError, KeyError, RuntimeError, StopIteration, TypeError, ValueError):
            return WHOLE  # the forward asks its decoder for more than hidden states
    if own.shape != plain.shape:
        return WHOLE
    if type(head) is nn.Linear and (own - plain).abs().max() <= SAME * plain.abs().max():
        return PLAIN
    divided = any(hasattr(parameter, "ds_id") for parameter in head.parameters())
    return WHOLE if divided else OWN  # DeepSpeed brings a head together around a call, and expects the same calls again
