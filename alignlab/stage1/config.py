"""Settings of a Stage 1 training, as frozen pydantic models."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from alignlab.config.data import SIZE_STEP, Settings
from alignlab.config.parts import AdamWConfig, TeacherConfig, TrainingConfig
from alignlab.config.run import MIN_VIDEO_FRAMES
from alignlab.data.registry import DataConfig
from alignlab.teachers import TEACHERS


class TextModelConfig(Settings):
    """The model whose text encoder embeds the phrases."""

    path: str
    """The Wan folder, asset or hub id of Stage 2; only its text encoder is loaded."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the text encoder; Stage 2's `model.precision`."""


class NetworkSettings(Settings):
    """What both kinds of Stage 1 have."""

    val_clips: int = Field(default=32, ge=1)
    """Val clips that are measured at the end, taken from the start of the split."""


class SaraStage1(NetworkSettings):
    """SARA's saliency aligner (losses/stage1/saliency_aligner.py)."""

    kind: Literal["sara"]
    depth_cross: int = Field(default=2, ge=1)
    """Blocks in which visual tokens attend to the text. SARA's."""
    depth_self: int = Field(default=4, ge=0)
    """Blocks in which visual tokens attend to each other. SARA's."""
    heads: int = Field(default=8, ge=1)
    """Attention heads; divides the teacher's width. SARA's."""
    hidden: int = Field(default=512, ge=1)
    """Hidden width of the saliency head. SARA's."""
    embed_dim: int = Field(default=512, ge=1)
    """Width of the space in which clips and texts are compared. Ours."""
    attention: Literal["clip", "frame"] = "clip"
    """What self-attention sees: the tokens of the clip, or of one frame (T times cheaper)."""
    background: str | None = "background"
    """Text whose target is everything outside the entities; null: no such forward. Ours: SARA has
    a caption of the scene without its entities, which data sets here do not have."""
    nce_weight: float = Field(default=1.0, ge=0)
    """Weight of InfoNCE beside the masks' cross-entropy. SARA's: 1."""
    temperature: float = Field(default=0.07, gt=0)
    """Temperature of InfoNCE. SARA's."""


class MoAlignStage1(NetworkSettings):
    """MoAlign's motion head (losses/stage1/motion_head.py)."""

    kind: Literal["moalign"]
    width: int = Field(default=64, ge=1)
    """Width of the motion space. MoAlign's."""
    hidden: int = Field(default=256, ge=1)
    """Width of the convolution before it. Ours."""
    decoder: int = Field(default=128, ge=1)
    """Width of the flow decoder. Ours."""
    flow: Literal["auto", "dis"] = "auto"
    """Flow to learn: `auto` takes the data set's where it has exact flow, else OpenCV's DIS;
    `dis` always estimates."""


class Stage1Config(TrainingConfig):
    """One Stage 1 training."""

    model: TextModelConfig | None = None
    """Whose text encoder embeds the phrases; `sara` only."""
    data: DataConfig
    teachers: dict[str, TeacherConfig]
    """The one teacher whose tokens the network reads, by alias."""
    stage1: Annotated[SaraStage1 | MoAlignStage1, Field(discriminator="kind")]
    """Which network, and its settings."""
    optim: AdamWConfig = AdamWConfig()
    """`optim.batch_size` counts clips; `sara` runs each with every entity, all, and background."""

    @model_validator(mode="after")
    def _one_teacher(self) -> Self:
        if len(self.teachers) != 1:
            raise ValueError(f"teachers: Stage 1 reads one teacher, got {len(self.teachers)}")
        return self

    @model_validator(mode="after")
    def _video_teacher_gets_clips(self) -> Self:
        for alias, row in self.teachers.items():
            if TEACHERS[row.family].video and self.data.frames < MIN_VIDEO_FRAMES:
                raise ValueError(
                    f"teachers.{alias}: a video teacher needs data.frames of {MIN_VIDEO_FRAMES} "
                    f"or more, not {self.data.frames}"
                )
        return self

    @model_validator(mode="after")
    def _text_is_read(self) -> Self:
        kind = self.stage1.kind
        if kind == "sara" and self.model is None:
            raise ValueError("model: missing; the aligner reads the embeddings of its text encoder")
        if kind == "moalign" and self.model is not None:
            raise ValueError("model: nothing reads it with stage1.kind: moalign; remove it")
        return self

    @model_validator(mode="after")
    def _enough_clips(self) -> Self:
        count, available = self.stage1.val_clips, self.data.num_val_clips
        if available is not None and count > available:
            raise ValueError(f"stage1.val_clips: {count} is more than data.val_clips, {available}")
        return self

    @property
    def teacher(self) -> TeacherConfig:
        """The only teacher."""
        return next(iter(self.teachers.values()))

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) in tokens that the teacher is asked for.

        `teachers.<alias>.grid` as in Stage 2; left out, the token grid of Wan 2.1.
        """
        height, width = self.data.size
        return self.teacher.grid or (height // SIZE_STEP, width // SIZE_STEP)
