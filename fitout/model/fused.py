"""Faster forms of what transformers and PEFT compute, each equal to the original (tests/equal)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 32 << 20  # of logits alive at once; larger chunks were not faster on 2 cores


class _LinearCrossEntropy(torch.autograd.Function):
    """sum_i w_i * cross_entropy(h_i W^T + b, t_i), with logits alive for one chunk of rows at a time.

    The gradient with respect to `hidden` (and W when it is trained) is formed in the forward, while the chunk's softmax
    is at hand, so nothing of size rows x vocabulary is stored. Same idea as Cut Cross-Entropy (arXiv 2411.09009), in
    plain torch.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor):
        rows, vocab = hidden.shape[0], weight.shape[0]
        step = max(64, CHUNK_BYTES // (4 * vocab))
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and need_bias else None
        losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
        matrix = weight.to(hidden.dtype)
        for start in range(0, rows, step):
            part = slice(start, min(rows, start + step))
            logits = F.linear(hidden[part], matrix).float()
            if bias is not None:
                logits += bias
            picked = targets[part, None]
            log_norm = torch.logsumexp(logits, -1, keepdim=True)
            losses[part] = (log_norm - logits.gather(1, picked)).squeeze(1)
            if not (need_hidden or need_weight or need_bias):
                continue
            slope = logits.sub_(log_norm).exp_()
            slope.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=slope.dtype))
            slope *= weights[part, None]
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
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, bias, targets, weights)


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T for a frozen W: keeps x and x A^T, never a gradient of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float):
        flat = x.reshape(-1, x.shape[-1])
        a_c, b_c = a.to(x.dtype), b.to(x.dtype)
        low = flat @ a_c.t()
        out = F.linear(flat, weight, bias).addmm_(low, b_c.t(), alpha=scale)
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scale = scale
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        flat, low, weight, a, b = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        a_c, b_c = a.to(grad.dtype), b.to(grad.dtype)
        grad_low = (grad @ b_c).mul_(ctx.scale)
        grad_b = (grad.t() @ low).mul_(ctx.scale).to(b.dtype) if ctx.needs_input_grad[4] else None
        grad_a = (grad_low.t() @ flat).to(a.dtype) if ctx.needs_input_grad[3] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, a_c).view(*grads[0].shape[:-1], weight.shape[1])
        return grad_x, None, None, grad_a, grad_b, None


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
