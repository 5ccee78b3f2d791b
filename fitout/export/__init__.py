"""OUT OF THE HOUSE. What was trained, in the forms that other tools load.

Here: the verified merge, writing model folders with tokenizer, template and card.
Not here: training checkpoints (train), serving (serve).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ExportSettings(BaseModel):
    """What `fitout run` leaves behind besides the adapter or model."""

    model_config = ConfigDict(extra="forbid")

    merge: bool = Field(True, description="fold the adapter into the base and check that the logits stay the same")
    merge_into: Literal["dequantised", "original"] = Field(
        "dequantised",
        description="of an adapter over a 4-bit base: into the weights it was trained over, de-quantised, or into the "
        "16-bit original, which is another base (the difference is measured)",
    )
