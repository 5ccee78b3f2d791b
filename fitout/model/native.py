"""What this package computes on a CPU in code of its own (cpp/): compiled where it runs, once, and kept.

PyTorch's kernels serve every processor and every shape. Attention of many short documents loses most of its time there
in blocks that are too small, and what lies between products in passes over memory. So both are written out here, for
Linux on x86-64 with AVX2 or AVX-512, compiled for the processor at hand by the GCC that is installed, in home()/native.
Before it is used it must agree with PyTorch on small examples. Where there is no compiler, or anything else is missing,
`why_not` says so, and PyTorch's own kernels are used.
"""

from __future__ import annotations

import ctypes
import math
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FitoutError
from ..layout import Segment, ends, reaches, seen
from .dense import dense
from .library import Missing, load
from .precision import instructions

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-strict-aliasing", "-fopenmp", "-fPIC", "-w")
SAME = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest number, in the small example


class _Segment(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("start", "end", "last", "depth")]


POINTERS = ("q", "k", "v", "grad", "out", "dq", "dk", "dv", "norm", "sinks", "segments")
SIZES = ("count", "tokens", "heads", "few", "width", "value")
STRIDES = ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head", "grad_token", "grad_head")


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in (*SIZES, *STRIDES, "window")),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("threads", ctypes.c_int32),
    ]


def serves(query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment]) -> bool:
    """Whether `attend` computes attention of such tensors, here."""
    (batch, heads, tokens, width), kinds = query.shape, {x.dtype for x in (query, key, value)}
    return (
        _plain(query, key, value)
        and batch == 1
        and (kinds == {torch.float32} or kinds == {torch.bfloat16})
        and key.shape == (1, key.shape[1], tokens, width)
        and value.shape[:3] == key.shape[:3]
        and heads % key.shape[1] == 0
        and segments[-1].end == tokens
        and why_not() is None
    )


def _plain(*tensors: Tensor) -> bool:
    """Whether all have their numbers in this machine's memory, as no tensor of another kind does."""
    return all(x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter) for x in tensors)


@dataclass(frozen=True)
class Rules:
    """What is asked of attention: scores are multiplied by `scale`; with `window` w a token sees no more than w tokens,
    itself included; with `cap` c scores become c tanh(score / c)."""

    scale: float
    window: int | None = None
    cap: float | None = None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    rules: Rules,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of documents and trees of them: a token sees its own document up to itself. `sinks` (H,) are
    scores that take part in the softmax and lead nowhere.

    query (1, H, T, D), key (1, K, T, D), value (1, K, T, V), H a multiple of K. Returns (1, T, H, V) in the query's
    dtype, and the logarithm of each softmax's denominator (H, T) in fp32. Scores and sums are fp32; weights are rounded
    to the dtype before they meet the values.
    """
    own, kind = query.dtype, _kind(query, value)
    query, key, value = (_in_rows(x, kind) for x in (query, key, value))
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    norm = query.new_empty(query.shape[1], query.shape[2], dtype=torch.float32)
    _run(query, key, value, segments, rules, sinks, back=False, out=out, norm=norm)
    return out.to(own), norm


def slopes(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    norm: Tensor,
    segments: Sequence[Segment],
    rules: Rules,
) -> list[Tensor]:
    """Gradients of query, key and value, from that of the output (1, T, H, V); `out` and `norm` as `attend` gave them.
    Gradients of scores are rounded to the dtype once their row's mean is taken off."""
    own, kind = query.dtype, _kind(query, value)
    grad, query, key, value, out = (_in_rows(x, kind) for x in (grad, query, key, value, out))
    found = [x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]) for x in (query, key, value)]
    more = dict(zip(("dq", "dk", "dv"), found, strict=True))
    _run(query, key, value, segments, rules, back=True, out=out, norm=norm, grad=grad.transpose(1, 2), **more)
    return [x.to(own).transpose(1, 2) for x in found]


def sink_slopes(grad: Tensor, out: Tensor, norm: Tensor, sinks: Tensor) -> Tensor:
    """The gradient of `sinks` (H,), of which none leads to the output: each takes weight from what does."""
    mean = (grad.float() * out.float()).sum(-1)[0].t()
    return -(torch.exp(sinks.float()[:, None] - norm) * mean).sum(1).to(sinks.dtype)


def _kind(query: Tensor, value: Tensor) -> torch.dtype:
    """What is computed in: fp32 for bf16 that the processor cannot multiply, or that is not in pairs."""
    even = query.shape[3] % 2 == value.shape[3] % 2 == 0
    return query.dtype if even and hasattr(_library(), _name(query.dtype)) else torch.float32


def _in_rows(x: Tensor, kind: torch.dtype) -> Tensor:
    """As `kind`, the last dimension in one piece and, in bf16, every row at an even number."""
    x = x.to(kind)
    odd = kind == torch.bfloat16 and any(step % 2 for step in x.stride()[1:3])
    return x.contiguous() if odd or x.stride(-1) != 1 else x


def _name(kind: torch.dtype, what: str = "attend") -> str:
    return f"{what}_{str(kind).removeprefix('torch.')}"


_told: tuple[Any, Any] = (None, None)  # the last segments, and what the library was told of them


def _segments(segments: Sequence[Segment]) -> Any:
    """The same for every layer of a micro-batch."""
    global _told
    known, told = _told
    if known is not segments:
        each = zip(segments, ends(segments), reaches(segments), strict=True)
        rows = [_Segment(s.start, s.end, last, reach - s.length) for s, last, reach in each]
        told = (_Segment * len(rows))(*rows)
        _told = (segments, told)
    return told


def _run(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], rules: Rules, sinks: Tensor | None = None,
    *, back: bool, **more: Tensor,
) -> None:  # fmt: skip
    told = _segments(segments)
    call = _Call(segments=ctypes.addressof(told), count=len(told))
    call.scale, call.window, call.cap = rules.scale, rules.window or 0, rules.cap or 0
    if sinks is not None:
        more["sinks"] = sinks.detach().float().contiguous()
    call.tokens, call.heads, call.few = query.shape[2], query.shape[1], key.shape[1]
    call.width, call.value, call.threads = query.shape[3], value.shape[3], torch.get_num_threads()
    for name, x in {"q": query, "k": key, "v": value, **more}.items():
        setattr(call, name, x.data_ptr())
        if f"{name}_token" in STRIDES:
            setattr(call, f"{name}_token", x.stride(2))
            setattr(call, f"{name}_head", x.stride(1))
    getattr(_library(), _name(query.dtype))(ctypes.byref(call), int(back))


# what lies between products

ELSEWHERE = 1 << 15  # numbers that are worth a thread


def takes(*tensors: Tensor) -> bool:
    """Whether the functions below compute with such tensors, here: of one type, each in one piece."""
    first = tensors[0]
    return (
        _plain(*tensors)
        and first.dtype in SAME
        and all(x.dtype == first.dtype and x.is_contiguous() for x in tensors)
        and why_not() is None
    )


def loss(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Cross-entropies (N) in fp32 of logits (N, V) at targets (N) int64. With `weights` (N) fp32 the logits become the
    gradient of the weighted sum. Raises IndexError for a target that is none of the V."""
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    targets = targets.to(torch.int64).contiguous()
    weights = None if weights is None else weights.to(torch.float32).contiguous()
    if outside := _call_on("loss", logits, targets, weights, losses, *logits.shape):
        raise IndexError(f"{outside} targets are out of bounds: logits have {logits.shape[1]} entries")
    return losses


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up"""
    out = torch.empty_like(gate)
    _call_on("gated", gate, up, out, gate.numel())
    return out


def gated_slopes(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    found = torch.empty_like(gate), torch.empty_like(up)
    _call_on("gated_slopes", grad, gate, up, *found, gate.numel())
    return found


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight * (x / rms), rounded before it is scaled; and 1 / rms (..., 1) in fp32."""
    out, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    _call_on("norm", x, weight, out, inverse, eps, inverse.numel(), x.shape[-1])
    return out, inverse


def norm_slope(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _call_on("norm_slope", grad, x, weight, inverse, out, inverse.numel(), x.shape[-1])
    return out


def turned(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """x cos + rotate_half(x) sin, or with `back` the gradient of x from that of this: x (1, H, T, D), each row of D in
    one piece, cos and sin of T x D numbers. The result lies in memory as x does."""
    out = torch.empty_like(x)
    strides = [(one.stride(1), one.stride(2)) for one in (x, out)]
    _call_on("turn", x, *strides[0], cos, sin, out, *strides[1], *x.shape[1:], int(back))
    return out


def _call_on(name: str, first: Tensor, *more: Tensor | float | None) -> Any:
    threads = max(1, min(torch.get_num_threads(), first.numel() // ELSEWHERE))
    given = [x.data_ptr() if isinstance(x, Tensor) else x for x in (first, *more)]
    return getattr(_library(), _name(first.dtype, name))(*given, threads)


# the library

_P, _N = ctypes.c_void_p, ctypes.c_int64
TAKES = {
    "loss": (_P, _P, _P, _P, _N, _N),
    "gated": (_P, _P, _P, _N),
    "gated_slopes": (_P, _P, _P, _P, _P, _N),
    "norm": (_P, _P, _P, _P, ctypes.c_float, _N, _N),
    "norm_slope": (_P, _P, _P, _P, _P, _N, _N),
    "turn": (_P, _N, _N, _P, _P, _P, _N, _N, _N, _N, _N, ctypes.c_int32),
}


@cache
def why_not() -> str | None:
    """Why nothing here is used on this machine, or None."""
    try:
        _library()
        with torch.inference_mode(False), torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
            return _differs()
    except (Missing, FitoutError, OSError, RuntimeError) as error:
        return str(error)


@cache
def _library() -> ctypes.CDLL:
    """Raises Missing."""
    if platform.system() != "Linux" or not {"avx2", "fma"} <= instructions():
        raise Missing("it is written for Linux on processors with AVX2")
    runtime = _openmp()
    if runtime is None:
        raise Missing("this PyTorch computes without OpenMP")
    library = load(["attention.cpp", "between.cpp"], FLAGS, [runtime], sorted(instructions()))
    for name, types in TAKES.items():
        for kind in SAME:
            getattr(library, _name(kind, name)).argtypes = (*types, ctypes.c_int32)
    return library


def _openmp() -> str | None:
    """The OpenMP library that PyTorch brought into this process: threads of a second one would be in the way."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    names = [fields[5] for fields in lines if len(fields) == 6]
    found = [name for name in names if re.match(r"lib[gi]omp.*\.so", Path(name).name)]
    own = Path(torch.__file__).parent.parent  # site-packages, where torch.libs may stand beside torch
    return next(iter(sorted(found, key=lambda name: not name.startswith(f"{own}/torch"))), None)


def _differs() -> str | None:
    """What of it does not compute what it should, on small examples in double precision."""
    for kind, bound in SAME.items():
        gaps = {**_gaps_between(kind), "attention": _gap_of_attention(kind)}
        what = max(gaps, key=lambda one: gaps[one] if math.isfinite(gaps[one]) else math.inf)
        if not gaps[what] <= bound:
            return f"its {what} in {kind} is {gaps[what]:.1e} from what it should be"
    return None


def _gap(found: Tensor, right: Tensor) -> float:
    found, right = found.detach().double(), right.detach().double()
    return float((found - right).abs().max() / right.abs().max())


def _gaps_between(kind: torch.dtype) -> dict[str, float]:
    """Of each function's results, with rows that end beside a vector's end."""
    noise = torch.Generator().manual_seed(1)
    x, y, z = (torch.randn(5, 44, generator=noise).to(kind) for _ in range(3))
    a, b, c = (one.double() for one in (x, y, z))
    share, up = torch.sigmoid(a), z[0]
    inverse = torch.rsqrt(a.square().mean(-1, keepdim=True) + 1e-3)
    normed, rms = norm(x, up, 1e-3)
    along = (b * up.double() * a).mean(-1, keepdim=True) * inverse**3
    by_gate, by_up = gated_slopes(y, x, z)
    halves, angles = x.view(1, 1, 5, 44), (y.view(1, 1, 5, 44), z.view(1, 1, 5, 44))
    turned_half = torch.cat([-a[:, 22:], a[:, :22]], -1)
    back = a * b + torch.cat([a[:, 22:] * c[:, 22:], -a[:, :22] * c[:, :22]], -1)
    targets, weights, slopes_of = torch.arange(5), torch.linspace(0, 1, 5), x.clone()
    losses = loss(slopes_of, targets, weights)
    right = torch.logsumexp(a, -1)
    one_hot = torch.nn.functional.one_hot(targets, 44)
    return {
        "activation": max(
            _gap(gated(x, z), a * share * c), _gap(by_gate, b * c * share * (1 + a * (1 - share))),
            _gap(by_up, b * a * share),
        ),
        "norm": max(
            _gap(normed, a * inverse * up.double()), _gap(rms, inverse),
            _gap(norm_slope(y, x, up, rms), b * up.double() * inverse - a * along),
        ),
        "rotation": max(
            _gap(turned(halves, *angles, back=False)[0, 0], a * b + turned_half * c),
            _gap(turned(halves, *angles, back=True)[0, 0], back),
        ),
        "loss": max(
            _gap(losses, right - a.gather(1, targets[:, None])[:, 0]),
            _gap(slopes_of, (torch.softmax(a, -1) - one_hot) * weights[:, None]),
        ),
    }  # fmt: skip


def _gap_of_attention(kind: torch.dtype) -> float:
    """Of a small tree, forward and backward, plain and with all that may be asked of it."""
    if not hasattr(_library(), _name(kind)):
        return 0.0
    segments = (Segment(0, 70), Segment(70, 75, 0), Segment(75, 107, 0), Segment(107, 110))
    noise = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(1, 4, 110, 32, generator=noise).to(kind) for _ in range(2))
    k, v = (torch.randn(1, 2, 110, 32, generator=noise).to(kind) for _ in range(2))
    sinks = torch.randn(4, generator=noise)
    return max(
        _gap_by(Rules(0.2), None, q, k, v, grad, segments),
        _gap_by(Rules(0.2, window=40, cap=2.0), sinks, q, k, v, grad, segments),
    )


def _gap_by(
    rules: Rules, sinks: Tensor | None, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, segments: Sequence[Segment]
) -> float:
    out, norm = attend(q, k, v, segments, rules, sinks)
    along = grad.transpose(1, 2)
    found = [out, *slopes(along, q, k, v, out, norm, segments, rules)]
    with torch.enable_grad():
        leaves = [x.double().requires_grad_() for x in (q, k, v, *(() if sinks is None else (sinks,)))]
        if sinks is not None:
            found.append(sink_slopes(along, out, norm, sinks))
        looks = torch.from_numpy(seen(segments, rules.window))
        q64, k64, v64, *sinks64 = leaves
        right = dense(q64, k64, v64, looks, rules.scale, cap=rules.cap, sinks=sinks64[0] if sinks64 else None)
        right = right.transpose(1, 2)
        return max(
            _gap(a, b) for a, b in zip(found, (right, *torch.autograd.grad(right, leaves, along.double())), strict=True)
        )
