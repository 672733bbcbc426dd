"""The settings of a run, as frozen pydantic models.

Recipes (`alignlab.recipe`) are the usual way to make them; a program may also build them directly.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Protocol, Self, Union

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from alignlab.config.data import unknown_name
from alignlab.config.model import ModelConfig
from alignlab.config.names import check_alias
from alignlab.config.optim import OptimConfig, check_optimizer_weights
from alignlab.config.parts import (
    EvalConfig,
    FlowConfig,
    RunTrackingConfig,
    TeacherConfig,
    TrainingConfig,
)
from alignlab.data.registry import DataConfig
from alignlab.errors import UserError
from alignlab.losses import OBJECTIVES
from alignlab.losses.attention_config import AttentionConfig
from alignlab.losses.objective import ObjectiveConfig, SelfTeacherConfig
from alignlab.losses.weight import GradientShare
from alignlab.teachers import TEACHERS, attention_families, image_families

if TYPE_CHECKING:
    AnyObjective = ObjectiveConfig
else:
    AnyObjective = Annotated[
        Union[tuple(row.Config for row in OBJECTIVES.values())],  # noqa: UP007
        Field(discriminator="name"),
    ]


# Three latent frames. A video teacher leaves the first one out, and gives two tubelets for each
# other: with one other, they would pass for the features of the two frames.
MIN_VIDEO_FRAMES = 9

PROCESS_WIDE_ATTENTION = ("_native_cudnn", "_native_efficient", "_native_flash", "_native_math")
"""Backends that diffusers runs in `torch.nn.attention.sdpa_kernel`, whose flags are no thread's."""


class RunConfig(TrainingConfig):
    """One training run."""

    model: ModelConfig
    data: DataConfig
    """The data set; `data.name` says which (`alignlab list data`)."""
    teachers: dict[str, TeacherConfig] = Field(default_factory=dict)
    """By alias (`alignlab.config.names`); an objective names its teacher by alias."""
    objectives: dict[str, SerializeAsAny[AnyObjective]] = Field(default_factory=dict)
    """Alignment losses by alias, added to the flow loss. None: plain fine-tuning."""
    flow: FlowConfig = FlowConfig()
    optim: OptimConfig = OptimConfig()
    tracking: RunTrackingConfig = RunTrackingConfig()
    eval: EvalConfig = EvalConfig()

    @field_validator("teachers", "objectives")
    @classmethod
    def _names_are_aliases(cls, by_alias: dict[str, Any]) -> dict[str, Any]:
        for alias in by_alias:
            check_alias(alias)
        return by_alias

    @model_validator(mode="after")
    def _teachers_exist(self) -> Self:
        for alias, objective in self.objectives.items():
            for teacher in objective.teachers:
                if teacher not in self.teachers:
                    hint = unknown_name("teacher", teacher, self.teachers)
                    raise ValueError(f"objectives.{alias}.teacher: {hint}")
        return self

    @model_validator(mode="after")
    def _video_teachers_get_clips(self) -> Self:
        check_video_frames(self.teachers, self.data.frames)
        video = {alias for alias, row in self.teachers.items() if TEACHERS[row.family].video}
        for alias, objective in self.objectives.items():
            video_teachers = video.intersection(objective.teachers)
            if video_teachers and OBJECTIVES[objective.name].tokens == "reference":
                raise ValueError(
                    f"objectives.{alias}.teacher: {min(video_teachers)} takes whole clips, and "
                    f"references are images: name an image teacher ({image_families()})"
                )
        return self

    @model_validator(mode="after")
    def _attention_has_maps(self) -> Self:
        layers = {alias: len(row.attention_layers) for alias, row in self.teachers.items()}
        for alias, objective in self.objectives.items():
            check_attention(alias, objective, layers)
            if self.model.compile == "blocks" and isinstance(objective, AttentionConfig):
                raise ValueError(
                    f"objectives.{alias}: queries and keys of compiled blocks are not seen; set "
                    "model.compile=none"
                )
        return self

    @model_validator(mode="after")
    def _one_average_teaches(self) -> Self:
        own = [alias for alias, o in self.objectives.items() if isinstance(o, SelfTeacherConfig)]
        if len(own) > 1:
            raise ValueError(
                f"objectives: {', '.join(own)} each have a moving average of the student for a "
                "teacher; a run has one, so keep one of them"
            )
        return self

    @model_validator(mode="after")
    def _steps_are_whole(self) -> Self:
        optim = self.optim
        for alias, objective in self.objectives.items():
            if not OBJECTIVES[objective.name].whole_step:
                continue
            where = f"objectives.{alias}: {objective.name} compares all samples of a step"
            if optim.batch_size < 2:
                raise ValueError(f"{where}, and there is one; set optim.batch_size to 2 or more")
            if optim.accumulate > 1:
                raise ValueError(
                    f"{where}, which optim.accumulate={optim.accumulate} spreads over passes of "
                    f"{optim.batch_size // optim.accumulate}; set optim.accumulate=1"
                )
        return self

    @model_validator(mode="after")
    def _low_guidance_is_read(self) -> Self:
        for name in ("text_guidance_low", "reference_guidance_low"):
            if self.model.expert is None and getattr(self.eval, name) is not None:
                raise ValueError(f"eval.{name}: nothing reads it without model.expert; remove it")
        return self

    @model_validator(mode="after")
    def _shards_are_exact(self) -> Self:
        if self.model.shard == "none":
            return self
        refused = {
            "tracking.diagnose_every": self.tracking.diagnose_every is not None,
            f"optim.name ({self.optim.name})": self.optim.name != "adamw",
            "optim.offload": self.optim.offload,
        }
        for alias, objective in self.objectives.items():
            refused[f"objectives.{alias} ({objective.name}: a moving average of the student)"] = (
                isinstance(objective, SelfTeacherConfig)
            )
            refused[f"objectives.{alias}.weight (gradient_share)"] = isinstance(
                objective.weight, GradientShare
            )
        if self.model.compile == "blocks":
            raise ValueError(
                "model.compile: blocks was not tried in shards: set it or model.shard to none"
            )
        for what, is_set in refused.items():
            if is_set:
                raise ValueError(
                    f"{what}: takes whole weights and gradients on every rank, and "
                    f"model.shard: {self.model.shard} gives each a part; set model.shard: none"
                )
        return self

    @model_validator(mode="after")
    def _eval_teacher_exists(self) -> Self:
        alias = self.eval.teacher
        if alias is not None and alias not in self.teachers:
            raise ValueError(f"eval.teacher: {unknown_name('teacher', alias, self.teachers)}")
        if alias is not None and TEACHERS[self.teachers[alias].family].reads == "latents":
            raise ValueError(
                f"eval.teacher: {alias} reads latents, and nothing is measured against it; name a "
                "teacher that reads frames"
            )
        if alias is not None and self.teachers[alias].attention_layers:
            raise ValueError(
                f"eval.teacher: {alias} gives attention maps, and nothing is measured against "
                "them; name a teacher whose feature is hidden tokens"
            )
        return self

    @model_validator(mode="after")
    def _encoders_keep_their_attention(self) -> Self:
        attention = self.model.attention
        if self.data.workers and attention in PROCESS_WIDE_ATTENTION:
            raise ValueError(
                f"data.workers: model.attention={attention} chooses torch's attention kernel for "
                "the whole process, and so for encoders in the threads; set data.workers=0"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_suits_weights(self) -> Self:
        check_optimizer_weights(self.optim.name, self.model.weights)
        return self

    @property
    def measured_against(self) -> str | None:
        """Alias of the teacher that tokens are measured against: `eval.teacher`, or else the first
        that reads frames and gives hidden tokens.

        None where the recipe has none.
        """
        encoders = (
            alias
            for alias, row in self.teachers.items()
            if TEACHERS[row.family].reads == "frames" and not row.attention_layers
        )
        return self.eval.teacher or next(encoders, None)

    @model_validator(mode="after")
    def _enough_clips(self) -> Self:
        available = self.data.num_val_clips
        if available is not None:
            for key in ("clips", "sample_clips", "generated_clips"):
                count = getattr(self.eval, key) or 0
                if count > available:
                    raise ValueError(
                        f"eval.{key}: {count} is more than data.val_clips, {available}"
                    )
        return self


def check_attention(alias: str, objective: ObjectiveConfig, layers: Mapping[str, int]) -> None:
    """Refuses an objective on attention maps whose teachers give others, or none.

    Args:
        alias: of the objective.
        objective: any.
        layers: of how many layers each teacher gives maps, by alias.

    Raises:
        ValueError: a teacher gives none, or they are not as many as the objective's blocks.
    """
    if not isinstance(objective, AttentionConfig):
        return
    for name in objective.teachers:
        if not layers[name]:
            raise ValueError(
                f"objectives.{alias}.teacher: {name} gives hidden tokens, and {objective.name} "
                f"compares attention maps: set its feature to attention:k, which is a feature of "
                f"{attention_families()}"
            )
    try:
        objective.pairs(sum(layers[name] for name in objective.teachers))
    except ValueError as error:
        raise ValueError(f"objectives.{alias}.blocks: {error}") from error


def check_blocks(config: RunConfig, num_blocks: int) -> None:
    """Refuse objectives and probes that tap a block the transformer does not have.

    Args:
        config: the run.
        num_blocks: length of the transformer's `blocks`.

    Raises:
        UserError: a block index is outside 0..num_blocks-1.
    """
    tapped = {
        f"objectives.{alias}.{setting}": blocks
        for alias, objective in config.objectives.items()
        for setting, blocks in (objective.taps | objective.self_taps).items()
    }
    tapped["eval.blocks"] = config.eval.blocks or ()
    for key, blocks in tapped.items():
        for block in blocks:
            check_block(key, block, num_blocks)


class Coupling(Protocol):
    """An objective, or its config."""

    @property
    def couples_samples(self) -> bool:
        """Whether the value of a sample depends on the others of its batch."""


def check_coupled(objectives: Mapping[str, Coupling], world_size: int) -> None:
    """Refuses several ranks where an objective couples the samples of a batch.

    Args:
        objectives: by alias.
        world_size: ranks that train a run together.

    Raises:
        UserError: each rank would see its own share only.
    """
    for alias, objective in objectives.items():
        if objective.couples_samples and world_size > 1:
            raise UserError(
                f"objectives.{alias}: it compares the samples of a batch, which {world_size} "
                "ranks would share among them: use one process (or, for refalign, "
                "negatives: sample)"
            )


def check_block(setting: str, block: int, num_blocks: int) -> None:
    """Refuses a block that the transformer does not have.

    Args:
        setting: that names the block, for the message.
        block: its index.
        num_blocks: length of the transformer's `blocks`.

    Raises:
        UserError: the index is outside 0..num_blocks-1.
    """
    if not 0 <= block < num_blocks:
        raise UserError(
            f"{setting}: block {block} does not exist: this transformer "
            f"has {num_blocks} blocks, valid 0..{num_blocks - 1} (block i is depth i+1)"
        )


def check_video_frames(teachers: Mapping[str, TeacherConfig], frames: int) -> None:
    """Refuses clips that are too short for a video teacher.

    Raises:
        ValueError: one line.
    """
    rows = {alias: TEACHERS[teacher.family] for alias, teacher in teachers.items()}
    video = [alias for alias, row in rows.items() if row.video and row.reads == "frames"]
    if video and frames < MIN_VIDEO_FRAMES:
        raise ValueError(
            f"teachers.{min(video)}: a video teacher needs data.frames of {MIN_VIDEO_FRAMES} "
            f"or more, not {frames}"
        )
