"""The matrix products of a training, counted: FLOPs by part, and the seconds they alone would take on a machine.

The yardstick for a measured speed: FLOPs over seconds is what was achieved, seconds at the probed speed of the same
products over measured seconds is the share of the machine's matmul peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..model.methods.cost import Cost
from ..model.shape import Shape
from .machine import Speed

HEAD_ROWS = 512  # targets whose logits are computed at a time, about


@dataclass(frozen=True)
class Count:
    """FLOPs of matrix products, and the least seconds for them: each kind at the speed probed in its own size, and
    those that have none (attention, low-rank paths) at the fastest."""

    flops: float
    seconds: float


@dataclass(frozen=True)
class Products:
    """A model and a method on a machine; `rows` is how many tokens a micro-batch has at most."""

    shape: Shape
    cost: Cost
    precision: str
    speed: Speed
    rows: int

    def count(self, tokens: float, targets: float, pairs: float, again: float = 0.0) -> dict[str, Count]:
        """By part, forward and backward of `tokens`, of which `targets` are predicted, with `pairs` of tokens that look
        at each other in a layer (layout.Layout.pairs); `again` is the share of the layers whose forward is recomputed.

        A product over n weights is 2 n FLOPs a token, its two gradients as much each. The lowest layer of a frozen base
        needs no gradient of its input. Too large at most: by the lowest layer for a
        bottleneck adapter, whose backward ends within it; by the last products of recomputed layers, which may be left
        out.
        """
        shape, cost = self.shape, self.cost
        rates = {linear: self._rate(linear.inputs, linear.outputs, self.rows) for linear in shape.linears}
        fastest = max(rates.values())
        forward = shape.layers * (1 + again)
        spared = cost.frozen_base and not cost.embedding and cost.layers > 0
        passes = {linear: forward + cost.layers - (spared and linear.reads == "attention") for linear in shape.linears}
        gradients = cost.weight_gradients / shape.layer_weights  # in layers
        flops = {linear: 2 * tokens * linear.weights * (passes[linear] + gradients) for linear in shape.linears}
        thin = tokens * cost.thin_flops * (1 + again / 3)
        attention = pairs * 4 * shape.attention_width * (forward + 2 * cost.layers)
        head = targets * 2 * shape.head_weights * (3 if cost.trains_head else 2)
        return {
            "linears": Count(
                sum(flops.values()) + thin, sum(flops[one] / rates[one] for one in flops) + thin / fastest
            ),
            "attention": Count(attention, attention / fastest),
            "head and loss": Count(head, head / self._rate(shape.hidden, shape.vocab, HEAD_ROWS)),
        }

    def recomputed(self, tokens: float, targets: float, pairs: float, again: float) -> float:
        """The share of all FLOPs that are forwards done again."""
        whole, once = (sum(one.flops for one in self.count(tokens, targets, pairs, a).values()) for a in (again, 0.0))
        return 1 - once / whole if whole else 0.0

    def _rate(self, inputs: int, outputs: int, rows: int) -> float:
        return self.speed.products(inputs, outputs, rows, self.precision)
