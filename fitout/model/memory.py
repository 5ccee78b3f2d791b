"""Memory that ran out: how it shows, what can be given back, and what can be computed again instead of kept."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
from pathlib import Path
from typing import Any

import torch

from . import blocks

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
    else:
        blocks.let_go()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def available_memory() -> int:
    """Bytes that a process could still take without swapping: the kernel's estimate, or less where a control group
    that it is in says so (version 2), what files take there and would give back not counted."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for group in _control_groups():
        limit = group / "memory.max"
        if limit.exists() and (most := limit.read_text().strip()) != "max":
            files = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(files["inactive_file"])
            available = min(available, int(most) - used)
    return available


def _control_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """The control group of this process and those around it, in version 2; inside a container the root is its own."""
    names = [line.removeprefix("0::/") for line in own.read_text().splitlines() if line.startswith("0::/")]
    inner = root / names[0] if names else root
    return [group for group in (inner, *inner.parents) if group == root or root in group.parents]


def recompute_activations(model: Any, share: float = 1.0) -> float:
    """What layers compute is not kept for the backward pass but computed again in it (Chen et al., arXiv 1604.06174):
    in `share` of those that the backward pass goes through, from the lowest up. When it comes to these, what the layers
    above kept is free already. Returns the share of all layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    enable = getattr(model, "activation_checkpointing_enable", None)  # its name in later versions of transformers 5
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.disable_input_require_grads()  # else the backward pass would go down through layers that nothing asks it to
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        return 1.0  # an older form, which knows all or nothing
    gradients = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    embedding = model.get_input_embeddings().weight.requires_grad
    lowest = 0 if embedding else next((at for at, own in enumerate(gradients) if own), len(layers))
    last = lowest + math.ceil(share * (len(layers) - lowest))
    for layer in layers[last:]:
        layer.gradient_checkpointing = False
    return (last - lowest) / len(layers)
