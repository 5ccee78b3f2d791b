"""Sparse fine-tuning: a fixed share of each linear layer's entries is trained, chosen once or re-drawn.

The idea of a mask by Fisher information is Sung et al.'s (arXiv 2111.09839), that of re-drawing Ansell et al.'s (SpIEL,
arXiv 2401.16405). A layer holds the changes of its chosen entries as one fp32 vector: all that has a gradient and
moments. The weight itself stands as round(W + D) in the dtype the base is stored in, written into it before each
forward in training, so that what is computed is, bit for bit, the merged model. Writing took 0.02 to 1.3 % of the
product's time (CPU, fp32, density 0.1 to 5 %), a temporary copy up to 5 %, a sparse product 12 to 105 %.
In bf16 a change smaller than half a unit in the last place of its entry adds up in fp32 until it shows; the gradient
passes through the rounding as if it were not there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import FitoutError
from ...files import read_json, write_json
from ..fused import sparse_linear
from ..load import write_tensors
from . import SparseSettings
from .base import Gradients, Method, fill, freeze_base, left_alone, linear_layers, trainable
from .cost import SCORE_BYTES

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # torch's, at the first sparse product

FIRST_STEPS, NEXT_STEPS = 8, 4  # steps whose gradients choose entries: at the start, and at a re-draw
FIRST_SHARE = 0.2  # of the entries that the first re-draw replaces; falls linearly to none at the end


class SparseLinear(nn.Module):
    """A linear layer with `values` (n) added to n entries of its weight, whose places are `flat`, ascending."""

    flat: Tensor
    starts: Tensor
    original: Tensor

    def __init__(self, base: nn.Linear, density: float):
        super().__init__()
        self.base = base
        device, size = base.weight.device, base.weight.numel()
        count = max(1, round(density * size))
        self.values = nn.Parameter(torch.zeros(count, dtype=torch.float32, device=device))
        kind = torch.int32 if size < 2**31 else torch.int64
        self.register_buffer("flat", torch.arange(count, dtype=kind, device=device), persistent=False)
        self.register_buffer("original", self._weight()[self.flat], persistent=False)
        self.place(self.flat)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def _weight(self) -> Tensor:
        return self.base.weight.data.view(-1)

    def place(self, flat: Tensor) -> None:
        """Moves to other entries; the base's own numbers go back where it was. `values` are the caller's to change."""
        self._weight()[self.flat.long()] = self.original
        rows, columns = self.base.weight.shape
        self.flat = flat.to(self.flat)
        ends = torch.arange(rows + 1, device=flat.device) * columns
        self.starts = torch.searchsorted(self.flat.long(), ends).to(self.flat.dtype)
        self.original = self._weight()[self.flat.long()]

    @torch.no_grad()
    def write(self) -> None:
        """Puts round(W + D) into the weight."""
        self._weight()[self.flat.long()] = (self.original.float() + self.values).to(self.original.dtype)

    def train(self, mode: bool = True) -> SparseLinear:
        self.write()  # forwards in evaluation mode rely on it
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.write()
        if self.base.weight.requires_grad:  # while entries are chosen by their gradients
            return F.linear(x, self.base.weight, self.base.bias)
        return sparse_linear(x, self.base.weight, self.base.bias, self.values, self.starts, self.flat)


class Sparse(Method):
    def __init__(self, settings: SparseSettings):
        self.settings = settings
        self.seed: int | None = None  # set when the entries are chosen or read

    def apply(self, model: Any) -> None:
        freeze_base(model)
        for name in linear_layers(model, self.settings.targets):
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, leaf, SparseLinear(getattr(owner, leaf), self.settings.density))

    def notes(self, model: nn.Module) -> list[str]:
        return left_alone(model)

    def undivided(self, stage: int) -> str | None:
        if stage >= 3:
            return "the trained entries are written into whole weights, which no rank would hold"
        if stage >= 1 and self.settings.redraw_every:
            return "a re-draw moves the optimizer's moments along with the entries, and no rank would hold all of them"
        return None

    # choosing

    def begin(self, model: Any, gradients: Gradients, alive: Callable[[], None] = lambda: None) -> None:
        """Chooses the entries of a new run; one that goes on from a saved adapter keeps its own."""
        if self.seed is not None:
            return
        self.seed = _seed()
        if self.settings.select == "gradient":
            for name, score in _scores(model, gradients, FIRST_STEPS, torch.square):
                self._choose(sparse_layers(model)[name], score)
            return
        for index, layer in enumerate(sparse_layers(model).values()):
            magnitude = self.settings.select == "magnitude"
            self._choose(layer, layer.weight.abs().flatten() if magnitude else self._drawn(layer, index, step=0))

    def _choose(self, layer: SparseLinear, score: Tensor) -> None:
        layer.place(score.topk(len(layer.values)).indices.sort().values)

    def _drawn(self, layer: SparseLinear, index: int, step: int) -> Tensor:
        """Random scores of a layer's entries; they depend on the seed, the step and the layer alone."""
        key = (self.seed or 0) ^ (step << 20) ^ index
        return torch.rand(layer.weight.numel(), generator=torch.Generator().manual_seed(key)).to(layer.weight.device)

    def after_step(
        self, model: Any, optimizer: torch.optim.Optimizer, step: int, total: int, gradients: Gradients
    ) -> None:
        """A re-draw every `redraw_every` steps, unless no full round is left to train what it brings."""
        every = self.settings.redraw_every
        if not every or step % every or step + every > total:
            return
        share = FIRST_SHARE * (1 - step / total)
        if self.settings.select == "gradient":
            for name, score in _scores(model, gradients, NEXT_STEPS, torch.clone):
                self._redraw(sparse_layers(model)[name], optimizer, score.abs_(), share)
            return
        for index, layer in enumerate(sparse_layers(model).values()):
            magnitude = self.settings.select == "magnitude"
            score = layer.weight.abs().flatten() if magnitude else self._drawn(layer, index, step)
            self._redraw(layer, optimizer, score, share)

    @torch.no_grad()
    def _redraw(self, layer: SparseLinear, optimizer: torch.optim.Optimizer, score: Tensor, share: float) -> None:
        """The entries that moved least give way to those with the highest score; values and moments move along."""
        count = len(layer.values)
        swapped = min(round(share * count), len(score) - count)
        if swapped == 0:
            return
        kept = layer.values.abs().topk(count - swapped).indices
        score[layer.flat.long()] = -1  # neither what stays nor what just left
        flat, order = torch.cat([layer.flat.long()[kept], score.topk(swapped).indices]).sort()
        layer.place(flat)

        def moved(old: Tensor, new: Tensor | float) -> Tensor:
            fresh = torch.zeros(swapped, dtype=old.dtype, device=old.device) + new
            return torch.cat([old[kept], fresh])[order]

        layer.values.copy_(moved(layer.values, 0.0))
        for key, moment in optimizer.state.get(layer.values, {}).items():
            if not isinstance(moment, Tensor) or moment.shape != layer.values.shape:
                continue
            if not moment.is_floating_point():
                raise FitoutError(
                    f"the optimizer keeps {key} in {moment.dtype}, whose entries cannot be re-drawn one by one",
                    hint="Take an optimizer with 32-bit moments, or leave out method.redraw_every.",
                )
            # A second moment of zero would make the first updates six times too large: the step count is the layer's.
            second = key == "exp_avg_sq"
            moment.copy_(moved(moment, moment[kept].mean() if second and len(kept) else 0.0))
        layer.write()

    # checkpoints and files

    def state(self, model: Any) -> dict[str, Tensor]:
        places = {f"{name}.flat": layer.flat.clone() for name, layer in sparse_layers(model).items()}
        return {**places, "seed": torch.tensor(self.seed or 0)}

    def restore(self, model: Any, state: dict[str, Tensor]) -> None:
        self.seed = int(state["seed"])
        for name, layer in sparse_layers(model).items():
            layer.place(state[f"{name}.flat"].to(layer.flat.device))

    def save(self, model: Any, folder: Path, *, base: str, revision: str | None = None) -> None:
        """Per layer `NAME.indices` (ascending places in the row-major weight) and `NAME.values` (added, fp32)."""
        write_tensors(folder / "adapter_model.safetensors", self._tensors(model))
        config = {
            "peft_type": "SPARSE",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "revision": revision,
            **self.settings.model_dump(mode="json", exclude={"kind"}),
        }
        write_json(folder / "adapter_config.json", config)

    def _tensors(self, model: Any) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {name: p for name, p in trainable(model).items()}
        return tensors | {f"{name}.indices": layer.flat for name, layer in sparse_layers(model).items()}

    def load(self, model: Any, folder: Path) -> None:
        from safetensors.torch import load_file

        self.seed = _seed()
        saved, layers = load_file(folder / "adapter_model.safetensors"), sparse_layers(model)
        flat = {f"{name}.indices": torch.empty_like(layer.flat) for name, layer in layers.items()}
        fill({**trainable(model), **flat}, saved, folder)
        for name, layer in layers.items():
            layer.place(flat[f"{name}.indices"])
            layer.write()

    def merge(self, model: Any) -> None:
        """W <- round(W + D): the weight as it stands."""
        for name, layer in sparse_layers(model).items():
            layer.write()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.base)


def sparse_layers(model: Any) -> dict[str, SparseLinear]:
    """The sparsely trained layers by their name in the base model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def _seed() -> int:
    """What the run was seeded with (torch's generator is seeded anew each step, so this is asked before the first)."""
    return torch.initial_seed() & (2**63 - 1)


def _scores(
    model: Any, gradients: Gradients, steps: int, of: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Pairs of a layer's name and the sum of `of(gradient)` of its weight, flat, over so many steps.

    Gradients are dense here, so layers come in groups that hold at most SCORE_BYTES, each with a pass of its own over
    the same samples, dropout off. They are those of whole steps, whatever the micro-batches and ranks.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    trained, training = list(trainable(model).values()), model.training
    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # itself, not what is in it: else it would not recompute where it is asked to
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        for group in _groups(sparse_layers(model)):
            sums: dict[str, Tensor] = {}
            for layer in group.values():
                layer.weight.requires_grad_(True)
            for _ in islice(gradients(), steps):
                for name, layer in group.items():
                    score = of(layer.weight.grad.float().flatten())  # type: ignore[union-attr]
                    sums[name] = sums[name] + score if name in sums else score
                    layer.weight.grad = None
            for name, layer in group.items():
                layer.weight.requires_grad_(False)
                yield name, sums.pop(name).nan_to_num_(0.0, 0.0, 0.0)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(training)


def _groups(layers: dict[str, SparseLinear]) -> list[dict[str, SparseLinear]]:
    """The layers in order, in groups of at most SCORE_BYTES of fp32 scores (or of one layer)."""
    groups: list[dict[str, SparseLinear]] = []
    room = 0
    for name, layer in layers.items():
        size = 4 * layer.weight.numel()
        if not groups or size > room:
            groups.append({})
            room = SCORE_BYTES
        groups[-1][name] = layer
        room -= size
    return groups


def settings_of(folder: Path) -> SparseSettings:
    """The settings of a saved adapter."""
    config = read_json(folder / "adapter_config.json")
    return SparseSettings(**{key: config[key] for key in ("density", "select", "redraw_every", "targets")})


def create(settings: SparseSettings) -> Sparse:
    return Sparse(settings)
