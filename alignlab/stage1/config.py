"""Settings of a Stage 1 training, as frozen pydantic models."""

from typing import TYPE_CHECKING, Annotated, Literal, Self, Union

from pydantic import Field, SerializeAsAny, model_validator

from alignlab.config.data import Settings
from alignlab.config.identity import SAME_NUMBERS
from alignlab.config.model import TextEncoderPlace
from alignlab.config.names import check_alias
from alignlab.config.optim import AdamWConfig
from alignlab.config.parts import TeacherConfig, TrainingConfig
from alignlab.config.run import check_video_frames
from alignlab.data.registry import DataConfig
from alignlab.stage1.registry import STAGE1_TASKS
from alignlab.stage1.task import Stage1Settings
from alignlab.teachers import TEACHERS

if TYPE_CHECKING:
    AnyStage1 = Stage1Settings
else:
    AnyStage1 = Annotated[
        Union[tuple(task.Settings for task in STAGE1_TASKS.values())],  # noqa: UP007
        Field(discriminator="kind"),
    ]


class TextModelConfig(Settings):
    """The model of Stage 2: its token grid, and the text encoder that embeds the phrases."""

    path: str
    """The Wan folder, asset or hub id of Stage 2. Without a `grid` of its own the teacher is asked
    for this model's tokens. Only its text encoder is loaded, and that for `sara` alone."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the text encoder; Stage 2's `model.precision`."""
    text_encoder: TextEncoderPlace = Field(
        default="auto", json_schema_extra={SAME_NUMBERS: ["keep"]}
    )
    """Where it is; Stage 2's `model.text_encoder`."""


class Stage1Config(TrainingConfig):
    """One Stage 1 training."""

    model: TextModelConfig | None = None
    """The model of Stage 2. A task that reads text (`sara`) needs its text encoder; for another one
    its `path` alone is read, for the size of its tokens: left out, 16 pixels, as Wan 2.1's."""
    data: DataConfig
    """The data set; `data.name` says which (`alignlab list data`)."""
    teachers: dict[str, TeacherConfig]
    """The one teacher whose tokens the network reads, by alias."""
    stage1: SerializeAsAny[AnyStage1]
    """Which network, and its settings."""
    optim: AdamWConfig = AdamWConfig()
    """`optim.batch_size` counts clips; `sara` runs each with every entity, all, and background."""

    @model_validator(mode="after")
    def _one_teacher(self) -> Self:
        if len(self.teachers) != 1:
            raise ValueError(f"teachers: Stage 1 reads one teacher, got {len(self.teachers)}")
        for alias, teacher in self.teachers.items():
            check_alias(alias)
            if TEACHERS[teacher.family].reads == "latents":
                raise ValueError(
                    f"teachers.{alias}: Stage 1 reads features of frames, and {teacher.family} "
                    "reads latents; name another family"
                )
            if teacher.shuffle:
                raise ValueError(f"teachers.{alias}.shuffle: Stage 1 shuffles nothing; remove it")
        return self

    @model_validator(mode="after")
    def _optimizer_suits_weights(self) -> Self:
        if self.optim.name == "adamw_bf16_kahan":
            raise ValueError(
                "optim.name: adamw_bf16_kahan is for bf16 weights, and Stage 1 trains in fp32; "
                "take adamw or adamw_8bit"
            )
        return self

    @model_validator(mode="after")
    def _video_teacher_gets_clips(self) -> Self:
        check_video_frames(self.teachers, self.data.frames)
        return self

    @model_validator(mode="after")
    def _text_is_read(self) -> Self:
        kind = self.stage1.kind
        reads_text = STAGE1_TASKS[kind].reads_text
        if reads_text and self.model is None:
            raise ValueError(
                f"model: missing; stage1.kind: {kind} reads the embeddings of its text encoder"
            )
        if not reads_text and self.model is not None:
            for name in ("precision", "text_encoder"):
                if getattr(self.model, name) != TextModelConfig.model_fields[name].default:
                    raise ValueError(
                        f"model.{name}: nothing reads it with stage1.kind: {kind}; remove it"
                    )
            if self.teacher.grid is not None:
                raise ValueError(
                    f"model: nothing reads it with stage1.kind: {kind} and a teacher with a grid "
                    "of its own; remove one of the two"
                )
        return self

    @model_validator(mode="after")
    def _enough_clips(self) -> Self:
        count, available = self.stage1.val_clips, self.data.num_val_clips
        if available is not None and count > available:
            raise ValueError(f"stage1.val_clips: {count} is more than data.val_clips, {available}")
        return self

    @property
    def text_model(self) -> TextModelConfig | None:
        """The model whose text encoder the task reads; None: it reads no text."""
        return self.model if STAGE1_TASKS[self.stage1.kind].reads_text else None

    @property
    def teacher(self) -> TeacherConfig:
        """The only teacher."""
        return next(iter(self.teachers.values()))
