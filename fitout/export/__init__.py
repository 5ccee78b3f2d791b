"""OUT OF THE HOUSE. What was trained, in the forms that other tools load.

Here: the verified merge, writing model folders with tokenizer, template and card.
Not here: training checkpoints (train), serving (serve).
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ExportSettings(BaseModel):
    """What `fitout run` leaves behind besides the adapter or model."""

    model_config = ConfigDict(extra="forbid")

    merge: bool = Field(True, description="fold the adapter into the base and check that the logits stay the same")
