"""Settings of the model that is trained, and of its adapters."""

import re
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from alignlab.config.data import Settings
from alignlab.config.identity import SAME_NUMBERS
from alignlab.config.limits import at_most
from alignlab.config.optim import WeightsType
from alignlab.errors import shown

Init = Literal["trained", "random"]
TextEncoderPlace = Literal["auto", "keep", "cpu"]
Expert = Literal["high", "low"]
Shard = Literal["none", "fsdp2"]

_BOOL = TypeAdapter(bool)
_EVERY = re.compile(r"every:(\d{1,4})")


def blocks_apart(mode: bool | str) -> int | None:
    """k of `every:k`; None of another mode of gradient checkpointing."""
    found = _EVERY.fullmatch(mode) if isinstance(mode, str) else None
    return None if found is None else int(found[1])


def _checkpointing(value: Any) -> Any:
    apart = blocks_apart(value)
    if value == "full":
        return True
    if value == "ops" or (apart is not None and apart >= 2):
        return value if apart is None else f"every:{apart}"
    try:
        return _BOOL.validate_python(value)
    except ValidationError:
        raise ValueError(
            f"expected true or false, full, ops, or every:k with k of 2 or more, got {shown(value)}"
        ) from None


GradientCheckpointing: TypeAlias = Annotated[bool | str, BeforeValidator(_checkpointing)]
"""False, True, `ops` or `every:k`; `full` is read as True."""


class LoraConfig(Settings):
    """Low-rank adapters instead of full fine-tuning."""

    rank: Annotated[int, Field(ge=1), at_most(4096, "that is no low rank")] = 32
    """Rank of the adapters."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale; the update is multiplied by alpha / rank. Equal to `rank`: no scaling."""
    targets: tuple[str, ...] = Field(default=("to_q", "to_k", "to_v", "to_out.0"), min_length=1)
    """Names of the adapted linear layers. The attention projections, as in diffusers' examples."""


class ModelConfig(Settings):
    """The video diffusion transformer and how it is trained."""

    path: str
    """A diffusers Wan pipeline folder, an asset shipped with alignlab, or a hub id."""
    expert: Expert | None = None
    """Of a pipeline with two transformers (Wan 2.2 A14B) the one that is trained: `high`, whose
    timesteps begin at `boundary_ratio` of its model_index.json, or `low`, below. No other noise
    level is drawn or validated; clips are generated with both."""
    init: Init = "trained"
    """`trained`: the transformer starts with the weights of `path`. `random`: with diffusers'
    initial weights in the architecture of `path`, whose own weights are not read; they depend on
    `seed` alone, so that the variants of a comparison start from equal ones."""
    init_from: str | None = None
    """A finished run, or a checkpoint of a run (`.../checkpoints/step-000500`, or the copy of
    weights `weights-000500`), whose last weights this one starts from, with the projectors of
    objectives that fit, as RefAlign's second stage does. Step, optimizer and moving average begin
    anew. Left out: `path` as it is."""
    train: Literal["full", "lora"] = "full"
    """Train all weights (RefAlign) or low-rank adapters."""
    lora: LoraConfig | None = None
    """Only with `train: lora`; left out, its defaults hold."""
    attention: str = "native"
    """A diffusers attention backend. `native` is torch's scaled_dot_product_attention. Any other is
    tried in a Wan block before training; `alignlab doctor` lists those that train here."""
    gradient_checkpointing: GradientCheckpointing = False
    """Recompute activations in the backward pass. `true` or `full`: of every block, least memory,
    about a third slower. `every:k`: of blocks 0, k, 2k, ... alone. `ops`: of every block all but
    the outputs of matmuls and attention, which are kept."""
    compile: Literal["none", "blocks"] = "none"
    """`blocks`: torch.compile of every transformer block, one code for all of them and for any
    number of references. The first steps and the first evaluation take minutes more. Not with
    `haste_attention`. The other of two experts, which clips are generated with, is not compiled."""
    shard: Shard = "none"
    """What each of several ranks (torchrun) holds of the transformer. `none`: all of it. `fsdp2`: a
    part of each weight, of its gradient and of the optimizer's state (torch's `fully_shard`); the
    ranks gather a block while it computes. A single process holds all of it."""
    replicate: Annotated[int, Field(ge=1), at_most(65536, "no run has that many nodes")] = 1
    """With `shard: fsdp2`, how many replicas of the transformer the ranks hold (HSDP): M replicas,
    each shared by an Mth of the ranks, exchange gradients once a step. As many as there are nodes:
    blocks are then gathered within a node. 1: all ranks share one. A single process holds all."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute precision. Weights and optimizer state stay fp32 when all weights are trained, unless
    `weights` and `optim.name` say otherwise."""
    weights: WeightsType = "fp32"
    """What trained weights are kept in. `bf16`, with `train: full`, `precision: bf16` and
    `optim.name: adamw_bf16_kahan` only: weights and gradients take half as much; norms, modulation
    and the timestep's embedding stay fp32, as diffusers keeps them. Gradients of micro-batches are
    added up in bf16 as well, which puts that of `optim.accumulate: 128` about 1 % off. Adapters and
    projectors are always fp32; weights that a LoRA freezes are in `precision`."""
    text_encoder: TextEncoderPlace = Field(
        default="auto", json_schema_extra={SAME_NUMBERS: ["keep"]}
    )
    """Where the text encoder is. `auto`: on the device until the texts that the run reads are in
    the dataset cache, then nowhere; without a cache of texts, on the device. `keep`: on the device
    once it is loaded. `cpu`: as `auto`, but on the CPU, whose embeddings have other last bits than
    a GPU's: it is part of what a run is."""
    text_to_references: bool = False
    """Let reference tokens attend to the text. RefAlign's code does not."""
    absent_references: Literal["none", "zero"] = "none"
    """What stands where references are absent or dropped: nothing, or (`zero`, RefAlign's code)
    latents of zeros: one frame, and where guidance leaves references out one for each of them."""
    reference_timestep: Literal["video", "zero"] = "video"
    """Timestep of reference tokens, which are clean: the video's (RefAlign), or `zero`. With that
    each token has its own, and modulation takes as much memory for each as for a sample else."""

    @model_validator(mode="before")
    @classmethod
    def _default_lora(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("train") == "lora" and not values.get("lora"):
            return {**values, "lora": {}}
        return values

    @model_validator(mode="after")
    def _random_weights_are_trained(self) -> Self:
        if self.init == "random" and self.train == "lora":
            raise ValueError(
                "random weights need train: full, since a LoRA leaves them as they are; set it, or "
                "remove init: random"
            )
        if self.init == "random" and self.init_from is not None:
            raise ValueError(
                "init_from would replace the weights that init: random draws; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _replicas_are_in_shards(self) -> Self:
        if self.replicate > 1 and self.shard == "none":
            raise ValueError(
                f"replicate: {self.replicate} needs shard: fsdp2, since with shard: none every "
                "rank holds all of it; set it, or remove replicate"
            )
        return self

    @model_validator(mode="after")
    def _bf16_weights_are_trained(self) -> Self:
        if self.weights == "fp32":
            return self
        if self.train == "lora":
            raise ValueError(
                "weights: bf16 is for train: full; a LoRA is trained in fp32, and what it freezes "
                "is in `precision`: remove it"
            )
        if self.precision != "bf16":
            raise ValueError("weights: bf16 is computed with in bf16; set precision: bf16")
        return self

    @field_validator("lora")
    @classmethod
    def _lora_is_read(cls, value: LoraConfig | None, info: ValidationInfo) -> LoraConfig | None:
        if value is not None and info.data.get("train") == "full":
            raise ValueError("nothing reads it with train: full; remove it or set train: lora")
        return value
