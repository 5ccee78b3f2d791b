"""Puts the fused forms into a model, each only where it was seen to equal what it replaces.

A norm, a rotary embedding or a gated feed-forward is recognised by its parts, tried against the model's own on random
numbers (values and gradients), and replaced only when they agree to rounding. So a family that computes something else
under a similar name (Gemma's 1 + w, another rotation) keeps its own code.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import Segment
from . import between
from .between import Between
from .formed import Sparing
from .fused import rms_norm, rotary, swiglu
from .head import WHOLE, head_cross_entropy, kind_of_head
from .methods.adapter import Bottleneck

ROUNDING = 1e-5  # largest difference over largest value, fp32
TRIED = (96, 161)  # tokens
SAME = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}  # of the largest value


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Replaces what can be replaced, in place, until the block ends. Modules, parameters and their names stay as they
    are. The rotation is a function of a modelling file: inside the block every model of that file has it."""
    undo: list[Callable[[], None]] = []
    try:
        _replace(model, undo)
        yield
    finally:
        for step in undo:
            step()


def _replace(model: nn.Module, undo: list[Callable[[], None]]) -> None:
    tried: dict[Any, bool] = {}

    def equal(what: Any, trial: Callable[[Any], bool], subject: Any) -> bool:
        if what not in tried:
            tried[what] = trial(subject)
        return tried[what]

    for module in list(model.modules()):
        kind, home = type(module), sys.modules[type(module).__module__]
        if _is_norm(module) and equal(kind, _same_norm, module):
            _set(module, "forward", _Norm(module), undo)
        elif _is_gated(module) and equal(kind, _same_gated, module):
            _set(module, "forward", _Gated(module), undo)
        elif isinstance(getattr(module, "base", module), nn.Linear | Bottleneck):  # an adapted one, too
            _set(module, "forward", Sparing(module.forward), undo)
        original = getattr(home, ROTARY, None)
        if original and not isinstance(original, _Rotary) and equal(home, _same_rotary, original):
            _set(home, ROTARY, _Rotary(original), undo)


def _set(where: Any, name: str, value: Any, undo: list[Callable[[], None]]) -> None:
    before = vars(where).get(name)
    setattr(where, name, value)
    undo.append(lambda: delattr(where, name) if before is None else setattr(where, name, before))


# norms


def _is_norm(module: Any) -> bool:
    return (
        type(module).__name__.endswith("RMSNorm")
        and [name for name, _ in module.named_parameters()] == ["weight"]
        and isinstance(_eps(module), float)
    )


def _eps(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


class _Norm:
    def __init__(self, module: Any):
        self.module, self.eps = module, _eps(module)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.module.weight, self.eps)


def _same_norm(module: Any) -> bool:
    own = copy.deepcopy(module).to_empty(device="cpu").float()  # not .cpu(): it may have a shape and no values
    width = own.weight.shape[0]
    with torch.no_grad():
        own.weight.copy_(_random(width))
    return _agree(own, _Norm(own), _random(2, 3, width))


# gated feed-forwards


def _is_gated(module: Any) -> bool:
    names = {name for name, _ in module.named_children()} - {"adapter"}  # which a hook adds to what this gives
    return names == {"gate_proj", "up_proj", "down_proj", "act_fn"}


class _Gated:
    def __init__(self, module: Any):
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return self.module.down_proj(swiglu(self.module.gate_proj(x), self.module.up_proj(x)))


def _same_gated(module: Any) -> bool:
    own = copy.copy(module)
    own._forward_hooks, own._modules = OrderedDict(), {"act_fn": module.act_fn}
    for name, (rows, columns) in {"gate_proj": (6, 4), "up_proj": (6, 4), "down_proj": (4, 6)}.items():
        layer = nn.Linear(columns, rows, bias=False)
        with torch.no_grad():
            layer.weight.copy_(_random(rows, columns))
        own._modules[name] = layer
    return _agree(own, _Gated(own), _random(2, 3, 4))


# rotary embeddings

ROTARY = "apply_rotary_pos_emb"  # a function of the modelling file, found there by name when attention calls it


class _Rotary:
    """The fused rotation where it was tried; what it was not tried on goes to the original."""

    def __init__(self, original: Callable[..., tuple[Tensor, Tensor]]):
        self.original = original

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **more: Any) -> Any:
        whole = cos.ndim == 3 and cos.shape[-1] == q.shape[-1] and cos.dtype == q.dtype == k.dtype
        if rest or more or not whole:
            return self.original(q, k, cos, sin, *rest, **more)
        return rotary(q, k, cos, sin)


def _same_rotary(original: Any) -> bool:
    q, k, angle = _random(1, 4, 5, 8), _random(1, 2, 5, 8), _random(1, 5, 4).repeat(1, 1, 2)

    def both(turn: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat([part.flatten() for part in turn(x, x[:, :2] * k, angle.cos(), angle.sin())])

    try:
        return _agree(both(original), both(rotary), q)
    except (TypeError, RuntimeError, IndexError):
        return False  # another signature


# trials


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def _agree(own: Callable[[Tensor], Tensor], ours: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether both give the same values and the same gradient of x, to rounding."""
    results = []
    for function in (own, ours):
        at = x.clone().requires_grad_()
        y = function(at)
        y.backward(_random(*y.shape))
        results.append((y.detach(), at.grad))
    return all(bool((a - b).abs().max() <= ROUNDING * a.abs().max()) for a, b in zip(*results, strict=True))


# another form of what lies between products


def why_not(model: Any, form: Between) -> str | None:
    """Why `form` is not to be used in the place of what is in use, or None: it does not run here, or one of its
    functions gives another result where the model itself calls it. Also has everything compiled."""
    seen: list[tuple[str, float, float]] = []  # function, largest difference, and how large it may be
    try:
        with between.using(_side_by_side(between.in_use, form, seen)):
            for tokens in TRIED:
                _forward_and_back(model, tokens)
    except Exception as error:  # whatever a compiler may say
        return f"{type(error).__name__}: {error}".splitlines()[0]
    for name, gap, bound in seen:
        if not gap <= bound:  # also where it is not a number
            return f"the results of {name} differ by {gap:.2g} of the largest value"
    return None


def _side_by_side(own: Between, other: Between, seen: list[tuple[str, float, float]]) -> Between:
    """`own`, with `other` called on the same tensors; the largest difference of each result goes into `seen`, beside
    what rounding in the least precise of the tensors allows."""

    def both(name: str) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            bound = max(SAME[x.dtype] for x in given if isinstance(x, Tensor) and x.is_floating_point())
            theirs = getattr(other, name)(*(x.clone() if isinstance(x, Tensor) else x for x in given))
            result = getattr(own, name)(*given)
            for a, b in zip(_tensors(theirs), _tensors(result), strict=True):
                gap = (a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-30)
                seen.append((name, float(gap), bound))
            return result

        return call

    return Between(**{field.name: both(field.name) for field in fields(Between)})


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _forward_and_back(model: Any, tokens: int) -> None:
    """One document of random embeddings through the model, and the gradient of its loss back to them."""
    device, noise = next(model.parameters()).device, torch.Generator().manual_seed(tokens)
    embedding = model.get_input_embeddings().weight
    given = torch.randn(1, tokens, embedding.shape[1], generator=noise).to(device, embedding.dtype).requires_grad_()
    targets = torch.randint(len(embedding), (tokens,), generator=noise).to(device)
    weights = torch.rand(tokens, generator=noise).to(device)
    training = model.training
    model.eval()  # nothing is left to chance
    try:
        with torch.enable_grad():
            hidden = model.get_decoder()(
                inputs_embeds=given, position_ids=torch.arange(tokens, device=device)[None],
                segments=(Segment(0, tokens),), use_cache=False,
            ).last_hidden_state.squeeze(0)  # fmt: skip
            if kind_of_head(model) == WHOLE:
                loss = (hidden.float() * weights[:, None]).sum()
            else:
                loss, _ = head_cross_entropy(model, hidden, targets, weights)
                head_cross_entropy(model, hidden[:1], targets[:1], weights[:1])  # as the last of many may be
                with torch.no_grad():  # as in an evaluation
                    head_cross_entropy(model, hidden, targets, weights)
                    head_cross_entropy(model, hidden[:1], targets[:1], weights[:1])
            with torch.autocast(device.type, enabled=False):  # a training's backward has none around it
                torch.autograd.grad(loss, given)
    finally:
        model.train(training)
