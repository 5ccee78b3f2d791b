"""What every objective can do, and the one language-modelling loss they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout import Layout, Segment
from ..model import rope
from ..model.attention import NAME as PACKED
from ..model.head import WHOLE, head_cross_entropy, kind_of_head
from ..model.parts import DATA, HEAD, part
from ..model.precision import onednn_multiplies
from ..model.send import send


class Objective(ABC):
    """`figures` names what is told beside the loss, averages over the units; `refers` says that the log-probabilities
    which the model gives the answers as training begins are asked for (`Layout.references`)."""

    figures: tuple[str, ...] = ()
    refers: bool = False

    @abstractmethod
    def units(self, layouts: Sequence[Layout]) -> float:
        """What the loss is averaged over (summed over micro-batches and ranks by the step)."""

    @abstractmethod
    def loss(self, model: nn.Module, layout: Layout, total: float) -> Tensor:
        """This layout's share of the step's loss: its sum divided by the step's `total` units."""

    def noted(self) -> list[float]:
        """The sum of each of `figures` over the units of all layouts since it was last asked."""
        return [0.0] * len(self.figures)


ROUND_TO = 64  # tokens; oneDNN compiles some twenty kernels for each length of a row, half a MB each


def inputs(
    layout: Layout, device: torch.device, *, filling: int = 0, packed: bool = True
) -> tuple[dict[str, object], list[Tensor]]:
    """The forward's arguments for one layout, a batch of one row of T tokens, no mask, no cache; and the layout's
    targets: where, which tokens, with which weights. All on the device.

    `filling` tokens that nobody sees make the row longer: a document of its own, or where documents are not `packed`,
    the end of the only one.
    """
    ids = np.concatenate([layout.ids, np.zeros(filling, np.int64)])
    positions = np.concatenate([layout.positions, np.arange(filling) + (0 if packed else layout.tokens)])
    more = (Segment(layout.tokens, layout.tokens + filling),) if filling else ()
    arrays = (ids, positions, layout.target_at, layout.target_token, layout.target_weight)
    there, standing, *targets = send([torch.from_numpy(array) for array in arrays], device)
    fed = {
        "input_ids": there[None],
        "position_ids": standing[None],
        "segments": (*layout.segments, *more),
        "use_cache": False,
    }
    return fed, targets


@dataclass(frozen=True)
class Predictions:
    """What forwards gave for their targets: hidden states, or logits where a model cannot be taken apart.

    The head runs on the supervised positions only, in chunks (model/head.py), each time that one of the two is asked.
    """

    model: Any
    rows: list[Tensor]  # of each forward (N, D), or (N, V) where `whole`; and more that fill it up, of weight zero
    tokens: list[Tensor]
    weights: list[Tensor]
    counts: list[int]  # of each forward: N
    whole: bool

    def losses(self) -> Tensor:
        """Each target's cross-entropy (N), without gradients."""
        with torch.no_grad():
            return self.weighed()[1]

    def weighed(self, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The sum (scalar) of the cross-entropies weighed with (N), by default with the targets' own weights; and each
        of them (N, detached)."""
        with part(HEAD):
            given = self.weights if weights is None else self._filled(weights)
            sums, losses = zip(*map(self._cross_entropy, self.rows, self.tokens, given), strict=True)
            each = [one[:count] for one, count in zip(losses, self.counts, strict=True)]
            return (sums[0], each[0]) if len(sums) == 1 else (torch.stack(sums).sum(), torch.cat(each))

    def _filled(self, weights: Tensor) -> list[Tensor]:
        apart = zip(weights.split(self.counts), self.tokens, strict=True)
        return [F.pad(mine, (0, len(tokens) - len(mine))) for mine, tokens in apart]

    def _cross_entropy(self, rows: Tensor, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if not self.whole:
            return head_cross_entropy(self.model, rows, tokens, weights)
        losses = F.cross_entropy(rows, tokens, reduction="none")
        return (losses * weights).sum(), losses.detach()


def predict(model: Any, layout: Layout) -> Predictions:
    """One forward of a layout; where the model's attention is not packed, one of each document."""
    whole = kind_of_head(model) == WHOLE
    found = Predictions(model, [], [], [], [], whole)
    for one in _forwards(model, layout):
        with part(DATA):
            fed, targets = inputs(one, device_of(model), filling=_filling(model, one), packed=_packed(model))
            more = -one.supervised % _rounding(model)
            at, tokens, weights = (F.pad(x, (0, more)) if more else x for x in targets)
        if whole:
            rows = model(**fed, logits_to_keep=at).logits.squeeze(0).float()
        else:
            hidden = model.get_decoder()(**fed).last_hidden_state.squeeze(0)
            with part(HEAD):
                rows = hidden.index_select(0, at)
        found.rows.append(rows)
        found.tokens.append(tokens)
        found.weights.append(weights)
        found.counts.append(one.supervised)
    return found


def token_losses(model: Any, layout: Layout) -> tuple[Tensor, Tensor]:
    """Weighted sum of the targets' cross-entropies (scalar), and each target's own (N, detached)."""
    return predict(model, layout).weighed()


def padding(model: Any, layout: Layout) -> int:
    """How many tokens are added to this layout's rows, to fill them up."""
    return sum(_filling(model, one) for one in _forwards(model, layout))


def _forwards(model: Any, layout: Layout) -> list[Layout]:
    """The layout itself, or, where attention is not packed, each of its documents."""
    if _packed(model) or len(layout.segments) < 2:
        return [layout]
    found = []
    for segment in layout.segments:
        mine = slice(segment.start, segment.end)
        its = (layout.target_at >= segment.start) & (layout.target_at < segment.end)
        found.append(
            replace(
                layout,
                ids=layout.ids[mine],
                positions=layout.positions[mine],
                segments=(Segment(0, segment.length),),
                target_at=layout.target_at[its] - segment.start,
                target_token=layout.target_token[its],
                target_weight=layout.target_weight[its],
                target_sample=layout.target_sample[its],
            )
        )
    return found


def _filling(model: Any, layout: Layout) -> int:
    """What fills up the row of one forward; no more than the model has positions, or turns alike."""
    filling = -layout.tokens % _rounding(model)
    config = model.config.get_text_config(decoder=True)
    turned = rope.switch(config)
    if _packed(model):
        return min(filling, turned or filling)
    limits = (turned, getattr(config, "max_position_embeddings", None))
    return min([filling, *(limit - layout.tokens for limit in limits if limit and limit >= layout.tokens)])


def _packed(model: Any) -> bool:
    return model.config._attn_implementation == PACKED


def device_of(model: Any) -> torch.device:
    """Where the model computes."""
    return getattr(model, "fitout_device", None) or next(model.parameters()).device  # off-loaded ones are elsewhere


def _rounding(model: Any) -> int:
    """What the length of a row is made a multiple of."""
    device = device_of(model)
    low = torch.is_autocast_enabled(device.type) or model.dtype == torch.bfloat16
    return ROUND_TO if (low or onednn_multiplies()) and device.type == "cpu" else 1
