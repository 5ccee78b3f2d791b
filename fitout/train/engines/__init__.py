"""Engines that divide a model over ranks, one file each: torch's FSDP2 and DeepSpeed's ZeRO; and how one is asked for.

backend.py beside this room is what they derive from, and what runs where nothing is divided.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..backend import Backend
    from .asked import Asked


def open_backend(wanted: Asked, device: Any) -> Backend:
    """The backend of a kind; `auto` must have been decided before. Raises RequestError where DeepSpeed is missing."""
    if wanted.kind == "fsdp":
        from .fsdp import Fsdp

        return Fsdp(device, offload=wanted.offload, reshard=wanted.reshard)
    if wanted.kind.startswith("zero"):
        from .zero import Zero

        return Zero(device, stage=int(wanted.kind[-1]), offload=wanted.offload, settings=wanted.deepspeed)
    from ..backend import Backend

    return Backend(device)
