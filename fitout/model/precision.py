"""Which numbers to compute with, by which library and with how many threads: decided by the device, and on a CPU by the
model's width and a short measurement."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..errors import RequestError

NARROW = 384  # measured: below, bf16 was slower in whole steps though faster in products (width 192: 0.45 times)
PAYS = 1.3
ONE_THREAD = 256  # measured up to here: two threads no faster than one alone, and beside other work 8 times slower
EXACT = 1e-5  # of the largest number; factors rounded to bf16 would be 2e-3 off
KERNELS = 64  # that oneDNN keeps, half a MB each: it compiles one for each size of a product, some 20 a micro-batch's
for _each in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # its own, and PyTorch's above it; both 1,024
    os.environ.setdefault(_each, str(KERNELS))  # read once, with the first product
_threads: list[int] = []  # what torch began with


@dataclass(frozen=True)
class Precision:
    """`kind` is fp32, bf16 or fp16; `why` is one line for people."""

    kind: str
    why: str


def best_device() -> torch.device:
    """CUDA (this process's card under torchrun), else CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def decide(asked: str, device: torch.device, *, width: int = 512) -> Precision:
    """The precision to use. `auto`: bf16 on CUDA cards that have it; on a CPU where the model's hidden `width` is at
    least NARROW and a probe shows a layer of that width at least PAYS times as fast; otherwise fp32. fp16 is refused on
    a CPU (it is hundreds of times slower)."""
    if asked == "fp16" and device.type == "cpu":
        raise RequestError(
            "fp16 on a CPU is emulated and hundreds of times slower",
            where="train.precision",
            hint="Use auto, fp32 or bf16.",
        )
    if asked != "auto":
        return Precision(asked, "as the recipe says")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", "this card has bf16")
        return Precision("fp16", "this card has no bf16; loss scaling is on")
    if width < NARROW:
        return Precision("fp32", f"a model {width} wide spends its time elsewhere than in products that bf16 speeds up")
    ratio = _bf16_gain(width)
    if ratio >= PAYS:
        return Precision("bf16", f"a linear layer runs {ratio:.1f} times as fast in bf16 as in fp32 here")
    return Precision("fp32", f"bf16 does not pay here ({ratio:.1f} times fp32 in a linear layer)")


def has_amx() -> bool:
    """Whether this CPU multiplies tiles of bf16 numbers in hardware (Intel's AMX)."""
    return "amx_bf16" in instructions()


@cache
def instructions() -> frozenset[str]:
    """What the first core says that it has; nothing where the system does not tell."""
    return frozenset((processor_says("flags") or processor_says("Features")).split())


@cache
def processor_says(what: str) -> str:
    """What the first core has under a name in /proc/cpuinfo; nothing where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(what)), "")


@contextmanager
def faster_products(device: torch.device) -> Iterator[None]:
    """Has oneDNN multiply fp32 while the block runs where MKL, which PyTorch asks on x86, leaves half of the processor
    idle: on AMD's with AVX-512, which it drives as if they had AVX2. One row at a time, as in generating, MKL is
    faster.

    PyTorch hands fp32 products to oneDNN when it may round their factors to bf16, which oneDNN does where there is AMX;
    so not there, and not where a product shows that it did.
    """
    there = device.type == "cpu" and _mkl_is_slow() and not onednn_multiplies()
    with _fp32_products("bf16") if there and _onednn_is_exact() else nullcontext():
        yield


def onednn_multiplies() -> bool:
    """Whether products of fp32 go to oneDNN now, which compiles them for each shape."""
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    return setting is not None and setting.fp32_precision == "bf16"


@contextmanager
def any_size() -> Iterator[None]:
    """Has PyTorch's choice multiply in the block what oneDNN multiplies around it: products whose sizes do not come
    again, such as one document's scores, for each of which it would compile a kernel."""
    with _fp32_products("ieee") if onednn_multiplies() else nullcontext():
        yield


@contextmanager
def _fp32_products(how: str) -> Iterator[None]:
    """`bf16`: by oneDNN; `ieee`: by PyTorch's choice."""
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = how
    try:
        yield
    finally:
        setting.fp32_precision = before


def _onednn_is_exact() -> bool:
    a, b = torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double()
    with _fp32_products("bf16"):
        return float((a @ b - exact).abs().max() / exact.abs().max()) <= EXACT


def _mkl_is_slow() -> bool:
    there = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    known = hasattr(torch.backends.mkldnn, "matmul")  # since PyTorch 2.9
    wide = processor_says("vendor_id") == "AuthenticAMD" and "avx512f" in instructions()
    return there and known and wide and not has_amx()


def use_threads(width: int, device: torch.device) -> str | None:
    """Computes a model of hidden `width` up to ONE_THREAD with one thread on a CPU, unless OMP_NUM_THREADS says how
    many, and wider ones with all; returns one line for people when it is one. Which it is depends on the model alone,
    so that a resumed run adds up in the same order."""
    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return None
    if not _threads:
        _threads.append(torch.get_num_threads())
    torch.set_num_threads(1 if width <= ONE_THREAD else _threads[0])
    if torch.get_num_threads() == _threads[0]:
        return None
    return f"one thread of {_threads[0]}: a model {width} wide gains nothing from more (OMP_NUM_THREADS overrules)"


def _bf16_gain(width: int, rows: int = 1024, rounds: int = 7) -> float:
    """How many times as fast bf16 is as fp32 in a layer of `width` and back; medians of rounds taken in turn."""
    kinds = (torch.float32, torch.bfloat16)
    xs = {kind: torch.randn(rows, width).to(kind) for kind in kinds}
    ws = {kind: torch.randn(width, 3 * width).to(kind) for kind in kinds}
    seconds: dict[torch.dtype, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            start = time.perf_counter()
            (xs[kind] @ ws[kind]) @ ws[kind].t()
            seconds[kind].append(time.perf_counter() - start)
    fp32, bf16 = (sorted(seconds[kind])[rounds // 2] for kind in kinds)
    return fp32 / bf16
