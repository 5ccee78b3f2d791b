"""EVALUATE: what a fine-tuned model gained and what it forgot, in numbers with intervals.

Here live the questions asked of the base and the tuned model (`suite`), the scores of their answers (`scores`), what
became of knowledge that was not trained (`retention`), and the page that shows it all (`report`). Not here: loading
models and generating text (`fitout.engine`), and deciding when to evaluate (`fitout.verbs`, `fitout.train`).

This door is free of torch and of the scorers; import `fitout.evaluate.suite` and its neighbours for the work.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Metric = Literal["exact_match", "f1", "rouge", "bleu", "accuracy"]
METRICS: tuple[Metric, ...] = ("exact_match", "f1", "rouge", "bleu", "accuracy")


class EvaluateSettings(BaseModel):
    """The `evaluate` part of a recipe."""

    model_config = ConfigDict(extra="forbid")

    metrics: list[Metric] = Field(
        default=["exact_match", "f1", "rouge", "bleu"],
        description="What to score; `rouge` gives ROUGE-1, -2 and -L, `accuracy` also macro-F1 over labels.",
    )
    max_new_tokens: int = Field(
        default=256, ge=1, description="Longest answer, in tokens; answers that reach it are counted."
    )
    limit: int | None = Field(
        default=None, ge=1, description="Evaluate at most this many rows of the test split, drawn by `seed`."
    )
    retention: str = Field(
        default="default",
        description="`default` (the probes that come with the base model), `off`, a .jsonl file of probes "
        "(prompt, answer, group), or a text file (perplexity).",
    )
    choices: list[str] | None = Field(
        default=None,
        description="The label set; the answer is then the label the model finds most likely, not free text.",
    )
    words: Literal["auto", "jieba"] = Field(
        default="auto", description="How ROUGE and F1 cut Chinese: `auto` by character, `jieba` by word."
    )
    batch_size: int = Field(default=16, ge=1, description="Conversations generated at once.")
    samples: int = Field(default=1000, ge=100, description="Bootstrap resamples behind every interval.")
    seed: int = Field(default=0, ge=0, description="Seeds the bootstrap and the draw of `limit` rows.")

    @field_validator("retention", mode="before")
    @classmethod
    def _yaml_switch(cls, value: object) -> object:
        """YAML 1.1 reads a bare `off` as false and `on` as true."""
        return {False: "off", True: "default"}[value] if isinstance(value, bool) else value

    @field_validator("retention")
    @classmethod
    def _retention_named(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must be `default`, `off` or a file")
        return value

    @field_validator("metrics")
    @classmethod
    def _each_once(cls, value: list[Metric]) -> list[Metric]:
        return list(dict.fromkeys(value))

    @field_validator("words")
    @classmethod
    def _jieba_is_here(cls, value: str) -> str:
        """Said before the training, not after it."""
        if value == "jieba" and find_spec("jieba") is None:
            raise ValueError("needs the jieba package: `pip install jieba`, or use `auto` (by character)")
        return value

    @field_validator("choices")
    @classmethod
    def _two_labels(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and (
            len(set(value)) < 2 or len(set(value)) != len(value) or not all(map(str.strip, value))
        ):
            raise ValueError("needs at least two different labels, none of them empty")
        return value

    @model_validator(mode="after")
    def _labels_are_classified(self) -> EvaluateSettings:
        """A label set without named metrics means classification; with named ones it adds accuracy to them."""
        if self.choices is not None and "accuracy" not in self.metrics:
            self.metrics = ["accuracy", *(self.metrics if "metrics" in self.model_fields_set else [])]
        return self
