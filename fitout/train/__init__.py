"""THE LOOP. From a trainable model, an objective and batches to trained weights, with checkpoints that resume exactly.

Here: the loop, one step, optimizer and schedule, processes, checkpoints, guards, listeners.
Not here: which samples make a step (data.batches), what the loss is (objectives), what is trained (model.methods).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PARALLEL = ("auto", "ddp", "fsdp", "zero1", "zero2", "zero3")
# Tokens a micro-batch begins with where the recipe says `auto`. On a CPU 1536 is 2 % faster than 1024 and as fast as
# 2048, which takes 300 MB more (30 M parameters, 512 wide, 2 cores).
FIRST_BUDGET = {"cpu": 1536, "cuda": 16384}
RECOMPUTED = (0.25, 0.5, 0.75, 1.0)  # shares of the layers whose activations are recomputed when memory runs out

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainSettings(BaseModel):
    """How long, how fast, in which numbers, and what is kept."""

    model_config = ConfigDict(extra="forbid")

    epochs: float = Field(3, gt=0, description="passes over the training part")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; takes the place of epochs")
    lr: float | None = Field(None, gt=0, description="peak learning rate; the default is the method's own")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.03, ge=0, description="below 1 a share of all steps, else a number of steps")
    batch_size: int = Field(16, ge=1, description="examples a step, over all ranks")
    batch_tokens: int | None = Field(None, ge=1, description="examples in order up to so many tokens a step, instead")
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="tokens a forward; auto: 1536 on CPU, 16384 on a GPU, halved when memory runs out"
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw", description="8bit: moments in 8 bits (bitsandbytes); paged: moved to main memory when a GPU's is full"
    )
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null for none")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool | Literal["auto"] | Annotated[float, Field(gt=0, lt=1)] = Field(
        "auto",
        description="recompute activations to save memory: true in all layers, 0.25 in a quarter of them; auto: only "
        "when memory runs out, in a quarter, half, three quarters, all",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile of what lies between matrix products (norms, rotations, activations, the loss); "
        "auto: on a GPU, for a training of more than ten minutes",
    )
    on_nonfinite: Literal["skip", "stop"] = Field(
        "skip", description="a step with NaN or Inf: skip it (ten in a row end the run), or stop at the first"
    )
    seed: int = Field(0, ge=0, lt=2**63)
    save_every: int = Field(200, ge=1, description="steps between checkpoints")
    keep_last: int = Field(2, ge=1, description="checkpoints kept besides the best")
    evaluate_every: int | None = Field(None, ge=1, description="steps between validations; default once an epoch")
    keep: Literal["best", "last"] = Field("best", description="which weights the run ends with (best: by validation)")
    patience: int | None = Field(None, ge=1, description="stop after so many validations without improvement")
    parallel: str = Field(
        "auto",
        description="how ranks share the work: auto, ddp (each holds all), fsdp, zero1, zero2, zero3, or a DeepSpeed "
        "JSON or accelerate YAML file",
    )
    offload: bool = Field(
        False, description="fsdp: parameters and optimizer, zero: the optimizer in main memory; slower, and more fits"
    )
    hang_after: float = Field(1800, ge=1, description="seconds without a forward until a process is taken as hung")
    listeners: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]

    @property
    def recompute(self) -> float:
        """Share of the layers whose activations are recomputed from the first step on."""
        return 0.0 if self.gradient_checkpointing == "auto" else float(self.gradient_checkpointing)

    @field_validator("parallel")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in PARALLEL and not value.endswith((".json", ".yaml", ".yml")):
            raise ValueError(f"{value!r} is not one of {', '.join(PARALLEL)}, nor a .json or .yaml file")
        return value

    @model_validator(mode="after")
    def _offload_has_an_engine(self) -> Self:
        if self.offload and self.parallel in ("auto", "ddp"):
            raise ValueError("offload needs parallel: fsdp, zero1, zero2 or zero3 (also with one process)")
        return self

    @model_validator(mode="after")
    def _warmup_makes_sense(self) -> Self:
        if self.warmup >= 1 and self.warmup % 1:
            raise ValueError("warmup is a share below 1 or a whole number of steps")
        return self
