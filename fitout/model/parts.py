"""The parts that a step's time is divided into, and the marks by which a profiler finds them."""

from __future__ import annotations

from torch.profiler import record_function

DATA, ATTENTION, LINEARS, HEAD, OPTIMIZER = "data", "attention", "linears", "head and loss", "optimizer"
OTHER = "other operations"  # norms, activations, embeddings, copies, sums
HOST = "host"  # no operation runs: Python between two of them; on a GPU also waiting
PARTS = (LINEARS, ATTENTION, HEAD, OTHER, OPTIMIZER, DATA, HOST)
MARK = "fitout: "


def part(name: str) -> record_function:
    """Marks a block as one of the parts; some microseconds where no profiler listens."""
    return record_function(MARK + name)
