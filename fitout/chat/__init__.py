"""TALK. Messages to token ids and back; the same function for training, evaluation, chat and serving.

Here: what a message is, tokenizers, chat templates and their self-checks, the token view.
Not here: where rows come from (data), what is done with the ids (model, objectives).
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

BUNDLED = ("plain", "chatml", "llama3")


class ChatSettings(BaseModel):
    """How messages are spelled."""

    model_config = ConfigDict(extra="forbid")

    template: str = Field(
        "auto", description="auto (the tokenizer's own, else plain), plain, chatml, llama3, or a .jinja file"
    )
    add_tokens: bool = Field(
        False, description="add the template's role tokens to the tokenizer and train their embeddings"
    )
    template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="passed to the template every time, e.g. {enable_thinking: false}"
    )
