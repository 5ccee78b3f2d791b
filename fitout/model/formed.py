"""What a backward forms again rather than keeps: the rows that a norm gave, the product of a gated feed-forward.

A linear layer keeps its input for the gradient of what is trained in it. Where that input is a few operations on what
is kept anyway, `remember` notes on it how it came about, and a layer called under `sparing` keeps the note in its
place: of a Llama's layer a seventh of what LoRA keeps and a quarter of what full fine-tuning keeps, for one norm and
one product an element in the backward. Selective recomputation (Korthikanti et al., arXiv 2205.05198, section 5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NOTE = "fitout_formed"  # attribute of a tensor


class Formed:
    """How a tensor came about: `make()` gives it again, bit for bit, while `source`, which it is made from, is as it
    was. Formed once for all that keep it, and let go when the last of them has taken it."""

    def __init__(self, make: Callable[[], Tensor], source: Tensor):
        self.make, self.source, self.version = make, source, source._version
        self.keepers = self.waiting = 0
        self.again: Tensor | None = None

    def kept(self) -> None:
        self.keepers += 1
        self.waiting += 1

    def taken(self) -> Tensor:
        if self.source._version != self.version:
            raise RuntimeError("what a layer's input is formed from was modified in place before the backward")
        made = self.make() if self.again is None else self.again
        self.waiting -= 1
        self.again = made if self.waiting > 0 else None
        if self.waiting <= 0:
            self.waiting = self.keepers  # a second backward over the same graph
        return made


def remember(x: Tensor, make: Callable[[], Tensor], source: Tensor) -> Tensor:
    """x, with a note of how it came about; `make` must not hold on to the graph. Under hooks on what is kept (those of
    activation checkpointing, which keeps nothing) there is nothing to spare."""
    if torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        setattr(x, NOTE, Formed(make, source))
    return x


class Sparing:
    """The forward of a linear layer, which keeps the note on its input where there is one."""

    def __init__(self, forward: Callable[..., Tensor]):
        self.forward = forward

    def __call__(self, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        note: Formed | None = getattr(x, NOTE, None)
        if note is None or not torch.is_grad_enabled():
            return self.forward(x, *rest, **more)
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype == torch.float32:
            x = x.to(torch.get_autocast_dtype(kind))  # as autocast would inside, where it could not be told from others

        place = x.data_ptr(), x.numel()  # not x, which would be kept with the hook

        def pack(kept: Tensor) -> Any:
            if (kept.data_ptr(), kept.numel()) != place or not kept.is_contiguous():
                return kept
            note.kept()
            return kept.shape, kept.dtype

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            shape, dtype = packed
            return note.taken().to(dtype).view(shape)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return self.forward(x, *rest, **more)
