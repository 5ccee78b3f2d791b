"""Faster forms of what transformers and PEFT compute, each equal to the original (tests/equal)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import between
from .formed import remember

THIN = 16  # columns; of fewer a product in fp32 took 2 to 7 times as long on a CPU as with its factors turned round
# Logits alive at once, in fp32. On a CPU 32 MB took 4 % more time in whole steps (2 cores); a GPU needs large products.
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 128 << 20}


def chunk_rows(vocab: int, device: str) -> int:
    """Rows of logits that are formed at once on a kind of device: a multiple of 64, so that the last of them are few
    different numbers of rows where rows are filled up."""
    return max(64, CHUNK_BYTES[device] // (4 * vocab) // 64 * 64)


class _LinearCrossEntropy(torch.autograd.Function):
    """sum_i w_i * cross_entropy(h_i W^T + b, t_i), with logits alive for one chunk of rows at a time.

    The gradient with respect to `hidden` (and W when it is trained) is formed in the forward, while the chunk's softmax
    is at hand, so nothing of size rows x vocabulary is stored. Same idea as Cut Cross-Entropy (arXiv 2411.09009), in
    plain torch.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor):
        rows, step = len(hidden), chunk_rows(len(weight), hidden.device.type)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and need_bias else None
        losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
        matrix = weight.to(hidden.dtype)
        for start in range(0, rows, step):
            part = slice(start, min(rows, start + step))
            logits, picked = F.linear(hidden[part], matrix), targets[part, None]
            if bias is not None:
                logits = logits.float().add_(bias)
            if not (need_hidden or need_weight or need_bias):
                losses[part] = between.in_use.losses(logits, picked)
                continue
            kind = hidden.dtype if grad_bias is None else torch.float32
            losses[part], slope = between.in_use.loss_slopes(logits, picked, weights[part], kind)
            if grad_bias is not None:
                grad_bias += slope.sum(0)
                slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(slope, matrix, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += slope.t() @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        scale = grads[0]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden.mul_(scale.to(grad_hidden.dtype)),
            None if grad_weight is None else grad_weight.mul_(scale).to(ctx.weight_dtype),
            None if grad_bias is None else grad_bias.mul_(scale),
            None,
            None,
        )


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted sum of cross-entropies of a linear head, without materialising all logits.

    hidden (N, D), weight (V, D), bias (V) or None, targets (N) int64, weights (N) float32.
    Returns the sum (scalar, differentiable once) and the unweighted losses (N), detached.
    """
    hidden = hidden.to(_compute_dtype(hidden))
    if not torch.is_grad_enabled():  # which autograd's functions are not told
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, bias, targets, weights)


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T for a frozen W: keeps x and x A^T, never a gradient of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float):
        flat = x.reshape(-1, x.shape[-1])
        ctx.kinds, a, b = (a.dtype, b.dtype), a.to(x.dtype), b.to(x.dtype)
        low = flat @ a.t()
        out = F.linear(flat, weight, bias).addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scale = scale
        return _shaped(out, *x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        flat, low, weight, a, b = ctx.saved_tensors
        grad, (kind_a, kind_b) = grads[0].reshape(-1, grads[0].shape[-1]), ctx.kinds
        grad_low = _scaled(grad, b, ctx.scale)
        grad_b = _scaled(grad.t(), low, ctx.scale).to(kind_b) if ctx.needs_input_grad[4] else None
        grad_a = (grad_low.t() @ flat).to(kind_a) if ctx.needs_input_grad[3] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, a).view(*grads[0].shape[:-1], weight.shape[1])
        return grad_x, None, None, grad_a, grad_b, None


def _shaped(out: Tensor, *shape: int) -> Tensor:
    """In this shape, but for autograd no view: some models (Falcon) add to what a layer gives, in place."""
    return torch.ops.aten._unsafe_view(out, shape)


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b in one operation, as the transpose of scale * b^T @ a^T where that is how the product is fast."""
    if b.shape[1] < THIN and b.dtype == torch.float32 and b.device.type == "cpu":
        return torch.addmm(a.new_empty(()), b.t(), a.t(), beta=0, alpha=scale).t()
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Low-rank adapted linear layer (Hu et al., arXiv 2106.09685, eq. 3) over a frozen weight, no dropout.

    x (..., in), weight (out, in), bias (out) or None, a (rank, in), b (out, rank); returns (..., out) in x's dtype.
    `a` and `b` may be fp32 masters under a bf16 x: they are cast for the product and get gradients in their own dtype.
    """
    dtype = _compute_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _LoraLinear.apply(x, weight, bias, a, b, scale)


class _Swiglu(torch.autograd.Function):
    """silu(gate) * up, keeping gate and up only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor):
        ctx.save_for_backward(gate, up)
        return between.in_use.gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        gate, up = ctx.saved_tensors
        return between.in_use.gated_slopes(grads[0], gate, up)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, arXiv 2002.05202), elementwise."""
    form, source, other = between.in_use, gate.detach(), up.detach()
    return remember(_Swiglu.apply(gate, up), lambda: form.gated(source, other), source)


class _RmsNorm(torch.autograd.Function):
    """w * (x / sqrt(mean(x^2) + eps)), the mean in fp32; keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float):
        out, inverse = between.in_use.norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (x, weight, inverse), grad = ctx.saved_tensors, grads[0]
        grad_x = between.in_use.norm_slope(grad, x, weight, inverse) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.float() * (x.float() * inverse)).flatten(0, -2).sum(0).to(weight.dtype)
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich, arXiv 1910.07467) as Llama computes it: x (..., D), weight (D).

    The normalised row is rounded to x's dtype, then scaled.
    """
    form, source, scale = between.in_use, x.detach(), weight.detach()
    return remember(_RmsNorm.apply(x, weight, eps), lambda: form.norm(source, scale, eps)[0], source)


class _Rotate(torch.autograd.Function):
    """x cos + rotate_half(x) sin, keeping cos and sin only; the backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor):
        ctx.save_for_backward(cos, sin)
        return between.in_use.turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        return between.in_use.turned_back(grads[0], *ctx.saved_tensors), None, None


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al., arXiv 2104.09864) in transformers' half-split form.

    q (B, H, T, D), k (B, K, T, D), cos and sin (B, T, D) with `unsqueeze_dim` 1; returns q and k turned.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)


class _SparseLinear(torch.autograd.Function):
    """y = x W^T + b, with a gradient for the entries of W at `rows`, `columns` only, as a vector."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, starts: Tensor, flat: Tensor):
        ctx.save_for_backward(x.reshape(-1, x.shape[-1]), weight, starts, flat)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        x, weight, starts, flat = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_x = (grad @ weight).view(*grads[0].shape[:-1], weight.shape[1]) if ctx.needs_input_grad[0] else None
        if grad.dtype == torch.float32 and grad.device.type == "cpu":  # only the entries: 2 to 20 times faster here
            columns = flat % weight.shape[1]
            zero = torch.zeros(len(flat), dtype=grad.dtype)
            pattern = torch.sparse_csr_tensor(starts, columns, zero, weight.shape, check_invariants=False)
            grad_values = torch.sparse.sampled_addmm(pattern, grad.t().contiguous(), x, beta=0.0).values()
        else:
            grad_values = (grad.t() @ x).view(-1)[flat].float()
        return grad_x, None, None, grad_values, None, None


def sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, starts: Tensor, flat: Tensor
) -> Tensor:
    """Linear layer whose weight holds trained entries; the gradient goes to `values` (n, fp32), none to the weight.

    x (..., in), weight (out, in) with `values` in it already, bias (out) or None; `flat` (n) the entries' places in the
    flattened weight, ascending, `starts` (out + 1) where each row's begin among them. Returns (..., out) in x's dtype.
    Backward holds at most one product of size (out, in), and in fp32 on CPU none.
    """
    dtype = _compute_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _SparseLinear.apply(x, weight, bias, values, starts, flat)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What autocast would compute a product of `x` in; x's own dtype without autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _AdaptedLinear(torch.autograd.Function):
    """y = m / n * (x W^T + s (x A^T) B^T) + b for a frozen W that `weigh` gives when it is needed, n a constant.

    Keeps x and x A^T; with a magnitude m also the scaled output, which without a bias is y itself and costs nothing
    where the next operation keeps it too. The gradient of m needs no second product, as sum(g * y) / m is
    sum(g * (x V^T)) / n for the direction V.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weigh: Callable[[torch.dtype], Tensor],
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        magnitude: Tensor | None,
        norm: Tensor | None,
    ):
        flat = x.reshape(-1, x.shape[-1])
        ctx.kinds, a, b = (a.dtype, b.dtype), a.to(x.dtype), b.to(x.dtype)
        low = flat @ a.t()
        out = F.linear(flat, weigh(x.dtype)).addmm_(low, b.t(), alpha=scale)
        shape = (*x.shape[:-1], out.shape[-1])
        scaled = None
        if magnitude is not None and norm is not None:
            scaled = out.mul_(magnitude / norm)
        if bias is not None:
            out = out + bias if scaled is not None else out.add_(bias)
        out = _shaped(out, *shape)
        ctx.save_for_backward(flat, low, a, b, magnitude, norm, out if bias is None and scaled is not None else scaled)
        ctx.weigh, ctx.scale = weigh, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        flat, low, a, b, magnitude, norm, scaled = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_m = None
        if magnitude is not None:
            if ctx.needs_input_grad[6]:
                per_row = torch.sum(grad * scaled.reshape(grad.shape), 0, dtype=torch.float32)
                grad_m = torch.where(magnitude == 0, 0, per_row / magnitude).to(magnitude.dtype)
            grad = (grad * (magnitude / norm)).to(grad.dtype)
        kind_a, kind_b = ctx.kinds
        grad_low = _scaled(grad, b, ctx.scale)
        grad_b = _scaled(grad.t(), low, ctx.scale).to(kind_b) if ctx.needs_input_grad[4] else None
        grad_a = (grad_low.t() @ flat).to(kind_a) if ctx.needs_input_grad[3] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ ctx.weigh(grad.dtype)).addmm_(grad_low, a).view(*grads[0].shape[:-1], flat.shape[-1])
        return grad_x, None, None, grad_a, grad_b, None, grad_m, None


def adapted_linear(
    x: Tensor,
    weigh: Callable[[torch.dtype], Tensor],
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    magnitude: Tensor | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """`lora_linear` over a weight that is made when it is needed (de-quantised, say), with DoRA's magnitudes if given
    (Liu et al., arXiv 2402.09353, eq. 5, with the norm held constant as its section 4.3 proposes).

    x (..., in), weigh(dtype) -> (out, in), called in the forward and again in the backward and kept by neither;
    bias (out) or None, a (rank, in), b (out, rank), magnitude and norm (out) fp32; returns (..., out) in x's dtype.
    """
    dtype = _compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _AdaptedLinear.apply(x.to(dtype), weigh, bias, a, b, scale, magnitude, norm)


TINY = 1e-30
NORM_ROWS = 1024  # rows of a weight held in fp32 at once while its cross terms are formed


@torch.no_grad()
def adapted_norms(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The 2-norm of every row of W + s B A, without forming it: |w|^2 + 2 s <w, (BA)> + s^2 |BA|^2.

    weight (out, in) in any dtype, squares (out) the rows' |w|^2 in fp32, a (rank, in), b (out, rank); returns (out)
    fp32, never zero: a row of zeros is divided by too.
    """
    with torch.autocast(weight.device.type, enabled=False):
        a, b = a.float(), b.float()
        cross = torch.cat([rows.float() @ a.t() for rows in weight.split(NORM_ROWS)])
        mixed = (b * (2 * scale * cross + scale**2 * (b @ (a @ a.t())))).sum(1)
        return (squares + mixed).clamp_(min=TINY).sqrt_()


@torch.no_grad()
def row_squares(weight: Tensor) -> Tensor:
    """The squared 2-norm of every row of a weight, (out) fp32."""
    return torch.cat([rows.float().square().sum(1) for rows in weight.split(NORM_ROWS)])
