"""Memory of large tensors on a CPU in blocks that are used again (cpp/blocks.cpp), in place of the C library's heap.

Steps of a training have micro-batches of different sizes, and the heap that glibc makes of their activations has holes
(docs/speed.md). Compiled with the headers that come with PyTorch, for the PyTorch that
is installed; where that cannot be done, `why_not` says so and PyTorch's own allocator stays.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from ..errors import FitoutError
from . import library

FLAGS = ("-std=c++20", "-O2", "-fPIC", "-w")


@contextmanager
def reused(device: torch.device) -> Iterator[None]:
    """Until the block ends, large tensors on a CPU have memory that is used again; on another device nothing changes.
    Inside another such block it is that one's."""
    ours = device.type == "cpu" and why_not() is None and bool(_library().blocks_on())
    try:
        yield
    finally:
        if ours:
            _library().blocks_off()


def let_go() -> None:
    """Returns what no tensor has to the system, where a training has had blocks."""
    if _library.cache_info().currsize:
        _library().blocks_let_go()


def held() -> tuple[int, int, int]:
    """Bytes of all blocks, of those that tensors have, and of those that tensors had at once at most."""
    found = (ctypes.c_int64 * 3)()
    _library().blocks_bytes(found)
    return found[0], found[1], found[2]


@cache
def why_not() -> str | None:
    """Why PyTorch's own allocator is used on this machine, or None."""
    try:
        return _tried()
    except (library.Missing, FitoutError, OSError, RuntimeError) as error:
        return str(error)


@cache
def _library() -> ctypes.CDLL:
    """Raises library.Missing."""
    if platform.system() != "Linux":
        raise library.Missing("it is written for Linux")
    if not torch._C._GLIBCXX_USE_CXX11_ABI:
        raise library.Missing("this PyTorch was built for another C++ library")
    own = Path(torch.__file__).parent
    flags, linked = (*FLAGS, f"-I{own / 'include'}"), (f"-L{own / 'lib'}", "-lc10")
    return library.load(["blocks.cpp"], flags, linked, torch.__version__)


def _tried() -> str | None:
    """What is not as it should be with a few tensors."""
    before = held()[1]
    if not _library().blocks_on():
        return None  # in use
    count = 1 << 18  # numbers, in more bytes than any tensor from the heap has
    try:
        first = torch.arange(count, dtype=torch.int32, device="cpu")
        place, full = first.data_ptr(), int(first.sum(dtype=torch.int64)) == count * (count - 1) // 2
        mine = held()[1] - before
        del first
        again = torch.ones(count, dtype=torch.int32, device="cpu")
        same = again.data_ptr() == place and int(again.sum()) == count
        del again
        return None if full and same and mine == 4 * count else "it does not hold what it should"
    finally:
        _library().blocks_off()
