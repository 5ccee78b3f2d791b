"""What a run would run on: the machine at hand, its speed measured by a probe, or a named card from its data sheet."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import RequestError
from ..files import home, read_json, write_json

GIB = 2**30
UTILISATION = 0.4  # of the data-sheet peak that products of a real training loop reach; an estimate, not measured here


PCIE = 25e9  # bytes/s in one direction of 16 lanes of PCIe 4, less protocol
LOOPBACK = 1e9  # bytes/s between two processes on one CPU (gloo over TCP); an estimate


class Speed(Protocol):
    """How fast numbers are crunched."""

    def products(self, inputs: int, outputs: int, rows: int, precision: str) -> float:
        """FLOP/s of (rows, inputs) times (inputs, outputs)."""

    def bandwidth(self) -> float:
        """Bytes/s of reading and writing long vectors."""


@dataclass(frozen=True)
class Machine:
    """`memory` is what one process may use, in bytes; `measured` says whether `speed` was measured on it; `link` is
    how fast several of them exchange numbers, bytes/s in each direction."""

    name: str
    kind: str  # cpu or cuda
    memory: int
    speed: Speed
    measured: bool
    bf16: bool = True
    link: float = 1e9
    resident: int = 0  # bytes that this process holds, with the libraries that a run imports; 0 for another machine


@dataclass(frozen=True)
class DataSheet:
    """A card that is not here: dense tensor-core FLOP/s in bf16 (fp16 where it has no bf16), in fp32, bytes/s to its
    memory and to the next card."""

    memory_gb: float
    low: float
    fp32: float
    bytes_per_second: float
    link: float = PCIE
    bf16: bool = True

    def products(self, inputs: int, outputs: int, rows: int, precision: str) -> float:
        return UTILISATION * (self.fp32 if precision == "fp32" else self.low)

    def bandwidth(self) -> float:
        return 0.8 * self.bytes_per_second


CARDS = {  # makers' data sheets: TFLOP/s dense with fp32 accumulation, memory as the driver shows it in GiB,
    # NVLink where the card has it
    "t4-16g": DataSheet(15, 65e12, 8.1e12, 320e9, PCIE / 2, bf16=False),
    "v100-32g": DataSheet(32, 112e12, 14e12, 900e9, 150e9, bf16=False),
    "rtx3060-12g": DataSheet(12, 25e12, 12.7e12, 360e9),
    "rtx3090-24g": DataSheet(24, 71e12, 35.6e12, 936e9),
    "rtx4090-24g": DataSheet(24, 165e12, 82.6e12, 1008e9),
    "rtx5090-32g": DataSheet(32, 209e12, 105e12, 1792e9),
    "a10-24g": DataSheet(22.5, 125e12, 31.2e12, 600e9),
    "l4-24g": DataSheet(22.5, 121e12, 30.3e12, 300e9),
    "l40s-48g": DataSheet(45, 362e12, 91.6e12, 864e9),
    "a100-40g": DataSheet(39.5, 312e12, 19.5e12, 1555e9, 300e9),
    "a100-80g": DataSheet(79, 312e12, 19.5e12, 2039e9, 300e9),
    "h100-80g": DataSheet(79, 989e12, 67e12, 3350e9, 450e9),
    "h200": DataSheet(140, 989e12, 67e12, 4800e9, 450e9),
    "b200": DataSheet(179, 2250e12, 80e12, 8000e9, 900e9),
}


def machine(name: str | None = None) -> Machine:
    """The machine at hand (None), one of CARDS, or `cpu-24g`: this processor with another amount of memory."""
    if name is None:
        return here()
    if name in CARDS:
        card = CARDS[name]
        return Machine(name, "cuda", int(card.memory_gb * GIB), card, measured=False, bf16=card.bf16, link=card.link)
    size = name.removeprefix("cpu-").removesuffix("g")
    if name.startswith("cpu-") and name.endswith("g") and size.isdigit() and int(size):
        return Machine(name, "cpu", int(size) * GIB, Probe("cpu"), True, link=LOOPBACK, resident=resident())
    raise RequestError(
        f"there is no device called {name}",
        where="--device",
        hint=f"Known: cpu-24g (any number), {', '.join(CARDS)}; none for the machine at hand.",
    )


def here() -> Machine:
    """What this process would train on, and the memory that is free there now."""
    import torch

    from ..model.precision import best_device

    device = best_device()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        low = torch.cuda.is_bf16_supported(including_emulation=False)
        return Machine(
            torch.cuda.get_device_name(device), "cuda", free, Probe("cuda"), measured=True, bf16=low, link=PCIE
        )
    threads = torch.get_num_threads()
    name = f"this CPU ({threads} thread{'s' if threads > 1 else ''})"
    return Machine(name, "cpu", free_memory(), Probe("cpu"), True, link=LOOPBACK, resident=resident())


def free_memory() -> int:
    """Bytes that a process could still take without swapping, and what this process holds already, since a plan counts
    that as framework."""
    from ..model.memory import available_memory

    return available_memory() + resident()


def resident() -> int:
    """Bytes that this process holds in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def compiles_bf16() -> bool:
    """Whether this CPU has products in bf16 that are compiled for each size (oneDNN); others are computed by plain
    code, slowly."""
    import torch

    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Probe:
    """The speed of the machine at hand, measured in the sizes that are asked for and remembered in home()/speeds.json.

    A product is timed forward (x W^T) and back (g W), rows limited so that one takes at most some hundredths of a
    second; a linear layer of a model is the same call.
    """

    MOST = 6e9  # FLOPs of one timed product
    ROUNDS = 5

    def __init__(self, kind: str, *, measures: bool = True):
        """Without `measures` only what is remembered is known; the rest raises NotMeasured."""
        self.kind, self.measures = kind, measures

    def products(self, inputs: int, outputs: int, rows: int, precision: str) -> float:
        rows = max(64, min(rows, int(self.MOST / (4 * inputs * outputs)), 2048))
        rows = 1 << (rows.bit_length() - 1)  # powers of two: few enough to remember
        what = f"{precision} {inputs}x{outputs} rows {rows}"
        return self.remembered(what, lambda: _time_product(self.kind, inputs, outputs, rows, precision))

    def bandwidth(self) -> float:
        return self.remembered("bytes", lambda: _time_vectors(self.kind))

    def remembered(self, what: str, measure: Callable[[], Any]) -> Any:
        return remembered(self.kind, what, measure if self.measures else None)


class Unmeasured:
    """A speed for plans of memory alone: nothing takes any time."""

    def products(self, inputs: int, outputs: int, rows: int, precision: str) -> float:
        return math.inf

    def bandwidth(self) -> float:
        return math.inf


class NotMeasured(LookupError):
    """A speed that is not remembered and was not to be measured."""


BUSY = 0.25  # cores that others may use while something is measured; else it is not remembered


def remembered(kind: str, what: str, measure: Callable[[], Any] | None) -> Any:
    """What `measure` gave the first time on this machine while little else was running (JSON), from
    home()/speeds.json; without `measure` raises NotMeasured where nothing is there."""
    path, machine = home() / "speeds.json", _fingerprint(kind)
    known = read_json(path) if path.exists() else {}
    if what in known.get(machine, {}):
        return known[machine][what]
    if measure is None:
        raise NotMeasured(what)
    clock = Others()
    found = measure()
    if clock.cores() <= BUSY:
        known = read_json(path) if path.exists() else {}  # it may have taken a while, and measured others
        known.setdefault(machine, {})[what] = found
        write_json(path, known)
    return found


class Others:
    """How many cores other processes (and a host's other machines: steal) keep busy from now on."""

    def __init__(self) -> None:
        self._began = (time.time(), _all_seconds(), _own_seconds())

    def cores(self) -> float:
        began, everything, own = self._began
        return (_all_seconds() - everything - (_own_seconds() - own)) / max(1e-9, time.time() - began)


def _all_seconds() -> float:
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Of this process and its children, those that work and those that have ended (the one that renders templates)."""
    used, ticks = os.times(), 0
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            with suppress(OSError):  # it has ended meanwhile
                fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
    return used.user + used.system + used.children_user + used.children_system + ticks / os.sysconf("SC_CLK_TCK")


def _fingerprint(kind: str) -> str:
    """What the measured speeds belong to."""
    import torch

    if kind == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    from ..model.precision import onednn_multiplies

    by = ", oneDNN" if onednn_multiplies() else ""
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}{by}"


def processor() -> str:
    from ..model.precision import processor_says

    return processor_says("model name") or platform.processor() or platform.machine()


def _time_product(kind: str, inputs: int, outputs: int, rows: int, precision: str) -> float:
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    x = torch.randn(rows, inputs, device=kind).to(dtype)
    w = torch.randn(outputs, inputs, device=kind).to(dtype)

    def once() -> None:
        (x @ w.t()) @ w

    return 4 * inputs * outputs * rows / _best_seconds(once, kind)


def _time_vectors(kind: str) -> float:
    import torch

    x = torch.randn(4_000_000, device=kind)  # 16 MB: larger than a core's own cache, as activations are

    return 2 * 4 * x.numel() / _best_seconds(lambda: x.mul(1.0), kind)


def _best_seconds(once, kind: str) -> float:  # type: ignore[no-untyped-def]
    """The quickest of some rounds: what else runs on the machine only ever adds."""
    import torch

    taken = []
    for _ in range(Probe.ROUNDS + 1):
        start = time.perf_counter()
        once()
        if kind == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])
