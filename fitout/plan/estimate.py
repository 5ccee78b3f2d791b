"""The arithmetic of a plan: bytes at the fullest moment of a run, term by term, and seconds a step.

A run's memory has moments that can be the fullest: loading (on a CPU), the end of a forward and that of a backward, in
training and, for what is chosen by its gradients, while it is chosen; checkpoints are written straight from the tensors
and need nothing more. Terms are bytes on one device.

What a layer keeps for the backward pass is a sum of its widths times the bytes in constants.json, which are read from
the running code by `python -m benchmarks.planner_kept`. The machine's constants there are fitted by
`python -m benchmarks.planner`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..files import read_json
from ..model.methods.cost import OPTIMIZER_BYTES, Cost
from ..model.shape import Shape
from .machine import Speed, compiles_bf16
from .work import MicroBatch, Work

MB = 2**20
CUDA_OVERHEAD = 900 * MB  # driver context, cuBLAS workspaces, kernels: an estimate
CUDA_SPREAD = 1.08  # what the caching allocator holds beyond what is used: an estimate
HIDDEN_IN_FLIGHT = 2  # vectors of the hidden width outside the layers: embedding output, final norm


@lru_cache
def constants() -> dict[str, Any]:
    return read_json(Path(__file__).parent / "constants.json")


@dataclass(frozen=True)
class Setup:
    """How a method is run. `stage` is ZeRO's (0: copies everywhere, 1: optimizer state divided, 2: gradients too,
    3: parameters too, which is also what FSDP2's full shard does)."""

    precision: str  # fp32, bf16, fp16
    device: str = "cpu"  # or cuda
    optimizer: str = "adamw"
    recompute: float = 0.0  # share of the layers that the backward pass goes through and computes again
    devices: int = 1
    stage: int = 0
    resident: float = 0.0  # bytes that this process holds before anything is loaded; 0 where it is not known

    @property
    def width(self) -> int:
        return 4 if self.precision == "fp32" else 2


@dataclass(frozen=True)
class Memory:
    """The fullest moment, its terms in bytes, and the others' sums."""

    moment: str
    terms: dict[str, float]
    moments: dict[str, float]

    @property
    def peak(self) -> float:
        return sum(self.terms.values())

    @property
    def largest(self) -> str:
        """The name of the largest term."""
        return max(self.terms, key=lambda name: self.terms[name])

    @property
    def allocated(self) -> float:
        """Without what the framework takes: what `torch.cuda.max_memory_allocated` counts."""
        return self.peak - self.terms["framework"]


# memory


def memory(shape: Shape, cost: Cost, setup: Setup, work: Work) -> Memory:
    """Peak memory of one device over a run."""
    state = sharded(
        base_bytes(shape, cost, setup), cost.trained * 4.0, cost.trained * OPTIMIZER_BYTES[setup.optimizer],
        setup.stage, setup.devices,
    )  # fmt: skip
    parameters, gradients, optimizer = state
    if setup.stage >= 3:
        parameters += 2 * shape.layer_parameters * (4 if not cost.frozen_base else setup.width)  # gathered to compute
    copies = 2.0 * shape.linear_weights if _autocast(cost, setup) else 0.0
    batch = work.largest
    activations = kept_bytes(shape, cost, setup, batch.tokens)
    backward = layer_transient(shape, cost, setup, batch.tokens)
    loss = loss_bytes(shape, cost, setup, batch)
    held = gradients if work.most_micro_batches > 1 else 0.0  # before the first backward there are none
    ends = 4.0 * shape.head_weights if cost.trains_head else 0.0  # the embedding's gradient, dense, before it is added
    framework = framework_bytes(cost, setup)
    kernels = framework + kernel_bytes(setup, work)
    moments = {
        "end of a forward": _terms(setup, kernels, parameters + copies, held, optimizer,
                                   activations + max(0.0, backward - loss), loss),
        "end of a backward": _terms(setup, kernels, parameters + copies, gradients, optimizer, backward, ends),
    }  # fmt: skip
    if cost.scored:
        scores, dense = 4.0 * cost.scored, float(cost.scored * (setup.width if cost.frozen_base else 4))
        held = scores + (dense if work.most_micro_batches > 1 else 0.0)  # of the step's micro-batches before
        moments |= {
            "a forward that chooses": _terms(setup, kernels, parameters + copies, held, optimizer, activations, loss),
            "a backward that chooses": _terms(setup, kernels, parameters + copies, scores + dense, optimizer, backward,
                                              0),
        }  # fmt: skip
    if setup.device == "cpu" and shape.file_bytes and _rewritten(shape, cost, setup):
        moments["loading"] = _terms(setup, framework, parameters + shape.file_bytes, 0, 0, 0, 0)
    name = max(moments, key=lambda one: sum(moments[one].values()))
    return Memory(name, moments[name], {one: sum(terms.values()) for one, terms in moments.items()})


def framework_bytes(cost: Cost, setup: Setup) -> float:
    """What the libraries take: on a CPU what the process holds with them imported, and what they take when they first
    compute (threads, workspaces)."""
    if setup.device == "cuda":
        return CUDA_OVERHEAD
    known = _memory_constants(setup)
    return (setup.resident or known["imports_mb"] * MB) + known["first_use_mb"] * MB + cost.libraries


def _terms(
    setup: Setup, framework: float, weights: float, gradients: float, optimizer: float, activations: float, loss: float
) -> dict[str, float]:
    spread = CUDA_SPREAD if setup.device == "cuda" else _memory_constants(setup)[_allocator()]
    return {
        "framework": framework,
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": spread * activations,
        "loss": spread * loss,
    }


def _allocator() -> str:
    """The constant of how much more than tensors hold is resident on a CPU: in blocks, or in a heap with its holes."""
    from ..model import blocks

    return "spread" if blocks.why_not() is None else "heap_spread"


def _memory_constants(setup: Setup) -> dict[str, float]:
    return constants()["memory"][_table(setup)]


KERNELS_A_SIZE = 20  # of a micro-batch: counted for LoRA on a llama


def kernel_bytes(setup: Setup, work: Work) -> float:
    """On a CPU, oneDNN's products compile kernels for each new size of a micro-batch, and some are kept: those in bf16,
    and in fp32 where it multiplies them (benchmarks/planner_kernels.py)."""
    from ..model.precision import KERNELS, onednn_multiplies
    from ..objectives.base import ROUND_TO

    compiled = compiles_bf16() if setup.precision == "bf16" else onednn_multiplies()
    if setup.device == "cuda" or not compiled:
        return 0.0
    looked = {-(-one.tokens // ROUND_TO) for step in work.steps for one in step}
    sizes = len(looked) * max(1.0, work.total_steps / len(work.steps))
    return MB * _memory_constants(setup)["kernel_mb"] * min(KERNELS, KERNELS_A_SIZE * sizes)


def sharded(parameters: float, gradients: float, optimizer: float, stage: int, devices: int) -> tuple[float, ...]:
    """Bytes of each on one of `devices`, by ZeRO stage (Rajbhandari et al., arXiv 1910.02054, section 5)."""
    divided = [stage >= 3, stage >= 2, stage >= 1]
    return tuple(b / devices if d else b for b, d in zip((parameters, gradients, optimizer), divided, strict=True))


def base_bytes(shape: Shape, cost: Cost, setup: Setup) -> float:
    """All weights that stay: the base as it is stored, and what stands beside it in fp32."""
    width = setup.width if cost.frozen_base else 4
    plain = (shape.parameters - cost.quantised) * width
    return plain + cost.quantised * cost.quantised_bytes + 4.0 * cost.added + cost.extra_bytes


def _autocast(cost: Cost, setup: Setup) -> bool:
    """fp32 weights computed in less: the copies that autocast makes live until the backward pass has used them."""
    return not cost.frozen_base and setup.precision != "fp32"


def _rewritten(shape: Shape, cost: Cost, setup: Setup) -> bool:
    """Whether loading converts: then file and converted weights are both in memory for a while."""
    return bool(cost.quantised) or shape.file_width != (setup.width if cost.frozen_base else 4)


def layer_bytes(shape: Shape, cost: Cost, setup: Setup) -> float:
    """Bytes that one layer keeps for each token."""
    bytes_of = constants()["kept"]["frozen" if cost.frozen_base else "trained"][_table(setup)]
    widths = {
        "hidden": shape.hidden, "attention": shape.attention_width, "kv": shape.kv_width, "ffn": shape.ffn,
        "heads": shape.heads, "one": 1,
    }  # fmt: skip
    every = sum(bytes_of[name] * width for name, width in widths.items())
    return every + setup.width * cost.kept + _more_norms(shape, setup)


def _more_norms(shape: Shape, setup: Setup) -> float:
    """Norms beyond Llama's two a layer keep their input in fp32 and their output."""
    per_head = {"self_attn.q_norm": shape.heads, "self_attn.k_norm": shape.kv_heads}
    widths = [size * (per_head.get(path, 1) if size == shape.head_dim else 1) for path, size in shape.vectors]
    return (4 + setup.width) * max(0, sum(widths) - 2 * shape.hidden)


def _table(setup: Setup) -> str:
    return "fp32" if setup.precision == "fp32" else "bf16"


def kept_bytes(shape: Shape, cost: Cost, setup: Setup, tokens: int) -> float:
    """Bytes kept between forward and backward by a micro-batch of `tokens`."""
    layer = layer_bytes(shape, cost, setup)
    stream = 4 if _autocast(cost, setup) else setup.width
    outside = HIDDEN_IN_FLIGHT * stream * shape.hidden
    again = recomputed_layers(cost, setup)
    whole = max(cost.layers - again, min(1, cost.layers))  # the one that is computed again is whole, too
    return tokens * (outside + whole * layer + again * stream * shape.hidden)


def recomputed_layers(cost: Cost, setup: Setup) -> int:
    return math.ceil(setup.recompute * cost.layers)


def layer_transient(shape: Shape, cost: Cost, setup: Setup, tokens: int) -> float:
    """Bytes that come and go while one layer is computed backwards: gradients of its widest inputs, a matrix formed
    anew."""
    matrix = cost.transient * setup.width
    if not cost.frozen_base:
        matrix = max(matrix, 4 * max(linear.weights for linear in shape.linears))
    return tokens * setup.width * _memory_constants(setup)["layer"] * (3 * shape.ffn + 2 * shape.hidden) + matrix


def loss_bytes(shape: Shape, cost: Cost, setup: Setup, batch: MicroBatch) -> float:
    """The head's part (model/head.py): logits of one chunk of targets, a few times; gradients of hidden and head."""
    from ..model.fused import chunk_rows

    rows = min(batch.targets, chunk_rows(shape.vocab, setup.device))
    logits = _memory_constants(setup)["chunks"] * 4.0 * rows * shape.vocab
    hidden = 3.0 * setup.width * batch.targets * shape.hidden
    head = 4.0 * shape.head_weights if cost.trains_head else 0.0
    copy = 2.0 * shape.head_weights if _autocast(cost, setup) else 0.0
    return logits + hidden + head + copy


# time


def load(shape: Shape, cost: Cost, one: MicroBatch) -> float:
    """What a micro-batch asks for, in tokens: attention and head counted as so many more tokens through the layers."""
    passes = 1 + cost.layers / shape.layers + cost.weight_gradients / shape.linear_weights
    layers = 2 * passes * shape.linear_weights
    attention = 14 * shape.attention_width * shape.layers
    head = (6 if cost.trains_head else 4) * shape.head_weights
    return one.tokens + (one.pairs * attention + one.targets * head) / layers


def seconds(shape: Shape, cost: Cost, setup: Setup, work: Work, speed: Speed) -> float:
    """Seconds of a step, on average over the run, by arithmetic on rates; without what devices exchange."""
    weights = CALLS_AND_RATES[setup.device]
    steps = [features(shape, cost, setup, step, speed) for step in work.timed]
    return sum(weights[name] * value for step in steps for name, value in step.items()) / len(steps)


# How many times longer than at the probed or data-sheet rate each part takes, and seconds a call. On a CPU about what
# was measured on one (attention runs in small pieces, activations through memory); on cards estimates, not measured.
CALLS_AND_RATES = {
    "cpu": {"products": 1.2, "thin": 1.5, "attention": 6.0, "moving": 3.0, "updates": 1.3, "heads": 4e-5,
            "documents": 0.0, "layers": 7e-5, "micro_batches": 0.0},
    "cuda": {"products": 1.0, "thin": 2.0, "attention": 1.0, "moving": 1.0, "updates": 1.0, "heads": 0.0,
             "documents": 2e-5, "layers": 2e-6, "micro_batches": 1e-3},
}  # fmt: skip


def features(shape: Shape, cost: Cost, setup: Setup, step: tuple[MicroBatch, ...], speed: Speed) -> dict[str, float]:
    """What a step's time is made of: seconds at the given rates (products, thin, attention, moving, updates), and
    counts of calls (heads of documents, documents, layers, micro-batches) that cost a time each."""
    tokens, targets = sum(b.tokens for b in step), sum(b.targets for b in step)
    largest = max((b.tokens for b in step), default=1)
    rates = {
        linear: speed.products(linear.inputs, linear.outputs, largest, setup.precision) for linear in shape.linears
    }
    rate = max(rates.values())
    layer = sum(2 * linear.weights / rates[linear] for linear in shape.linears)
    gradients = cost.weight_gradients / shape.layer_weights  # in layers
    forwards = shape.layers + recomputed_layers(cost, setup)
    head_rate = speed.products(shape.hidden, shape.vocab, 512, setup.precision)
    head = targets * 2 * shape.head_weights * (3 if cost.trains_head else 2) / head_rate
    bytes_per_second = speed.bandwidth()
    moved = tokens * cost.layers * layer_bytes(shape, cost, setup) * (1 + setup.recompute / 2)
    optimizer = 16 + 2 * OPTIMIZER_BYTES[setup.optimizer]
    copies = 6 * shape.linear_weights * len(step) if _autocast(cost, setup) else 0
    accumulated = 12 * cost.trained * len(step)
    once = cost.call_numbers * setup.width / bytes_per_second + cost.call_flops / rate
    documents = float(sum(len(b.lengths) for b in step) * forwards)
    return {
        "products": tokens * layer * (forwards + cost.layers + gradients) + head,
        "thin": tokens * cost.thin_flops * (1 + setup.recompute / 3) / rate,
        "attention": sum(b.pairs for b in step) * shape.attention_width * 14 * shape.layers / rate,
        "moving": (moved + 12 * targets * shape.vocab) / bytes_per_second,
        "updates": (cost.trained * optimizer + copies + accumulated) / bytes_per_second + len(step) * once,
        "documents": documents,
        "heads": documents * shape.heads,
        "layers": float(len(step) * (forwards * 10 + cost.layers * cost.calls)),
        "micro_batches": float(len(step)),
    }


def exchange_seconds(shape: Shape, cost: Cost, setup: Setup, micro_batches: float, link: float) -> float:
    """Seconds a step in which devices exchange numbers, none of it hidden behind computing (Rajbhandari et al., arXiv
    1910.02054, section 7): gradients are summed once, which sends and receives each twice; with parameters divided
    they are gathered for the forward and again for the backward of every micro-batch, and gradients sent once."""
    if setup.devices == 1:
        return 0.0
    others = (setup.devices - 1) / setup.devices
    gradients = 4.0 * cost.trained
    if setup.stage < 3:
        return others * 2 * gradients / link
    return others * (micro_batches * 2 * base_bytes(shape, cost, setup) + gradients) / link
