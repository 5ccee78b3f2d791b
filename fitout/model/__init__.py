"""WEIGHTS. A base model becomes one with something to train.

Here: loading, packed attention, faster equal forms of what transformers computes, the fine-tuning methods, precision.
Not here: what is minimised (objectives), when weights change (train), how they are judged (evaluate).
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

EMBEDDED = "embedded:shell"


class ModelSettings(BaseModel):
    """Which base model, and what to go on from."""

    model_config = ConfigDict(extra="forbid")

    base: str = Field(EMBEDDED, description="a folder, a hub id (owner/name), or `embedded:shell`, the one in the box")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    adapter: str | None = Field(None, description="a run or adapter folder to go on from")
    trust_remote_code: bool = Field(False, description="run Python code that the model's repository brings")
