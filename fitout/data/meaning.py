"""Rows that mean the same, by the vectors of an encoder that the recipe names. The only stage that needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import DataError
from . import MeaningSettings

BATCH = 64
LONGEST = 256  # tokens of a text that are read
BLOCK = 2048  # rows compared with all others at once


def alike(texts: Sequence[str], settings: MeaningSettings, numbers: np.ndarray) -> list[tuple[int, int, float]]:
    """(number, number, cosine) of all pairs from the set similarity on; `numbers` (n,) name the texts."""
    vectors = encode(texts, settings.model)
    found = []
    for start in range(0, len(vectors), BLOCK):
        cosines = vectors[start : start + BLOCK] @ vectors.T
        for one, other in np.argwhere(cosines >= settings.similarity):
            if start + one < other:
                pair = int(numbers[start + one]), int(numbers[other])
                found.append((*pair, min(1.0, float(cosines[one, other]))))
    return found


def encode(texts: Sequence[str], folder: str) -> np.ndarray:
    """(n, width) float32 of length 1: the mean of the last hidden states over each text's tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"the encoder cannot be loaded: {str(error).splitlines()[0]}",
            where=folder,
            harm="Duplicates by meaning cannot be looked for.",
            hint="data.deduplicate.meaning.model is a folder or hub id of a transformers encoder.",
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    longest = min(LONGEST, getattr(model.config, "max_position_embeddings", None) or LONGEST)
    vectors = []
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            some = [texts[at] or " " for at in order[start : start + BATCH]]
            read = tokenizer(some, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(device)
            hidden = model(**read).last_hidden_state
            mask = read["attention_mask"].unsqueeze(-1)
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            vectors.append(torch.nn.functional.normalize(mean, dim=-1).cpu().numpy())
    result = np.concatenate(vectors)
    back = np.empty_like(result)
    back[order] = result
    return back
