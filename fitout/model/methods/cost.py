"""What each method costs, as arithmetic on a model's shape: trained numbers, numbers kept for the backward pass, FLOPs.

No torch and no settings classes here: functions of plain numbers, which the settings' `cost` methods call. The planner
turns a Cost into bytes and seconds; it knows no method by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from ..shape import Linear, Shape

Targets = Sequence[str] | str  # names of linear layers, or "all-linear"

OPTIMIZER_BYTES = {  # of state for one trained number
    "adamw": 8.0,  # two fp32 moments
    "adamw_8bit": 2 + 8 / 256,  # two bytes, and an fp32 scale for each block of 256 (Dettmers et al., arXiv 2110.02861)
    "paged_adamw_8bit": 2 + 8 / 256,
}
NF4_BLOCK, SCALE_BLOCK = 64, 256  # bitsandbytes' block sizes (Dettmers et al., arXiv 2305.14314, section 3)


@dataclass(frozen=True)
class Cost:
    """What a method adds to, and spares of, training a model.

    Numbers of parameters: `trained` have a gradient and optimizer state; `added` stand beside the base's own, kept in
    fp32; `quantised` of the base's take `quantised_bytes` each, all others the width of the compute dtype when the base
    is frozen, four bytes when it is not. `extra_bytes` is anything else kept all the time (indices).

    For the backward pass, a token and layer: `kept` counts numbers in the compute dtype beyond what any method keeps.
    It holds in the `layers` topmost layers, those that the backward pass goes through. Inputs of linear layers are not
    among them: attention keeps its output anyway, and the others are formed again (model/formed.py).

    Arithmetic: `weight_gradients` numbers of the linear matrices get a gradient of their own; `thin_flops` a token in
    the method's own narrow products, forward and backward, over all layers; `calls` narrow products a layer, forward
    and backward counted once; `call_flops` and `call_numbers` a micro-batch in what does not depend on its tokens
    (norms of weights, unpacking 4-bit weights). `transient` numbers, in the compute dtype, of the largest matrix that
    is formed anew while a layer is computed. `scored` numbers have gradients and fp32 scores at once while it is chosen
    what is trained. `libraries` bytes are taken in main memory by packages that the method alone needs.
    """

    trained: int
    layers: int
    added: int = 0
    frozen_base: bool = True
    quantised: int = 0
    quantised_bytes: float = 0.0
    extra_bytes: int = 0
    kept: int = 0
    weight_gradients: int = 0
    trains_head: bool = False
    embedding: bool = False  # the input embedding is trained: the backward pass goes down to it
    thin_flops: int = 0
    calls: int = 0
    call_flops: int = 0
    call_numbers: int = 0
    transient: int = 0
    libraries: int = 0
    scored: int = 0


SCORE_BYTES = 1 << 30  # of dense fp32 scores alive at once while entries are chosen by gradient
BITSANDBYTES = 45_000_000  # bytes that importing it takes (measured)


def full(shape: Shape, *, freeze: Sequence[str] = (), last_layers: int | None = None) -> Cost:
    """Every parameter, but for those that a pattern of `freeze` names (by themselves or by a module around them), and
    with `last_layers` only the topmost layers, the final norm and a head that is not the embedding."""
    first = shape.layers - last_layers if last_layers is not None else 0
    names = {
        name: size
        for name, size in shape.tensors()
        if not any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in freeze)
        and (last_layers is None or _layer(name) is None or _layer(name) >= first)  # type: ignore[operator]
        and not (last_layers is not None and name == "model.embed_tokens.weight")
    }
    trained_layers = [layer for name in names if (layer := _layer(name)) is not None]
    embedding = "model.embed_tokens.weight" in names
    lowest = 0 if embedding and last_layers is None else min(trained_layers, default=shape.layers)
    linear = {f"{linear.path}.weight": linear for linear in shape.linears}
    gradients = 0
    for name in names:
        path = name.partition("model.layers.")[2].partition(".")[2]
        if path in linear:
            gradients += linear[path].weights
    return Cost(
        trained=sum(names.values()),
        layers=shape.layers - lowest,
        frozen_base=False,
        weight_gradients=gradients,
        trains_head="lm_head.weight" in names or (shape.tied and embedding),
        embedding=embedding and last_layers is None,
    )


def lora(
    shape: Shape,
    *,
    rank: int,
    targets: Targets = "all-linear",
    rank_pattern: Mapping[str, int] | None = None,
    train_also: Sequence[str] = (),
    decomposed: bool = False,
) -> Cost:
    """A and B of rank r beside each targeted matrix (Hu et al., arXiv 2106.09685): r (in + out) numbers, 6 FLOPs each a
    token; x A^T is kept. `decomposed`: what A and B began as (PiSSA, OLoRA) is kept beside them and computed with."""
    chosen = [(linear, _rank_of(linear.path, rank_pattern or {}, rank)) for linear in targeted(shape, targets)]
    numbers = sum(r * (linear.inputs + linear.outputs) for linear, r in chosen)
    head = _rank_of("lm_head", rank_pattern or {}, rank) if _head_adapted(targets) else 0
    added = shape.layers * numbers + head * (shape.hidden + shape.vocab)
    ends = [_named(name, train_also) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    also = sum(size for name, size in shape.tensors() if _named(name, train_also))
    also += shape.head_weights if shape.tied and ends == [False, True] else 0  # one weight under two names
    times = 2 if decomposed else 1
    return Cost(
        trained=added + also,
        layers=shape.layers,
        added=added,
        extra_bytes=4 * added * (times - 1),
        kept=times * sum(r for _, r in chosen),
        trains_head=ends[1] or (shape.tied and ends[0]),
        embedding=ends[0] or (shape.tied and ends[1]),
        thin_flops=times * 6 * shape.layers * numbers,
        calls=5 * len(chosen),
    )


def _head_adapted(targets: Targets) -> bool:
    return targets != "all-linear" and "lm_head" in targets


def _rank_of(path: str, pattern: Mapping[str, int], rank: int) -> int:
    """The first pattern that matches the end of the name, as PEFT reads them; patterns of single layers do not."""
    return next((r for p, r in pattern.items() if re.fullmatch(rf"(.*\.)?({p})", path)), rank)


KEPT_ANYWAY = {"v_proj", "gate_proj", "up_proj"}  # outputs that attention and the gated product keep themselves


def dora(shape: Shape, *, rank: int, targets: Targets = "all-linear", **more) -> Cost:
    """LoRA and a magnitude for each output (Liu et al., arXiv 2402.09353); the columns' norms of W + s B A are formed
    anew in every forward, and the outputs before the magnitude are kept for its gradient."""
    base = lora(shape, rank=rank, targets=targets, **more)
    head = shape.vocab if _head_adapted(targets) else 0
    chosen = targeted(shape, targets)
    outputs, weights = sum(linear.outputs for linear in chosen), sum(linear.weights for linear in chosen)
    return replace(
        base,
        trained=base.trained + shape.layers * outputs + head,
        added=base.added + shape.layers * outputs + head,
        kept=base.kept + sum(linear.outputs for linear in chosen if linear.name not in KEPT_ANYWAY),
        calls=base.calls + 3 * len(chosen),
        call_flops=2 * rank * shape.layers * weights,
        call_numbers=2 * shape.layers * weights,
        transient=2 * max((linear.weights for linear in chosen), default=0),
    )


def qlora(
    shape: Shape,
    *,
    rank: int,
    double_quant: bool = True,
    magnitudes: bool = False,
    targets: Targets = "all-linear",
    **more,
) -> Cost:
    """LoRA over a base whose linear layers are stored in 4 bits (Dettmers et al., arXiv 2305.14314) and unpacked, one
    at a time, forward and backward. Embeddings, head and norms keep the compute dtype."""
    base = (dora if magnitudes else lora)(shape, rank=rank, targets=targets, **more)
    return replace(
        base,
        quantised=shape.linear_weights,
        quantised_bytes=four_bit_bytes(double_quant),
        call_numbers=base.call_numbers + 2 * shape.linear_weights,
        transient=max(linear.weights for linear in shape.linears),
        libraries=BITSANDBYTES,
    )


def four_bit_bytes(double_quant: bool) -> float:
    """Bytes a weight: half a byte, and its share of the block's scale (fp32, or 8 bits with fp32 scales of scales)."""
    scale = 1 + 4 / SCALE_BLOCK if double_quant else 4
    return 0.5 + scale / NF4_BLOCK


def adapter(shape: Shape, *, style: str = "pfeiffer", reduction: float = 16, activation: str = "relu") -> Cost:
    """Bottlenecks of width hidden / reduction with biases: two a layer (Houlsby et al., arXiv 1902.00751), one after
    the feed-forward (Pfeiffer et al., arXiv 2005.00247) or beside it (He et al., arXiv 2110.04366)."""
    places = 2 if style == "houlsby" else 1
    narrow = max(1, round(shape.hidden / reduction))
    numbers = places * (2 * shape.hidden * narrow + narrow + shape.hidden)
    own_inputs = 0 if style == "parallel" else places * shape.hidden  # beside: the input is the feed-forward's own
    return Cost(
        trained=shape.layers * numbers,
        layers=shape.layers,
        added=shape.layers * numbers,
        kept=own_inputs + (1 if activation == "relu" else 2) * places * narrow,  # relu keeps its result alone
        thin_flops=6 * shape.layers * places * 2 * shape.hidden * narrow,
        calls=6 * places,
    )


def sparse(
    shape: Shape, *, density: float, targets: Targets = "all-linear", by_gradient: bool = False, index_bytes: int = 8
) -> Cost:
    """A fraction of the targeted matrices' entries (Ansell et al., arXiv 2401.16405): values and indices of those; the
    gradient of one whole matrix is formed at a time, and only the chosen entries of it are kept. Chosen `by_gradient`,
    whole gradients and their sums are there while they are."""
    chosen = targeted(shape, targets)
    entries = shape.layers * sum(max(1, round(density * linear.weights)) for linear in chosen)
    weights = shape.layers * sum(linear.weights for linear in chosen)
    return Cost(
        trained=entries,
        layers=shape.layers,
        added=entries,
        extra_bytes=index_bytes * entries,
        weight_gradients=weights,
        call_numbers=2 * weights,
        transient=2 * max((linear.weights for linear in chosen), default=0),
        scored=min(weights, SCORE_BYTES // 4) if by_gradient else 0,
    )


def with_embeddings(cost: Cost, shape: Shape) -> Cost:
    """`cost` when tokens were added to the vocabulary: embeddings and head are trained too, so the base stays fp32."""
    also = shape.head_weights * (1 if shape.tied else 2)
    return replace(cost, trained=cost.trained + also, frozen_base=False, trains_head=True, embedding=True)


def targeted(shape: Shape, targets: Targets) -> list[Linear]:
    """The linear layers of a block that `targets` names."""
    if targets == "all-linear":
        return list(shape.linears)
    return [linear for linear in shape.linears if _ends(linear, targets)]


def _ends(linear: Linear, targets: Iterable[str]) -> bool:
    return any(linear.path == target or f".{linear.path}".endswith(f".{target}") for target in targets)


def _named(name: str, modules: Sequence[str]) -> bool:
    """Whether the parameter `name` belongs to one of the modules (PEFT's way: the module's name ends in it)."""
    module = name.rpartition(".")[0]
    return any(module == one or module.endswith(f".{one}") for one in modules)


def _layer(name: str) -> int | None:
    after = name.partition("model.layers.")[2]
    return int(after.partition(".")[0]) if after else None
