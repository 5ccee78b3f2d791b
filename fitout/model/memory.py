"""Memory that ran out: how it shows, what can be given back, and what can be computed again instead of kept."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from typing import Any

import torch

# What a RuntimeError says when memory ran out. Errors of these kinds leave the process as it was before the call.
SIGNS = (
    "can't allocate memory",  # torch's allocator on a CPU
    "not enough memory",  # the same on other systems
    "out of memory",  # CUDA, HIP, XPU, MPS, outside torch's own allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
    "could not create a memory object",  # oneDNN
    "bad allocation",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def give_back(device: torch.device) -> None:
    """Returns what nobody uses any more to the system, so that what comes next has it; on a CPU, too, where glibc keeps
    what is freed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def recompute_activations(model: Any) -> None:
    """What a layer computes is not kept for the backward pass but computed again in it."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name in later versions of transformers 5
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
