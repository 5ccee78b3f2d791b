"""Where the time of a step goes: some steps under torch.profiler, every microsecond of them in one part.

Operations are found by what they are (a matrix product, a LoRA linear) and by where they run (inside the attention
function, the loss, the optimizer); one of the backward pass belongs where its forward operation did. What is left of a
step when all operations are taken out is `host`. So the parts add up to the step by construction.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from ..files import explain_os_errors, make_folder, write_json
from ..model.parts import ATTENTION, DATA, HEAD, HOST, LINEARS, MARK, OPTIMIZER, OTHER, PARTS, part
from ..rundir import RunDir
from .step import StepResult

STEPS = 3  # that are profiled, after one that is not
STEP = MARK + "step"
BACKWARD = "autograd::engine::evaluate_function: "
PRODUCTS = {f"aten::{name}" for name in ("linear", "matmul", "mm", "addmm", "addmm_", "bmm", "baddbmm", "_scaled_mm")}
LAYER = re.compile(r"Linear|Lora")  # our own functions for linear layers, and their backwards
WHOLE = (DATA, ATTENTION, HEAD, OPTIMIZER)  # all that runs inside belongs to them


class Count(Protocol):
    flops: float
    seconds: float


class Products(Protocol):
    """What plan.products.Products is to a training."""

    def count(self, tokens: float, targets: float, pairs: float, again: float = 0.0) -> dict[str, Any]:
        """FLOPs and least seconds by part."""

    def recomputed(self, tokens: float, targets: float, pairs: float, again: float) -> float:
        """The share of FLOPs that are done again."""


@dataclass
class Done:
    """What the profiled steps computed, a rank."""

    steps: int = 0
    seconds: float = 0.0  # by the loop's own clock
    tokens: float = 0.0
    targets: float = 0.0
    pairs: float = 0.0
    padding: float = 0.0
    again: float = 0.0  # share of the layers that are recomputed


@dataclass
class Profile:
    """Profiles steps 2 to 4 of a process, or the only one there is. `report` is there after the last of them."""

    run: RunDir
    products: Products | None
    device: torch.device
    report: dict[str, Any] | None = None
    done: Done = field(default_factory=Done)
    _taken: bool = False
    _seen: int = 0
    _profiler: Any = None
    _restore: Callable[[], None] = lambda: None

    @contextmanager
    def step(self, model: Any, left: int) -> Iterator[None]:
        """Around one step; `left` says how many there are, this one included."""
        self._seen += 1
        if self._profiler is None and self.report is None and (self._seen == 2 or left == 1):
            self._start(model)
        if self._profiler is None:
            yield
            return
        with record_function(STEP):
            yield
        if self.done.steps == STEPS or left == 1:
            self.close()

    def saw(self, result: StepResult, seconds: float, again: float, ranks: int) -> None:
        """Adds what the step in progress did, by all ranks in `seconds`, if it is profiled."""
        if self._profiler is None:
            return
        done = self.done
        done.steps += 1
        done.seconds += seconds
        done.tokens += result.tokens / ranks
        done.targets += result.supervised / ranks
        done.pairs += result.pairs / ranks
        done.padding += result.padding / ranks
        done.again = again

    def take(self) -> dict[str, Any] | None:
        """The report, once."""
        report = None if self._taken else self.report
        self._taken = report is not None or self._taken
        return report

    def _start(self, model: Any) -> None:
        self._restore = mark_attention(model)
        on_card = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        self._profiler = profile(activities=[ProfilerActivity.CPU, *on_card], acc_events=True)
        self._profiler.start()

    def close(self) -> None:
        """Ends the profile, writes trace and parts, and makes the report; nothing when none runs."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._restore()
        if not self.done.steps:
            return
        make_folder(self.run.profile)
        with explain_os_errors(self.run.profile_trace, "write"):
            profiler.export_chrome_trace(str(self.run.profile_trace))
        spent = times(profiler.events(), on_card=self.device.type == "cuda")
        self.report = {**summary(spent, self.done, self.products), "trace": str(self.run.profile_trace)}
        write_json(self.run.profile_parts, self.report)


def mark_attention(model: Any) -> Callable[[], None]:
    """Has the model's attention function marked as a part; returns what takes the mark off again."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = model.config._attn_implementation
    original = ALL_ATTENTION_FUNCTIONS.get(name)
    if original is None:  # eager: a function of the modelling file, whose products count as linears
        return lambda: None

    def marked(*args: Any, **more: Any) -> Any:
        with part(ATTENTION):
            return original(*args, **more)

    AttentionInterface.register(name, marked)
    return lambda: AttentionInterface.register(name, original)


def times(events: list[FunctionEvent], *, on_card: bool = False) -> dict[str, float]:
    """Seconds by part, of all profiled steps together; `on_card`: of a GPU's kernels, by the operation that launched
    them, and as `host` the rest of the steps' time."""
    spent = Counter(dict.fromkeys(PARTS, 0.0))
    forwards: dict[int, str] = {}  # sequence number of an operation that autograd recorded -> its part
    on_cpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    steps = [event for event in on_cpu if event.name == STEP]
    if on_card:
        first, last = min(s.time_range.start for s in steps), max(s.time_range.end for s in steps)
        roots = [e for e in on_cpu if e.cpu_parent is None and first <= e.time_range.start <= last]
    else:
        roots = steps

    def walk(event: FunctionEvent, around: str) -> None:
        here = _part(event.name, around, forwards.get(event.sequence_nr, OTHER))
        if event.sequence_nr >= 0 and not event.name.startswith(BACKWARD):
            forwards[event.sequence_nr] = here  # the last operation of a number is the one that autograd recorded
        spent[here] += event.self_device_time_total if on_card else event.self_cpu_time_total
        for child in sorted(event.cpu_children, key=lambda one: one.time_range.start):
            walk(child, here)

    for root in sorted(roots, key=lambda one: one.time_range.start):
        walk(root, HOST)
    if on_card:
        spent[HOST] = sum(s.time_range.elapsed_us() for s in steps) - sum(spent.values())
    return {name: microseconds / 1e6 for name, microseconds in spent.items()}


def _part(name: str, around: str, forward: str) -> str:
    """The part of an operation that runs inside one of part `around`; `forward` is that of its forward operation."""
    if name.startswith(MARK):
        return name.removeprefix(MARK) if name != STEP else HOST
    if around in WHOLE:
        return around
    if name.startswith(BACKWARD):
        return forward if forward != OTHER else LINEARS if LAYER.search(name) else OTHER
    if name in PRODUCTS or LAYER.search(name):
        return LINEARS
    return OTHER if around == HOST else around


def summary(spent: dict[str, float], done: Done, products: Products | None) -> dict[str, Any]:
    """Seconds a step and shares by part; FLOP/s where the products can be counted, against their measured peak."""
    whole = sum(spent.values())
    counts = products.count(done.tokens, done.targets, done.pairs, done.again) if products else {}
    parts = {}
    for name in PARTS:
        parts[name] = {"seconds": spent[name] / done.steps, "share": spent[name] / whole}
        if name in counts and spent[name]:
            parts[name] |= _against(counts[name].flops, counts[name].seconds, spent[name])
    flops = sum(one.flops for one in counts.values())
    least = sum(one.seconds for one in counts.values())
    again = products.recomputed(done.tokens, done.targets, done.pairs, done.again) if products else None
    return {
        "steps": done.steps,
        "step_seconds": whole / done.steps,
        "clock_seconds": done.seconds / done.steps,
        "tokens_per_second": done.tokens / whole,
        "parts": parts,
        "whole": _against(flops, least, whole) if flops else None,
        "padding": done.padding / max(1.0, done.tokens + done.padding),
        "recomputed": again,
    }


def _against(flops: float, least: float, seconds: float) -> dict[str, float]:
    """Achieved and peak FLOP/s of products that took `seconds` and would take `least` at the measured speed."""
    return {"flops_per_second": flops / seconds, "peak": flops / least, "of_peak": least / seconds}
