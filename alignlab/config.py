"""The settings of a run and of a comparison, as frozen pydantic models.

Recipes (`alignlab.recipe`) are the usual way to make them; a program may also build them directly.
The parts are defined in `config_parts` and `config_data` and imported from here.
"""

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from alignlab.config_data import (
    DataConfig,
    FolderConfig,
    RunName,
    Settings,
    ShapesConfig,
    unknown_name,
)
from alignlab.config_parts import (
    CheckpointConfig,
    EvalConfig,
    FlowConfig,
    LaunchConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RunTrackingConfig,
    TeacherConfig,
    TrackingConfig,
)
from alignlab.errors import UserError
from alignlab.losses import OBJECTIVES
from alignlab.losses.objective import ObjectiveConfig
from alignlab.teachers import TEACHERS

__all__ = [
    "CheckpointConfig",
    "CompareConfig",
    "CostConfig",
    "DataConfig",
    "EvalConfig",
    "FlowConfig",
    "FolderConfig",
    "LaunchConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "RunTrackingConfig",
    "ShapesConfig",
    "TeacherConfig",
    "TrackingConfig",
    "Tuning",
    "check_blocks",
]

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


class RunConfig(Settings):
    """One training run."""

    name: RunName
    """Folder of the run under `output`."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything drawn in the run."""
    steps: int = Field(ge=1)
    """Optimizer steps: the budget."""
    output: str = "runs"
    """Folder of all runs."""
    model: ModelConfig
    data: DataConfig
    teachers: dict[str, TeacherConfig] = Field(default_factory=dict)
    """By alias; an objective names its teacher by alias."""
    objectives: dict[str, SerializeAsAny[AnyObjective]] = Field(default_factory=dict)
    """Alignment losses by alias, added to the flow loss. None: plain fine-tuning."""
    flow: FlowConfig = FlowConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    tracking: RunTrackingConfig = RunTrackingConfig()

    @model_validator(mode="after")
    def _teachers_exist(self) -> Self:
        for alias, objective in self.objectives.items():
            if not re.fullmatch(r"[\w-]+", alias):
                raise ValueError(f"objectives: {alias!r}: an alias is letters, digits, - and _")
            for teacher in objective.teachers:
                if teacher not in self.teachers:
                    hint = unknown_name("teacher", teacher, self.teachers)
                    raise ValueError(f"objectives.{alias}.teacher: {hint}")
        return self

    @model_validator(mode="after")
    def _video_teachers_get_clips(self) -> Self:
        video = {alias for alias, row in self.teachers.items() if TEACHERS[row.family].video}
        if video and self.data.frames < MIN_VIDEO_FRAMES:
            raise ValueError(
                f"teachers.{min(video)}: a video teacher needs data.frames of {MIN_VIDEO_FRAMES} "
                f"or more, not {self.data.frames}"
            )
        for alias, objective in self.objectives.items():
            chosen = video.intersection(objective.teachers)
            if chosen and OBJECTIVES[objective.name].tokens == "reference":
                raise ValueError(
                    f"objectives.{alias}.teacher: {min(chosen)} takes whole clips, and references "
                    "are images: name an image teacher (dinov2, dinov3, sam2)"
                )
        return self

    @model_validator(mode="after")
    def _eval_teacher_exists(self) -> Self:
        alias = self.eval.teacher
        if alias is not None and alias not in self.teachers:
            raise ValueError(f"eval.teacher: {unknown_name('teacher', alias, self.teachers)}")
        return self

    @property
    def measured_against(self) -> str | None:
        """Alias of the teacher that tokens are measured against: `eval.teacher`, or else the first.

        None where the recipe has no teacher.
        """
        return self.eval.teacher or next(iter(self.teachers), None)

    @model_validator(mode="after")
    def _enough_clips(self) -> Self:
        if isinstance(self.data, ShapesConfig):
            for key in ("clips", "sample_clips", "generated_clips"):
                asked = getattr(self.eval, key) or 0
                if asked > self.data.val_clips:
                    raise ValueError(
                        f"eval.{key}: {asked} is more than data.val_clips, {self.data.val_clips}"
                    )
        return self


class CostConfig(Settings):
    """How the cost of a training step is measured, after all runs are trained."""

    rounds: int = Field(default=10, ge=6)
    """Rounds in which a variant and the baseline take a step each. Six are the fewest that give a
    95% interval of their median."""


class Tuning(Settings):
    """The sweep that found a variant's settings."""

    sweep: str
    """Its `best.yaml`, as the recipe names it."""
    trials: int
    """Trials finished, pruned or failed."""
    steps: int
    """Steps of a trial's run."""
    seeds: int
    """Runs of a trial."""
    metric: tuple[str, ...]
    """What was optimised."""
    searched: tuple[str, ...]
    """Settings that were searched, by dotted name."""


class CompareConfig(Settings):
    """Several variants of one run, each over the same seeds."""

    base: RunConfig
    """What all variants share."""
    baseline: str
    """The variant against which differences are tested."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...]
    """Every variant runs once per seed."""
    allow_differences: tuple[str, ...] = ()
    """Evaluation settings in which variants may differ, by dotted name."""
    launch: LaunchConfig = LaunchConfig()
    """What each run needs of its machine."""
    budget: Literal["steps", "wall_time", "compute"] = "steps"
    """What is equal between variants. `wall_time` and `compute` (FLOPs) set each variant's `steps`
    from the measured cost of its step, so that it gets what the baseline's `steps` cost."""
    cost: CostConfig | None = CostConfig()
    """How the cost of a step is measured; null: it is not. Two models are in memory at a time."""
    variants: dict[str, dict[str, Any]]
    """What each variant changes in `base`, as nested mappings; `from` names the best.yaml of the
    sweep that tuned it."""
    runs: dict[str, RunConfig]
    """Each variant applied to `base`, with the first seed; see `run`."""
    tuned: dict[str, Tuning] = Field(default_factory=dict)
    """The sweeps of the variants that have a `from`."""

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds:
            raise ValueError("name at least one seed")
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{list(seeds)} names a seed twice")
        return seeds

    @model_validator(mode="after")
    def _baseline_exists(self) -> Self:
        if self.baseline not in self.variants:
            raise ValueError(f"baseline: {unknown_name('variant', self.baseline, self.variants)}")
        return self

    @model_validator(mode="after")
    def _budget_is_measured(self) -> Self:
        if self.budget != "steps" and self.cost is None:
            raise ValueError(f"cost: budget: {self.budget} is set from it; remove cost: null")
        return self

    @property
    def name(self) -> str:
        """Folder of the comparison under `output`."""
        return self.base.name

    @property
    def output(self) -> str:
        """Folder of all runs."""
        return self.base.output

    def run(self, variant: str, seed: int) -> RunConfig:
        """The run of one variant and seed, named `<name>/<variant>/seed-<seed>`."""
        name = f"{self.name}/{variant}/seed-{seed}"
        return self.runs[variant].model_copy(update={"name": name, "seed": seed})


def check_blocks(config: RunConfig, num_blocks: int) -> None:
    """Refuse objectives and probes that tap a block the transformer does not have.

    Args:
        config: the run.
        num_blocks: length of the transformer's `blocks`.

    Raises:
        UserError: a block index is outside 0..num_blocks-1.
    """
    asked = {f"objectives.{alias}.blocks": o.blocks for alias, o in config.objectives.items()}
    asked["eval.blocks"] = config.eval.blocks or ()
    for key, blocks in asked.items():
        for block in blocks:
            if not 0 <= block < num_blocks:
                raise UserError(
                    f"{key}: block {block} does not exist: this transformer "
                    f"has {num_blocks} blocks, valid 0..{num_blocks - 1} (block i is depth i+1)"
                )
