"""What every objective can do, and the one language-modelling loss they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

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


class Objective(Protocol):
    def units(self, layouts: Sequence[Layout]) -> float:
        """What the loss is averaged over (summed over micro-batches and ranks by the step)."""

    def loss(self, model: nn.Module, layout: Layout, total: float) -> Tensor:
        """This layout's share of the step's loss: its sum divided by the step's `total` units."""


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


def token_losses(model: Any, layout: Layout) -> tuple[Tensor, Tensor]:
    """Weighted sum of the targets' cross-entropies (scalar), and each target's own (N, detached).

    The head runs on the supervised positions only, in chunks (model/head.py); where a forward cannot be taken apart for
    that, it runs whole, at those positions.
    """
    with part(DATA):
        fed, targets = inputs(layout, _device(model), filling=padding(model, layout), packed=_packed(model))
        more = -layout.supervised % _rounding(model)  # rows of the head, too, of weight zero
        at, tokens, weights = (F.pad(x, (0, more)) if more else x for x in targets)
    if kind_of_head(model) != WHOLE:
        hidden = model.get_decoder()(**fed).last_hidden_state.squeeze(0)
        with part(HEAD):
            total, losses = head_cross_entropy(model, hidden.index_select(0, at), tokens, weights)
            return total, losses[: layout.supervised]
    logits = model(**fed, logits_to_keep=at).logits.squeeze(0).float()
    with part(HEAD):
        losses = F.cross_entropy(logits, tokens, reduction="none")
        return (losses * weights).sum(), losses.detach()[: layout.supervised]


def padding(model: Any, layout: Layout) -> int:
    """How many tokens `token_losses` adds to this layout's row, to fill it up; no more than the model has positions, or
    turns alike."""
    filling = -layout.tokens % _rounding(model)
    config = model.config.get_text_config(decoder=True)
    turned = rope.switch(config)
    if _packed(model):
        return min(filling, turned or filling)
    limits = (turned, getattr(config, "max_position_embeddings", None))
    return min([filling, *(limit - layout.tokens for limit in limits if limit and limit >= layout.tokens)])


def _packed(model: Any) -> bool:
    return model.config._attn_implementation == PACKED


def _device(model: Any) -> torch.device:
    return getattr(model, "fitout_device", None) or next(model.parameters()).device  # off-loaded ones are elsewhere


def _rounding(model: Any) -> int:
    """What the length of a row is made a multiple of."""
    device = _device(model)
    low = torch.is_autocast_enabled(device.type) or model.dtype == torch.bfloat16
    return ROUND_TO if (low or onednn_multiplies()) and device.type == "cpu" else 1
