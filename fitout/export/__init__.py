"""OUT OF THE HOUSE. What was trained, in the forms that other tools load.

Here: the verified merge, several adapters as one, model folders with tokenizer, template and card, and what each engine
needs (vLLM, llama.cpp, Ollama), checked beforehand and afterwards.
Not here: training checkpoints (train), serving (serve).
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Engine = Literal["transformers", "vllm", "ollama", "llamacpp"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
StoredAs = Literal["f32", "f16", "bf16", "q8_0"]
STORED_AS: tuple[StoredAs, ...] = get_args(StoredAs)
How = Literal["linear", "ties", "dare_linear", "dare_ties"]
HOWS: tuple[How, ...] = get_args(How)


class ExportSettings(BaseModel):
    """What `fitout run` leaves behind besides the adapter or model."""

    model_config = ConfigDict(extra="forbid")

    merge: bool = Field(True, description="fold the adapter into the base and check that the logits stay the same")
    merge_into: Literal["dequantised", "original"] = Field(
        "dequantised",
        description="of an adapter over a 4-bit base: into the weights it was trained over, de-quantised, or into the "
        "16-bit original, which is another base (the difference is measured)",
    )
