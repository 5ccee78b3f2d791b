"""Rotary positions that depend on how long a document is."""

from __future__ import annotations

from typing import Any


def switch(config: Any) -> int | None:
    """Tokens up to which a document's positions are turned by one set of factors, and beyond which all of them, the
    first ones too, by another; None where its length does not matter.

    So LongRoPE does (Ding et al., arXiv 2402.13753), which Phi-3 and Phi-4 mini use beyond 4,096 tokens. transformers
    goes by the largest position of a forward: documents that share one, and keys that were kept, must agree.
    """
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    each = [rope, *(one for one in rope.values() if isinstance(one, dict))]  # one for all layers, or one for each kind
    return min(
        (one["original_max_position_embeddings"] for one in each if one.get("rope_type") == "longrope"), default=None
    )
