"""Settings of the optimizer and its schedule."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from alignlab.config.data import Settings
from alignlab.config.identity import SAME_NUMBERS
from alignlab.config.limits import BATCH, at_most

OptimizerName = Literal["adamw", "adamw_8bit", "adamw_bf16_kahan"]
WeightsType = Literal["fp32", "bf16"]

BLOCK_8BIT = 256
"""Numbers of a moment that share a scale in `adamw_8bit`: bitsandbytes' block."""
BYTES_PER_PARAMETER: dict[tuple[OptimizerName, WeightsType], float] = {
    ("adamw", "fp32"): 4 + 4,  # two moments in fp32
    ("adamw_8bit", "fp32"): 1 + 1 + 2 * 4 / BLOCK_8BIT,  # and an fp32 scale of each block
    ("adamw_bf16_kahan", "bf16"): 2 + 4 + 2,  # moments in bf16 and fp32, rest of the weight in bf16
}
"""Bytes of optimizer state for each trained weight, by `optim.name` and `model.weights`; pairs that
are not here are refused (`alignlab.config.run`). Weights that `model.weights: bf16` leaves in fp32
(norms and modulation, projectors) take as much as with `adamw`, and so do tensors of fewer than
4096 numbers with `adamw_8bit`."""


def check_optimizer_weights(name: OptimizerName, weights: WeightsType) -> None:
    """Refuses an optimizer that does not suit what weights are kept in.

    A step of AdamW moves a weight by about the learning rate. bf16 has 8 bits: of a weight of 0.02
    a step below 6e-5 is lost whole, so that with the learning rates of fine-tuning most weights
    would never move, and a comparison would be one of rounding.

    Raises:
        ValueError: one line.
    """
    if (name, weights) in BYTES_PER_PARAMETER:
        return
    if weights == "bf16":
        raise ValueError(
            f"model.weights: bf16 loses the steps of {name}, which are smaller than its rounding; "
            "set optim.name: adamw_bf16_kahan"
        )
    raise ValueError(
        f"optim.name: {name} has nothing to keep beside fp32 weights; set model.weights: bf16, or "
        "take adamw or adamw_8bit"
    )


class AdamWConfig(Settings):
    """AdamW and its schedule."""

    name: OptimizerName = "adamw"
    """How AdamW keeps its state. `adamw`: two fp32 moments, 8 bytes for each trained weight.
    `adamw_8bit`: both in 8 bits, 2 bytes (bitsandbytes; Dettmers et al. 2021), which needs the
    extra `bitsandbytes`. `adamw_bf16_kahan`: for `model.weights: bf16`, with what rounding cuts off
    each weight kept beside it, 8 bytes with the moments."""
    offload: bool = Field(default=False, json_schema_extra={SAME_NUMBERS: [True]})
    """Keep the optimizer's state in the host's memory, and bring that of one weight tensor after
    another to the GPU in each step. Changes no number; takes the time of copying the state there
    and back. Refused without a GPU."""
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
