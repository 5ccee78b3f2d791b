"""DoRA (Liu et al., arXiv 2402.09353): a low-rank path for a weight's direction, a trained vector for its magnitude."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fused import adapted_linear, adapted_norms, row_squares
from . import DoraSettings
from .lora import Lora, LoraLinear


class DoraLinear(LoraLinear):
    """y = x V'^T + b with V' = m V / |V| row by row, V = W + s B A, m trained and first |W| (the paper's equation 5).

    The norm is a constant in the backward, as the paper's section 4.3 proposes and PEFT does. It is found without
    forming V, and in fp32 also over a base in less.
    """

    squares: Tensor

    def __init__(self, base: nn.Linear, **how: Any):
        super().__init__(base, **how)
        self.register_buffer("squares", row_squares(self.dense(base_dtype(base))), persistent=False)
        self.lora_magnitude_vector = nn.Parameter(self.norms())
        self._kept: tuple[tuple[int, int], Tensor] | None = None

    def norms(self) -> Tensor:
        """|V| of each row, (out) fp32; not part of the graph."""
        a, b = self.factors()
        return adapted_norms(self.dense(base_dtype(self.base)), self.squares, a.detach(), b.detach(), self.scale)

    def _norms(self) -> Tensor:
        """`norms`, found once where nothing is trained: a generated token would cost `rank` times its product."""
        now = (self.lora_A._version, self.lora_B._version)
        if self.training or self._kept is None or self._kept[0] != now:
            self._kept = (now, self.norms())
        return self._kept[1]

    def train(self, mode: bool = True) -> DoraLinear:
        self._kept = None
        return super().train(mode)  # type: ignore[return-value]

    def merged(self) -> Tensor:
        return (self.lora_magnitude_vector / self.norms())[:, None] * super().merged()

    def saved(self) -> dict[str, Tensor]:
        return {**super().saved(), "lora_magnitude_vector": self.lora_magnitude_vector}

    def trained(self) -> dict[str, nn.Parameter]:
        return {**super().trained(), "lora_magnitude_vector": self.lora_magnitude_vector}

    def adapted(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return adapted_linear(
            x, self.dense, self.base.bias, a, b, self.scale, self.lora_magnitude_vector, self._norms()
        )

    def dropped(self, x: Tensor, kept: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """As PEFT: the base's own output is of the whole input, its correction of what dropout left."""
        ratio = self.lora_magnitude_vector / self._norms()
        base, low = F.linear(kept, self.dense(kept.dtype)), F.linear(F.linear(kept, a.to(x.dtype)), b.to(x.dtype))
        return self.base(x) + ((ratio - 1) * base + ratio * self.scale * low).to(x.dtype)


def base_dtype(base: nn.Linear) -> torch.dtype:
    """What a layer's weight is read in without making it wider."""
    return base.weight.dtype if base.weight.is_floating_point() else torch.float32


class Dora(Lora):
    layer = DoraLinear


def settings_from(folder: Path, config: dict[str, Any], common: dict[str, Any]) -> DoraSettings | None:
    """A saved adapter's settings where it is DoRA's."""
    return DoraSettings(**common) if config.get("use_dora") else None


def create(settings: DoraSettings) -> Dora:
    return Dora(settings)
