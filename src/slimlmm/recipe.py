"""A run as validated settings: unknown keys refused, all errors at once, each with its YAML path."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Training(Settings):
    """One training: fine-tuning, or recovery by distillation."""

    steps: int = Field(gt=0, description="Number of optimizer steps.")
    pictures_per_step: int = Field(16, gt=0, description="Pictures in one optimizer step, over all devices' micro-batches.")
    questions_per_picture: int = Field(16, gt=0, description="Questions packed behind one picture.")
    accumulate: int = Field(1, gt=0, description="Micro-batches in one optimizer step.")
    learning_rate: float = Field(3e-4, gt=0, description="Peak learning rate of the language model and projector.")
    vision_rate: float = Field(1.0, ge=0, description="Learning rate of the top vision block, relative to learning_rate.")
    layer_decay: float = Field(0.9, gt=0, le=1, description="Factor on the learning rate per vision block towards the picture.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay of matrices.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps in [0, 1) with a rising learning rate.")
    schedule: str = Field("cosine", description="Learning-rate schedule of transformers (cosine, linear, constant_with_warmup ...).")
    clip: float = Field(1.0, gt=0, description="Gradient norm above which gradients are scaled down.")
    freeze: tuple[str, ...] = Field(
        ("patch_embedding",), description="Parts without gradient: vision, text, projector, patch_embedding."
    )
    losses: dict[str, float] = Field(
        default={"cross_entropy": 1.0, "forward_kl": 1.0, "pairwise_margin": 0.1}, description="Weight of each loss by name."
    )
    log_every: int = Field(20, gt=0, description="Optimizer steps between two log records.")
