"""Packed, prefix-sharing attention, registered with transformers under the name `fitout`.

Every architecture that calls transformers' attention interface can use it: the forward passes `segments=...` through to
each layer, no mask is made, and each document attends to itself (causally) and to the documents it continues (fully).
On a CPU that is one call of code of its own for all of them (native.py), or, where that cannot be had, one of PyTorch's
kernel a segment and one more for everything that looks back at a shared segment: no work between documents, no mask, no
copy of a shared prefix's keys (measured in ../benchmarks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ModelError
from ..layout import Segment, ends, reaches
from . import native, varlen
from .dense import dense
from .precision import any_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "fitout"
NOT_COMPUTED = ("position_bias", "sinks", "indices", "block_indices")  # what some architectures hand to their attention
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the largest logit
UNLIKE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}  # of the largest logit, by rounding alone


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Sequence[Segment] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: object,
) -> tuple[Tensor, None]:
    """Attention within each segment and to its ancestors.

    query (1, H, T, D), key and value (1, K, T, D) with H a multiple of K; returns (1, T, H, D) as transformers expects.
    `sliding_window` w lets a token see itself and the w - 1 tokens before it in its own document; `softcap` c bounds
    the scores to c tanh(score / c) (Gemma 2, arXiv 2408.00118); `s_aux` (H,) are attention sinks, scores that take part
    in the softmax and lead nowhere (gpt-oss). Raises ModelError for other special attention.
    """
    special = [name for name in NOT_COMPUTED if more.get(name) is not None]
    special += ["keys besides the tokens' own"] * (key.shape[2] != query.shape[2])
    if special or more.get("is_causal") is False:
        raise ModelError(
            f"this model's attention is special ({', '.join(special) or 'not causal'}), which packed attention is not",
            harm="Leaving that out would train another model than the one that is served.",
            hint="Set data.packing: false for this model, which then keeps its own attention.",
        )
    if segments is None:
        segments = (Segment(0, query.shape[2]),)
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # which casts for PyTorch's own attention only; turned queries are fp32
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    plain = softcap is None and s_aux is None and not dropout
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kind == "cpu" and not dropout:
        with torch.autocast("cpu", enabled=False):  # scores stay fp32
            if native.serves(query, key, value, segments):
                rules = native.Rules(scale, sliding_window, softcap)
                return _Native.apply(query, key, value, s_aux, segments, rules), None
            if plain and (sliding_window is None or max(reaches(segments)) <= sliding_window):
                return _Documents.apply(query, key, value, segments, scale), None
    if plain and varlen.serves(query, key, sliding_window):
        return varlen.varlen_attention(query, key, value, segments, scale, sliding_window), None

    def attend(seed: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
        with torch.autocast(kind, enabled=False), torch.random.fork_rng([q.device] if q.is_cuda else [], bool(dropout)):
            if dropout:  # the same in the backward
                generator = torch.cuda.default_generators[q.device.index] if q.is_cuda else torch.default_generator
                generator.manual_seed(seed)
            if softcap is not None or sinks is not None:
                seen = _mask(q.shape[2], k.shape[2], None, q.device) if mask is None else mask
                return dense(q, k, v, seen, scale, cap=softcap, sinks=sinks, dropout=dropout)
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale
            )

    def piece(*given: Any) -> Tensor:
        seed = int(torch.randint(2**62, ())) if dropout else 0
        compute: Callable[..., Tensor] = partial(attend, seed)
        if plain and kind != "cpu":  # a kernel that keeps no scores
            return compute(*given, None)
        return _Again.apply(compute, *given, s_aux)

    low = kind == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
    q, k, v = (x.float() if low else x for x in (query, key, value))  # as _Documents, for its reasons
    return _piece_by_piece(q, k, v, segments, sliding_window, piece).to(query.dtype), None


def _piece_by_piece(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    window: int | None,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """One call a segment, on the keys of its ancestors and itself; the mask is None where it is the causal one."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    lengths = [segment.length for segment in segments]
    queries, keys, values = query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2)
    outputs = []
    for index, segment in enumerate(segments):
        family = _lineage(segments, index)
        k = keys[index] if len(family) == 1 else torch.cat([keys[i] for i in family], 2)
        v = values[index] if len(family) == 1 else torch.cat([values[i] for i in family], 2)
        windowed = window is not None and k.shape[2] > window
        mask = _mask(segment.length, k.shape[2], window, query.device) if len(family) > 1 or windowed else None
        outputs.append(attend(queries[index], k, v, mask))
    return torch.cat(outputs, 2).transpose(1, 2)


class _Again(torch.autograd.Function):
    """One piece of attention by PyTorch's own operations, which keep no scores: the backward computes it again."""

    @staticmethod
    def forward(ctx: Any, attend: Callable[..., Tensor], *given: Tensor | None):
        ctx.save_for_backward(*given)
        ctx.attend = attend
        with any_size():
            return attend(*given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        given = [x if x is None else x.detach() for x in ctx.saved_tensors]
        needed = ctx.needs_input_grad[1:]
        wanted = [x.requires_grad_() for x, one in zip(given, needed, strict=True) if one and x is not None]
        with any_size(), torch.enable_grad():
            found = iter(torch.autograd.grad(ctx.attend(*given), wanted, grads[0]))
        return None, *(next(found) if one else None for one in needed)


class _Native(torch.autograd.Function):
    """Attention of documents and trees of them by native.py."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, segments: Sequence[Segment],
        rules: native.Rules,
    ):  # fmt: skip
        out, norm = native.attend(query, key, value, segments, rules, sinks)
        ctx.save_for_backward(query, key, value, out, norm, sinks)
        ctx.how = segments, rules
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        query, key, value, out, norm, sinks = ctx.saved_tensors
        of_sinks = native.sink_slopes(grads[0], out, norm, sinks) if ctx.needs_input_grad[3] else None
        return *native.slopes(grads[0], query, key, value, out, norm, *ctx.how), of_sinks, None, None


class _Documents(torch.autograd.Function):
    """The same by PyTorch's kernel: each segment causally to itself, and all that continues it fully to it.

    Called on slices of one block, so that nothing is split, joined or zeroed around them. What a token sees in several
    segments is put together by the logarithms of the softmax denominators (Milakov and Gimelshein, arXiv 1805.02867);
    with the joint denominator and output each segment's share of the gradients follows. bf16 is computed in fp32: in
    bf16 the kernel's backward is slower, and oneDNN would compile for each length.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scale: float):
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        norm = torch.empty(query.shape[:-1], dtype=torch.float32)
        wide = [_wide(x, query.shape[1]) for x in (query, key, value)]

        def attend(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor]:
            part = [x[:, :, at] for x, at in zip(wide, (queries, keys, keys), strict=True)]
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*part, 0.0, causal, scale=scale)

        with any_size():
            for s in segments:
                own = slice(s.start, s.end)
                out[:, :, own], norm[:, :, own] = attend(own, own, True)
            for s, later in _looked_back_at(segments):
                part, part_norm = attend(later, slice(s.start, s.end), False)
                share = torch.sigmoid(part_norm - norm[:, :, later]).unsqueeze(-1)
                out[:, :, later] = torch.lerp(out[:, :, later].to(part.dtype), part, share.to(part.dtype))
                norm[:, :, later] = torch.logaddexp(norm[:, :, later], part_norm)
        ctx.save_for_backward(query, key, value, out, norm)
        ctx.segments, ctx.scale = segments, scale
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        query, key, value, out, norm = ctx.saved_tensors
        heads = query.shape[1]
        wide = [_wide(x, heads) for x in (grads[0].transpose(1, 2), query, key, value, out)]

        def slopes(queries: slice, keys: slice, causal: bool) -> list[Tensor]:
            places = (queries, queries, keys, keys, queries)
            part = [x[:, :, at] for x, at in zip(wide, places, strict=True)]
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *part, norm[:, :, queries], 0.0, causal, scale=ctx.scale
            )
            return [
                slope if slope.shape[1] == own.shape[1] else slope.unflatten(1, (own.shape[1], -1)).sum(2)
                for own, slope in zip((query, key, value), found, strict=True)
            ]

        results = [torch.empty_like(x) for x in (query, key, value)]
        with any_size():
            for s in ctx.segments:
                own = slice(s.start, s.end)
                for whole, slope in zip(results, slopes(own, own, True), strict=True):
                    whole[:, :, own] = slope
            for s, later in _looked_back_at(ctx.segments):
                seen = slice(s.start, s.end)
                for whole, at, slope in zip(results, (later, seen, seen), slopes(later, seen, False), strict=True):
                    whole[:, :, at] += slope
        return *results, None, None


def _wide(states: Tensor, heads: int) -> Tensor:
    """(1, K, T, D) as PyTorch's kernel takes it: bf16 in fp32, keys and values as often as queries look at them."""
    batch, own, length, width = states.shape
    states = states.float() if states.dtype == torch.bfloat16 else states
    if own == heads:
        return states
    return states[:, :, None].expand(batch, own, heads // own, length, width).reshape(batch, heads, length, width)


def _looked_back_at(segments: Sequence[Segment]) -> list[tuple[Segment, slice]]:
    """Each segment that others continue, and the tokens of all that do, which stand right behind it."""
    return [(s, slice(s.end, last)) for s, last in zip(segments, ends(segments), strict=True) if last > s.end]


def _lineage(segments: Sequence[Segment], index: int) -> list[int]:
    """The segment's ancestors from the root down, then itself."""
    line = [index]
    while segments[line[-1]].parent >= 0:
        line.append(segments[line[-1]].parent)
    return line[::-1]


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) True where the query, standing at the end of the keys, may look."""
    at = torch.arange(keys - queries, keys, device=device)[:, None]
    seen = torch.arange(keys, device=device)[None, :]
    allowed = seen <= at
    return allowed if window is None else allowed & (seen > at - window)


@torch.no_grad()
def documents_apart(model: PreTrainedModel) -> float | None:
    """Packs three documents, changes the second, and returns how far the others' logits moved (0.0 when isolated).

    None when the changed document's own logits did not move, so that nothing is shown. Attention is not all that can
    carry information across a document's end (convolutions and recurrent states do too), so this asks the model itself.
    """
    lengths, device = (9, 13, 7), next(model.parameters()).device
    vocab = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (1, sum(lengths)), generator=generator)
    starts = (0, lengths[0], lengths[0] + lengths[1])
    segments = tuple(Segment(a, a + n) for a, n in zip(starts, lengths, strict=True))
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    second = slice(starts[1], starts[2])
    changed = ids.clone()
    changed[:, second] = (changed[:, second] + 1) % vocab
    training = model.training
    model.eval()
    before, after = (
        model(input_ids=x.to(device), position_ids=positions, segments=segments, use_cache=False).logits[0].float()
        for x in (ids, changed)
    )
    model.train(training)
    moved = (before - after).abs().amax(-1)
    if float(moved[second].max()) == 0:
        return None
    moved[second] = 0
    # Products with another number of rows round differently: in a mixture of experts the changed document sends others.
    return float(moved.max()) if float(moved.max()) > ROUNDING[model.dtype] * float(before.abs().max()) else 0.0


@torch.no_grad()
def unlike_own(model: PreTrainedModel, kind: str) -> float:
    """How far one document's logits with attention `kind` are from those of the model's own attention written out
    (`eager`), over the largest logit. An attention that drops what an architecture asks for (a cap, sinks, a bias)
    shows here."""
    vocab, device = model.config.get_text_config(decoder=True).vocab_size, next(model.parameters()).device
    ids = torch.randint(vocab, (1, 40), generator=torch.Generator().manual_seed(1)).to(device)
    training, before = model.training, model.config._attn_implementation
    model.eval()
    logits = []
    try:
        for each in ("eager", kind):
            take(model, each)
            logits.append(model(input_ids=ids, use_cache=False).logits.float())
    finally:
        take(model, before)
        model.train(training)
    return float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())


def why_not_packed(model: PreTrainedModel) -> str | None:
    """Why this model cannot be trained on packed documents, or None. Asks the model itself."""
    return _why_unlike(model) or _why_not_apart(model)


def settle(model: PreTrainedModel) -> str | None:
    """Gives the model packed attention, or transformers' fast one, where that computes what the model's own does, else
    its own. Returns why it cannot be trained on packed documents, or None."""
    why = _why_unlike(model)
    if why is None:
        take(model, NAME)
        return _why_not_apart(model)
    fast = getattr(model, "_supports_sdpa", False) and takes_others(model)
    take(model, "sdpa" if fast and unlike_own(model, "sdpa") <= UNLIKE[model.dtype] else "eager")
    return why


def _why_not_apart(model: PreTrainedModel) -> str | None:
    with _noted() as calls:
        moved = documents_apart(model)
    if moved is None:
        return "whether packed documents see each other cannot be shown (logits did not move)"
    if moved and any(call.get("segments") is None for call in calls):  # Nemotron
        return "this model's own code does not tell its attention where packed documents end"
    return f"this model carries information across packed documents (logits moved by {moved:.2g})" if moved else None


def _why_unlike(model: PreTrainedModel) -> str | None:
    """What packed attention does not compute as this model's own does, or None."""
    try:
        gap = unlike_own(model, NAME)
        lost = _what_is_lost(model)
    except ModelError as error:
        return error.message
    if gap > UNLIKE[model.dtype]:
        return (
            f"packed attention does not compute what this model's own does (logits differ by {gap:.2g} of the largest)"
        )
    return lost


@torch.no_grad()
def _what_is_lost(model: PreTrainedModel) -> str | None:
    """What this architecture tells its attention by a mask alone, which packed attention has none of. The few tokens of
    `unlike_own` do not show it."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    if "chunked_attention" in kinds:
        return "this model attends in chunks, which packed attention does not"
    before = model.config._attn_implementation
    take(model, NAME)
    try:
        with _noted() as calls:
            ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
            model(input_ids=ids, use_cache=False)
    finally:
        take(model, before)
    windows = [call.get("sliding_window") is not None for call in calls]
    missing = kinds.count("sliding_attention") - sum(windows) if kinds else 0
    if not kinds and getattr(model.config.get_text_config(decoder=True), "sliding_window", None) and not any(windows):
        missing = len(windows)  # PhiMoE
    return f"{missing} of this model's layers tell packed attention no window" if missing > 0 else None


@contextmanager
def _noted() -> Iterator[list[dict[str, Any]]]:
    """What each call of packed attention is told besides the states, until the block ends."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original, calls = ALL_ATTENTION_FUNCTIONS[NAME], []

    def noted(*given: Any, **more: Any) -> Any:
        calls.append(more)
        return original(*given, **more)

    AttentionInterface.register(NAME, noted)
    try:
        yield calls
    finally:
        AttentionInterface.register(NAME, original)


def takes_others(model: PreTrainedModel) -> bool:
    """Whether this architecture takes its attention from transformers' table of them, not from its own code alone."""
    return getattr(model, "_can_set_attn_implementation", lambda: True)()


def take(model: PreTrainedModel, kind: str) -> None:
    """Has the model compute attention by `kind`. Raises ModelError where its own code is all there is: "eager"."""
    if takes_others(model):
        model.set_attn_implementation(kind)
    elif kind == "eager":
        model.config._attn_implementation = kind  # by which transformers makes the mask
    else:
        raise ModelError("attention is part of this model's own code, where packed attention cannot stand")


def register() -> None:
    """Makes `attn_implementation="fitout"` known to transformers. No mask function: transformers then makes no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
