"""Settings of the optimizer and its schedule."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from alignlab.config.data import Settings
from alignlab.config.limits import BATCH, at_most


class AdamWConfig(Settings):
    """AdamW and its schedule."""

    lr: Annotated[
        float, Field(gt=0), at_most(1.0, "AdamW moves every weight by about lr a step")
    ] = 5e-5
    """Peak learning rate. 5e-5 is RefAlign's stage 1."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's moments. RefAlign's."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay. RefAlign's."""
    grad_clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient; `null` clips nothing. 1.0 is REPA's, null RefAlign's."""
    batch_size: Annotated[int, Field(ge=1), at_most(*BATCH)] = 1
    """Samples per step, all ranks and micro-batches together."""
    warmup: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: kept, or brought to 0 at the last step."""
    resume_schedule: Literal["keep", "stretch"] | None = None
    """What becomes of schedules that depend on `steps` when a run is prolonged, by its recipe with
    more `steps`: `stretch`, from there on as in a run of that many steps; `keep`, as planned for
    the old number, and after that their last value. Left out: such a run is not prolonged. Nothing
    else reads it."""

    @field_validator("betas")
    @classmethod
    def _decay_rates(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{list(betas)} must both be at least 0 and below 1")
        return betas


class OptimConfig(AdamWConfig):
    """AdamW, its schedule, and what a run does around it."""

    accumulate: int = Field(default=1, ge=1)
    """Micro-batches that a step's samples are spread over to save memory; divides `batch_size`."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, used for evaluation and export."""

    @field_validator("accumulate")
    @classmethod
    def _divides_batch(cls, accumulate: int, info: ValidationInfo) -> int:
        batch_size = info.data.get("batch_size")
        if batch_size is not None and batch_size % accumulate:
            raise ValueError(f"{accumulate} does not divide optim.batch_size {batch_size}")
        return accumulate
