"""The rehearsal: what a micro-batch and an update cost on the machine at hand, found by doing a few.

Two small models of the planned one's shape, one layer and three layers deep, in random numbers, are given the method
and trained for some of the run's own micro-batches by the code that will train. What the second takes longer is what
layers cost; the rest (embedding, head, calls) is there once. So nothing about the processor, about how a method is
computed, or about numbers that a processor has no instructions for, needs a constant. No weights of the base are read.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..errors import FitoutError
from ..layout import Layout
from ..model.methods.cost import Cost
from ..model.shape import Shape
from .estimate import Setup, load
from .machine import Machine, remembered
from .work import MicroBatch, Work, WorkAt

DEPTHS = (1, 3)  # layers of the two small models
TRY = 0.08  # seconds that forward and backward of one rehearsed micro-batch should take at most, roughly
SECONDS = 0.5  # after which no further round is begun with a small model
ROUNDS = 7  # at most; the first warms up, and counts only where it took more than all the time there is
SHORTEST = 64  # tokens
MOST_NUMBERS = 250_000_000  # of a small model's parameters; a larger one is not worth making for a plan
MOST_HEAD = 64_000_000  # numbers in the head; beyond, a smaller vocabulary stands in and its time is scaled


@dataclass(frozen=True)
class Tempo:
    """Seconds: a micro-batch takes `fixed + each * load` (see `estimate.load`), the update at the end `update`."""

    fixed: float
    each: float
    update: float

    def step(self, shape: Shape, cost: Cost, step: tuple[MicroBatch, ...]) -> float:
        return self.update + sum(self.fixed + self.each * load(shape, cost, one) for one in step)


class Rehearsal:
    """The tempo of methods on `machine`, each found once and remembered for the machine.

    `config` is the model's (transformers), `settings` the methods' by kind, `objective` what is minimised.
    """

    def __init__(
        self, shape: Shape, config: Any, settings: dict[str, Any], train: Any, objective: Any, work_at: WorkAt,
        machine: Machine, *, grown: bool = False,
    ):  # fmt: skip
        self.shape, self.config, self.settings = shape, config, settings
        self.train, self.objective, self.work_at = train, objective, work_at
        self.machine, self.grown = machine, grown
        self.measures = getattr(machine.speed, "measures", True)  # else what is not remembered raises NotMeasured
        self.tried: set[str] = set()  # kinds of methods that this process has computed with
        self._bases: dict[int, Path] = {}
        self._folder: TemporaryDirectory[str] | None = None

    def tempo(self, kind: str, cost: Cost, setup: Setup, budget: int) -> Tempo | None:
        """None where it cannot be found: a model too large to rehearse, a package or a layer that is missing."""
        if 0 < setup.recompute < 1:  # between nothing and all
            none, every = (self.tempo(kind, cost, replace(setup, recompute=end), budget) for end in (0.0, 1.0))
            return _between(none, every, setup.recompute) if none and every else None
        depths = DEPTHS if self.shape.layers > DEPTHS[-1] else (self.shape.layers,)
        small = replace(self.shape, layers=depths[-1], vocab=self._vocabulary())
        if small.parameters > MOST_NUMBERS:
            return None
        samples = self._samples(cost, setup, budget)
        from safetensors import SafetensorError

        with contextlib.suppress(FitoutError, ImportError, ValueError, OSError, SafetensorError):
            found = remembered(
                self.machine.kind, self._key(kind, setup, samples),
                (lambda: asdict(self._found(kind, cost, setup, samples, depths))) if self.measures else None,
            )  # fmt: skip
            return Tempo(**found)
        return None

    def _vocabulary(self) -> int:
        return min(self.shape.vocab, MOST_HEAD // self.shape.hidden)

    def _samples(self, cost: Cost, setup: Setup, budget: int) -> list[MicroBatch]:
        """Some of the run's micro-batches; where they are too large to be tried, its samples in smaller ones of two
        sizes."""
        rate = self.machine.speed.products(self.shape.hidden, self.shape.ffn, 256, setup.precision)
        most = max(SHORTEST, int(TRY * rate / (6 * DEPTHS[-1] * self.shape.layer_weights)))
        if budget <= most:
            return _spread(self.work_at(budget, 1), (0.1, 0.5, 0.9), self.shape, cost)
        less = max(SHORTEST, most // 4)
        return [
            *_spread(self.work_at(less, 1), (0.5,), self.shape, cost),
            *_spread(self.work_at(most, 1), (0.5, 0.9), self.shape, cost),
        ]

    def _key(self, kind: str, setup: Setup, samples: list[MicroBatch]) -> str:
        """Names what was tried; the numbers of another trial do not fit."""
        from .. import __version__

        shape = replace(self.shape, file_bytes=None, file_width=None)
        what = [
            __version__, repr(shape), self.settings[kind].model_dump(mode="json"), setup.precision, setup.recompute,
            setup.optimizer, type(self.objective).__name__, self.grown,
            [(one.tokens, one.targets, one.lengths) for one in samples],
        ]  # fmt: skip
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
        return f"{self.shape.family} {self.shape.parameters / 1e6:.1f}M {kind} {setup.precision} {digest}"

    def _found(self, kind: str, cost: Cost, setup: Setup, samples: list[MicroBatch], depths: tuple[int, ...]) -> Tempo:
        """Forward, backward and update, each carried on from the small models' layers to all."""
        self.tried.add(kind)
        trials = [self._trial(kind, setup, samples, depth) for depth in depths]
        first, last = trials[0], trials[-1]

        def whole(what: str, layers: int) -> np.ndarray:
            one, other = getattr(first, what), getattr(last, what)
            apart = layers_apart(first, last, what)
            each = np.maximum(0, (other - one) / apart) if apart else np.zeros_like(one)
            return one + each * (layers - layers_of(first, what))

        head = (first.head + last.head) / 2 * self.shape.vocab / self._vocabulary()
        seconds = whole("forward", self.shape.layers) + head + whole("backward", cost.layers)
        loads = np.array([load(self.shape, cost, one) for one in samples])
        fixed, each = _line(loads, seconds)
        return Tempo(fixed, each, float(whole("update", cost.layers)))

    def _trial(self, kind: str, setup: Setup, samples: list[MicroBatch], depth: int) -> Trial:
        """One small model trained on the samples, some rounds; medians."""
        import torch

        from ..model.memory import give_back
        from ..model.precision import best_device

        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            try:
                return self._timed(kind, setup, samples, depth)
            finally:
                give_back(best_device())  # so that a run's peak is its own

    def _timed(self, kind: str, setup: Setup, samples: list[MicroBatch], depth: int) -> Trial:
        import torch

        from ..model import between, methods
        from ..model.fuse import fused
        from ..model.load import DTYPES, load_base
        from ..model.memory import recompute_activations
        from ..model.methods.base import raise_to_fp32, trainable
        from ..model.precision import best_device
        from ..train.optim import make_optimizer

        settings = self.settings[kind].in_layers(depth)
        method, device = methods.create(settings), best_device()
        dtype = DTYPES[setup.precision]
        model: Any = load_base(
            str(self._base(depth)), dtype=dtype if method.frozen_base else torch.float32,
            device=device, extra=method.load_kwargs(dtype),
        )  # fmt: skip
        model.fitout_grown_vocabulary = self.grown
        method.apply(model)
        raised = raise_to_fp32(trainable(model))
        parameters = list(trainable(model).values())
        optimizer = make_optimizer(trainable(model), self.train, method.rates(model))
        if setup.recompute:
            recompute_activations(model)
        model.train()
        casting = (raised or not method.frozen_base) and setup.precision != "fp32"
        layouts = [self._layout(one) for one in samples]

        def forward(layout: Layout) -> Any:
            with torch.autocast(device.type, dtype) if casting else contextlib.nullcontext():
                return self.objective.loss(model, layout, float(layout.supervised or 1))

        def gradients() -> Iterator[None]:
            forward(layouts[0]).backward()
            yield

        def now() -> float:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter()

        rounds: list[list[float]] = []
        decoded: list[float] = []  # when the decoder began and ended, of each forward
        decoder = model.get_decoder()
        decoder.register_forward_pre_hook(lambda *_: decoded.append(now()))
        decoder.register_forward_hook(lambda *_: decoded.append(now()))
        with fused(model), between.using(between.best(device)):
            method.begin(model, gradients)
            began = now()
            while len(rounds) < ROUNDS and now() - began < SECONDS:
                decoded.clear()
                marks = [now()]
                for layout in layouts:
                    loss = forward(layout)
                    marks.append(now())
                    loss.backward()
                    marks.append(now())
                torch.nn.utils.clip_grad_norm_(parameters, self.train.clip or float("inf"))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                marks.append(now())
                rounds.append([*np.diff(decoded)[::2], *np.diff(marks)])
        every = [median(column) for column in zip(*rounds[1:] or rounds, strict=True)]
        count = len(layouts)
        layers, (*steps, update) = np.array(every[:count]), every[count:]
        back = settings.cost(replace(self.shape, layers=depth)).layers
        forwards, backwards = np.array(steps[0::2]), np.array(steps[1::2])
        return Trial(depth, back, layers, forwards - layers, backwards, np.array(update))

    def _layout(self, one: MicroBatch) -> Layout:
        assert one.layout is not None
        most = self._vocabulary()
        return replace(one.layout, ids=one.layout.ids % most, target_token=one.layout.target_token % most)

    def _base(self, depth: int) -> Path:
        """A folder with a random model of so many layers."""
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from ..model.load import save_model

        logging.disable_progress_bar()
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="fitout-rehearsal-")
        if depth not in self._bases:
            config = copy.deepcopy(self.config)
            inner = config.get_text_config(decoder=True)
            inner.num_hidden_layers, inner.vocab_size, inner.pad_token_id = depth, self._vocabulary(), None
            if getattr(inner, "layer_types", None):
                inner.layer_types = inner.layer_types[:depth]
            folder = Path(self._folder.name) / str(depth)
            save_model(AutoModelForCausalLM.from_config(config), folder)
            self._bases[depth] = folder
        return self._bases[depth]


@dataclass(frozen=True)
class Trial:
    """Seconds of one small model: the decoder's forward, the rest of the forward (head, loss, copies) and the backward
    of each sample, and the update. `back` is how many of its layers the backward goes through. The head is apart, so
    that what its time happens to vary by is not taken for layers and multiplied."""

    depth: int
    back: int
    forward: np.ndarray
    head: np.ndarray
    backward: np.ndarray
    update: np.ndarray


def _between(one: Tempo, other: Tempo, share: float) -> Tempo:
    mixed = {key: (1 - share) * value + share * asdict(other)[key] for key, value in asdict(one).items()}
    return Tempo(**mixed)


def layers_of(trial: Trial, what: str) -> int:
    return trial.depth if what == "forward" else trial.back


def layers_apart(first: Trial, last: Trial, what: str) -> int:
    return layers_of(last, what) - layers_of(first, what)


def _spread(work: Work, shares: tuple[float, ...], shape: Shape, cost: Cost) -> list[MicroBatch]:
    """The micro-batches at these places of all, ordered by load; each once."""
    every = sorted((one for step in work.steps for one in step), key=lambda one: load(shape, cost, one))
    chosen = {min(len(every) - 1, int(share * len(every))) for share in shares}
    return [every[at] for at in sorted(chosen)]


def _line(loads: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """(a, b) of seconds = a + b load with neither below zero, by least squares on relative errors."""
    left = np.stack([1 / seconds, loads / seconds], 1)
    if np.ptp(loads) > 0.3 * loads.max():
        a, b = np.linalg.lstsq(left, np.ones(len(loads)), rcond=None)[0]
        if a >= 0 and b > 0:
            return float(a), float(b)
    return 0.0, float(1 / np.mean(loads / seconds))
