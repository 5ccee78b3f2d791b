"""What lies between the matrix products of a model: norms, rotations, gated activations and the loss, as functions of
tensors without autograd. fused.py calls those that are `in_use`.

`WRITTEN` takes few passes over the data and few of them into new memory. `NATIVE` takes one, in code of our own for a
CPU (native.py). `compiled()` has `torch.compile` fuse each of them: on a GPU every operation is a launch, and a pass
through its memory. Products, attention and what autograd keeps stay as they are, so a trial on the model itself says
whether both forms agree (`fuse.why_not`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native


@dataclass(frozen=True)
class Between:
    """Functions of tensors; forward and backward of each."""

    gated: Callable[[Tensor, Tensor], Tensor]
    """silu(gate) * up"""
    gated_slopes: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(grad, gate, up): gradients of gate and up"""
    norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """(x (..., D), weight (D), eps): weight * (x / rms), rounded before it is scaled; and 1 / rms (..., 1) fp32"""
    norm_slope: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(grad, x, weight, 1 / rms): gradient of x"""
    turned: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(x (..., D), cos, sin): x cos + rotate_half(x) sin"""
    turned_back: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(grad, cos, sin): gradient of x"""
    losses: Callable[[Tensor, Tensor], Tensor]
    """(logits (N, V), targets (N, 1)): cross-entropies (N) fp32; the logits may be overwritten"""
    loss_slopes: Callable[[Tensor, Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]
    """(logits, targets, weights (N), kind): cross-entropies, and the gradient of their weighted sum (N, V) as `kind`,
    which may stand in the logits' place"""


# written out


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


def _gated_slopes(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    rounded = (wide * inverse).to(x.dtype)
    return rounded.mul_(weight) if x.dtype == weight.dtype else rounded * weight, inverse


def _norm_slope(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    wide, slope = x.float(), grad.float() * weight
    along = torch.linalg.vecdot(slope, wide).unsqueeze(-1).mul_(inverse.pow(3)).div_(-x.shape[-1])
    return torch.addcmul(slope.mul_(inverse), wide, along).to(x.dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _turned_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = grad.shape[-1] // 2
    out = grad * cos
    out[..., :half].addcmul_(grad[..., half:], sin[..., half:])
    out[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
    return out


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits.float()
    at_target, largest = wide.gather(1, targets), wide.amax(-1, keepdim=True)
    return (wide.sub_(largest).exp_().sum(-1, keepdim=True).log_() + largest - at_target).squeeze(1)


def _loss_slopes(logits: Tensor, targets: Tensor, weights: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = logits.float()
    at_target, largest = wide.gather(1, targets), wide.amax(-1, keepdim=True)
    slope = wide.sub_(largest).exp_()
    total = slope.sum(-1, keepdim=True)
    losses = (total.log() + largest - at_target).squeeze(1)
    slope *= weights[:, None] / total
    return losses, slope.scatter_add_(1, targets, -weights[:, None]).to(kind)


WRITTEN = Between(_gated, _gated_slopes, _norm, _norm_slope, _turned, _turned_back, _losses, _loss_slopes)


# in code of our own; tensors that it does not take (mixed types, fp16) as written


def _native_gated(gate: Tensor, up: Tensor) -> Tensor:
    return native.gated(gate, up) if native.takes(gate, up) else _gated(gate, up)


def _native_gated_slopes(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return (native.gated_slopes if native.takes(grad, gate, up) else _gated_slopes)(grad, gate, up)


def _native_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return native.norm(x, weight, eps) if native.takes(x, weight) else _norm(x, weight, eps)


def _native_norm_slope(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    if native.takes(grad, x, weight):
        return native.norm_slope(grad, x, weight, inverse)
    return _norm_slope(grad, x, weight, inverse)


def _rows_of_heads(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """One sequence, each row in one piece, cos and sin the same for all heads."""
    alike = len(x) == 1 and x.ndim == 4 and cos.shape == sin.shape == (1, 1, *x.shape[2:])
    return alike and x.stride(-1) == 1 and x.dtype == cos.dtype and native.takes(cos, sin)


def _native_turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return native.turned(x, cos, sin, back=False) if _rows_of_heads(x, cos, sin) else _turned(x, cos, sin)


def _native_turned_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return native.turned(grad, cos, sin, back=True) if _rows_of_heads(grad, cos, sin) else _turned_back(grad, cos, sin)


def _native_losses(logits: Tensor, targets: Tensor) -> Tensor:
    return native.loss(logits, targets, None) if native.takes(logits) else _losses(logits, targets)


def _native_loss_slopes(logits: Tensor, targets: Tensor, weights: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    if kind == logits.dtype and native.takes(logits):
        return native.loss(logits, targets, weights), logits
    return _loss_slopes(logits, targets, weights, kind)


NATIVE = Between(
    _native_gated, _native_gated_slopes, _native_norm, _native_norm_slope, _native_turned,
    _native_turned_back, _native_losses, _native_loss_slopes,
)  # fmt: skip


# plain, to be compiled: nothing in place, everything in fp32 until it is stored


def _plain_gated(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def _plain_gated_slopes(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    g, x = grad.float(), gate.float()
    share = torch.sigmoid(x)
    return (g * up.float() * share * (1 + x * (1 - share))).to(gate.dtype), (g * x * share).to(up.dtype)


def _plain_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse).to(x.dtype) * weight, inverse


def _plain_norm_slope(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    wide, slope = x.float(), grad.float() * weight
    along = (slope * wide).mean(-1, keepdim=True) * inverse**3
    return (slope * inverse - wide * along).to(x.dtype)


def _plain_turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _plain_turned_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = (grad * sin).chunk(2, -1)
    return grad * cos + torch.cat([second, -first], -1)


def _plain_losses(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits.float()
    return torch.logsumexp(wide, -1) - wide.gather(1, targets).squeeze(1)


def _plain_loss_slopes(logits: Tensor, targets: Tensor, weights: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = logits.float()
    largest = wide.amax(-1, keepdim=True)
    total = torch.exp(wide - largest).sum(-1, keepdim=True)
    hit = torch.arange(logits.shape[1], device=logits.device) == targets
    slope = (torch.exp(wide - largest) / total - hit.float()) * weights[:, None]
    return (total.log() + largest - wide.gather(1, targets)).squeeze(1), slope.to(kind)


def compiled() -> Between:
    """Each function compiled when it is first called with tensors of a width and a type: once, for any number of rows,
    and once for a single one."""
    return Between(
        _compiled(_plain_gated, -2),
        _compiled(_plain_gated_slopes, -2),
        _compiled(_plain_norm, 1),
        _compiled(_plain_norm_slope, 1),
        _compiled(_plain_turned, -2),
        _compiled(_plain_turned_back, -2),
        _compiled(_plain_losses, 0),
        _compiled(_plain_loss_slopes, 0),
    )


def _compiled(function: Callable[..., Any], rows: int) -> Callable[..., Any]:
    """`rows` is the dimension of the first tensor that has another size each time. Every variant is a function of its
    own to the compiler, which gives up on one that it has compiled often, without a word; and it is handed plain
    tensors without history, so that it is the same one in a trial, a training and an evaluation."""
    from torch._inductor import config

    variants: dict[tuple[Any, ...], Callable[..., Any]] = {}
    options: Any = {"deterministic": True} if hasattr(config, "deterministic") else None  # nothing is chosen by timing

    def call(*given: Any) -> Any:
        plain = [x.detach() if isinstance(x, Tensor) else x for x in given]
        shape = list(plain[0].shape)
        count = shape.pop(rows)
        key = (*shape, count == 1, *(x.dtype for x in plain if isinstance(x, Tensor)))
        if key not in variants:
            own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
            variants[key] = torch.compile(own, options=options)
            for x in plain:
                if isinstance(x, Tensor) and x.ndim > 1:
                    torch._dynamo.maybe_mark_dynamic(x, rows % x.ndim)
                elif isinstance(x, Tensor) and rows == 0:
                    torch._dynamo.maybe_mark_dynamic(x, 0)
        return variants[key](*plain)

    return call


# which is in use

in_use = WRITTEN


def best(device: torch.device) -> Between:
    """The form for `device` that needs no compiling."""
    return NATIVE if device.type == "cpu" and native.why_not() is None else WRITTEN


@contextmanager
def using(form: Between) -> Iterator[None]:
    """The functions of fused.py call `form` until the block ends."""
    global in_use
    before, in_use = in_use, form
    try:
        yield
    finally:
        in_use = before
