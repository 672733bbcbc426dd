"""The contract between the training harness and every alignment objective.

Shape letters: B batch, T frames (or, of reference images, K subjects), P tokens per frame,
N = T*P tokens, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError
from torch import Tensor, nn

from alignlab.losses.gate import Gate, NoGate
from alignlab.losses.grids import Grid as Grid
from alignlab.losses.grids import Side as Side
from alignlab.losses.schedule import Constant, Schedule
from alignlab.losses.search_space import DEEP, SHALLOW, DepthRange, SearchRange, tenfold
from alignlab.losses.weight import MAX_WEIGHT, GradientShare, Weight

if TYPE_CHECKING:  # most objectives need no kernel
    from alignlab.kernels.dispatch import Operation

USUAL_SHARE = 0.1
"""Of the flow loss's gradient, in the middle of what is searched."""


@dataclass(frozen=True)
class Tokens:
    """Hidden tokens of the student, tapped at the output of one block, or queries and keys in it.

    Args:
        tokens_BND: with N = T*H*W of `grid`. Where `heads` is given, D is that of a token's queries
            of all heads and then its keys.
        grid: of reference tokens (K, H, W) with the largest K of the batch.
        subject_ids_BN: int64 >= 0, equal where tokens show the same subject, in all of the batch,
            and -1 for the padding of samples with fewer references. None for video tokens.
        host_ids_BN: the same on the CPU, for what would wait for the device. None: not known there.
        heads: of the block's self-attention, where tokens are its queries and keys as the attention
            gets them, positions included (`AttentionConfig`). None: the block's output.
    """

    tokens_BND: Tensor
    grid: Grid
    subject_ids_BN: Tensor | None = None
    host_ids_BN: Tensor | None = None
    heads: int | None = None

    def __post_init__(self) -> None:
        frames, height, width = self.grid
        if self.tokens_BND.ndim != 3 or self.tokens_BND.shape[1] != frames * height * width:
            raise ValueError(
                f"tokens {tuple(self.tokens_BND.shape)} do not fill the grid {self.grid}"
            )
        for ids in (self.subject_ids_BN, self.host_ids_BN):
            if ids is not None and ids.shape != self.tokens_BND.shape[:2]:
                raise ValueError(
                    f"subject ids {tuple(ids.shape)} do not match tokens "
                    f"{tuple(self.tokens_BND.shape)}"
                )
        _check_heads(self.tokens_BND.shape[-1], () if self.heads is None else (self.heads,))


@dataclass(frozen=True)
class Features:
    """Tokens of one teacher for the frames (or the reference images) of a batch.

    Args:
        tokens_BTPD: with P = H*W of `grid`.
        grid: the teacher's own; `alignlab.losses.grids` matches it to the student's.
        heads: of each layer whose queries and keys the tokens are, as those of `Tokens`, one layer
            after the other, equally wide. Empty: they are hidden tokens.
    """

    tokens_BTPD: Tensor
    grid: Grid
    heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        frames, height, width = self.grid
        shape = tuple(self.tokens_BTPD.shape)
        if len(shape) != 4 or shape[1:3] != (frames, height * width):
            raise ValueError(f"teacher tokens {shape} do not fill the grid {self.grid}")
        _check_heads(shape[-1], self.heads)


def _check_heads(width: int, heads: tuple[int, ...]) -> None:
    if any(width % (2 * len(heads) * count) for count in heads):
        raise ValueError(f"{width} channels are no queries and keys of {list(heads)} heads")


Reads = Literal["teacher", "self", "latents", "nothing"]
"""What an objective compares the student's tokens with (`Objective.reads`)."""
LATENTS = "latents"
"""Under which `forward` and `teacher_dims` hold the clean latents, for those that read them."""

Need = Literal["text", "masks", "foreground"]


@dataclass(frozen=True)
class Context:
    """What is known of a batch's clips besides tokens.

    Args:
        text_BLD: embeddings of the full captions (dropped conditions included) from the
            transformer's text encoder, zeros after the last token. None if no objective needs it.
        masks_BTHW: bool, pixels of each frame where any named entity is visible. None if no
            objective needs them.
        foreground_BN: share of each reference token that its subject covers, 0 for padding, on the
            CPU, where masks are. None if no objective needs it.
        undecided_BTHW: bool, pixels of each frame of which it is not known whether an entity is
            there; they are in no mask. None if there are none, or no objective needs masks.
    """

    text_BLD: Tensor | None = None
    masks_BTHW: Tensor | None = None
    foreground_BN: Tensor | None = None
    undecided_BTHW: Tensor | None = None


@dataclass(frozen=True)
class Terms:
    """What an objective hands to the harness, one value per sample.

    The names in `parts` and what is None are the same for every batch, also one without references:
    ranks take means over the samples of all of them by name.

    Args:
        loss_B: what is minimised, before weight, schedule and gate; carries the gradient.
        parts: named terms of `loss_B` for the log, each (B,), detached.
        similarity_B: mean cosine of matching student and teacher tokens, detached; None where an
            objective has no such pairs. 0 for a sample that has no token to align.
        aligned_B: bool, which samples had something to align; the others are in no average of
            `similarity_B`, and no plateau sees them. None: all that have tokens of the kind that
            the objective taps.
        similarity_LB: `similarity_B` of each block by itself, in the order of `config.blocks`,
            detached; None where there is no `similarity_B`, or it is not known by block.
        centered_B: as `similarity_B`, of tokens from which the mean over those of their sample and
            side is subtracted; None where there is none.
        watched_B: what plateau schedules watch, the larger the better, detached; None:
            `similarity_B` or, without one, minus the loss.
    """

    loss_B: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    similarity_B: Tensor | None = None
    aligned_B: Tensor | None = None
    similarity_LB: Tensor | None = None
    centered_B: Tensor | None = None
    watched_B: Tensor | None = None


BEFORE = "before"


def changed_default(default: Any, *, before: Any) -> Any:
    """A pydantic field whose default is not what objectives did before they had it.

    Recipes that were stored without it meant `before`: they are read so (`ObjectiveConfig`), and
    identities count what differs from it, so that no older run passes for one with the new default.

    Args:
        default: of recipes that are written now.
        before: what an objective did when the field was not there.
    """
    return Field(default=default, json_schema_extra={BEFORE: before})


@dataclass(frozen=True)
class ImplementationOf(AfterValidator):
    """What `implementation_of` gives: the check of a setting, and the operation it is about."""

    operation: "Operation[Any]"


def implementation_of(operation: "Operation[Any]") -> ImplementationOf:
    """What stands beside `str` in the annotation of a setting `impl`: only names that there are.

    The name of another package's implementation is kept as `name@package`, so that a recipe says
    which package it needs. In the recipe of a run that was trained such a name may be of a package
    that is gone: reading, exporting and probing the run do without (`check_implementations`).

    Args:
        operation: whose implementations may be named.
    """

    def full_name(impl: str, info: ValidationInfo) -> str:
        name, _, package = impl.partition("@")
        if name and package and (info.context or {}).get("stored"):
            return impl
        try:
            return operation.full_name(impl)
        except KeyError:
            expected = ", ".join(map(repr, operation.names()))
            raise PydanticKnownError("literal_error", {"expected": expected}) from None

    return ImplementationOf(full_name, operation)


def check_implementations(config: "ObjectiveConfig") -> None:
    """Refuses, before a training, implementations of other packages that cannot run here.

    Args:
        config: maybe of a stored recipe.

    Raises:
        ImplementationError: a package is missing or registers no such kernel, or the kernel cannot
            run on this machine.
    """
    for name, settings in type(config).model_fields.items():
        for one in settings.metadata:
            if isinstance(one, ImplementationOf):
                one.operation.check_runs(getattr(config, name))


class ObjectiveConfig(BaseModel):
    """Settings that every objective has; each adds its own constants.

    Args:
        name: row of `OBJECTIVES`.
        weight: factor on the loss, 0 to a million; or `{gradient_share: S}`, which measures it so
            that the objective's gradient is that share of the flow loss's.
        schedule: how `weight` changes over training steps.
        warmup: number of steps over which `weight` grows along a line at the start of the run, by
            `(step + 1) / warmup` on top of `schedule`; 0: none.
        gate: how much each noise level counts.
        blocks: 0-based transformer blocks whose output is aligned (the papers' depth d is d-1).
        teacher: alias of a teacher in the recipe, or several where the objective takes several.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    weight: Weight = 1.0
    schedule: Schedule = Constant()
    warmup: int = Field(default=0, ge=0)
    gate: Gate = NoGate()
    blocks: tuple[int, ...]
    teacher: str | tuple[str, ...]

    @model_validator(mode="before")
    @classmethod
    def _as_stored(cls, values: Any, info: ValidationInfo) -> Any:
        """Fills in what a stored recipe lacks because it was written before the field was there."""
        if not isinstance(values, dict) or not (info.context or {}).get("stored"):
            return values
        extras = {name: field.json_schema_extra for name, field in cls.model_fields.items()}
        before = {k: e[BEFORE] for k, e in extras.items() if isinstance(e, dict) and BEFORE in e}
        return {**before, **values}

    @field_validator("weight")
    @classmethod
    def _weight_leaves_the_flow_loss_visible(
        cls, weight: float | GradientShare
    ) -> float | GradientShare:
        if not isinstance(weight, GradientShare) and weight > MAX_WEIGHT:
            raise ValueError(
                f"{weight:g} is more than {MAX_WEIGHT:g}: nothing would be left of the flow loss"
            )
        return weight

    @field_validator("blocks")
    @classmethod
    def _blocks_are_indices(cls, blocks: tuple[int, ...]) -> tuple[int, ...]:
        if not blocks:
            raise ValueError("blocks is empty: name at least one block")
        if min(blocks) < 0:
            raise ValueError(f"blocks are counted from 0, got {min(blocks)}")
        if len(set(blocks)) < len(blocks):
            raise ValueError(f"blocks names a block twice: {list(blocks)}")
        return blocks

    @field_validator("teacher", mode="before", check_fields=False)
    @classmethod
    def _teacher_is_given(cls, teacher: Any) -> Any:
        if teacher is None:
            name = cls.model_fields["name"].default
            raise ValueError(f"{name} reads a teacher: give an alias of the recipe's teachers")
        return teacher

    # not checked: NoTeacherConfig is without it
    @field_validator("teacher", check_fields=False)
    @classmethod
    def _teachers_are_named_once(cls, teacher: str | tuple[str, ...]) -> str | tuple[str, ...]:
        names = (teacher,) if isinstance(teacher, str) else teacher
        if not names or not all(names):
            raise ValueError("teacher is empty: give the alias of a teacher")
        if len(set(names)) < len(names):
            raise ValueError(f"teacher names an alias twice: {list(names)}")
        return teacher

    @property
    def teachers(self) -> tuple[str, ...]:
        """Aliases of the teachers whose features `forward` needs."""
        return (self.teacher,) if isinstance(self.teacher, str) else self.teacher

    @property
    def taps(self) -> dict[str, tuple[int, ...]]:
        """Blocks whose tokens `forward` gets, by the setting that names them: `blocks`, to which an
        objective may add others."""
        return {"blocks": self.blocks}

    @property
    def tapped_blocks(self) -> tuple[int, ...]:
        """All blocks of `taps`, each once."""
        return tuple(dict.fromkeys(block for blocks in self.taps.values() for block in blocks))

    @property
    def couples_samples(self) -> bool:
        """Whether the value of a sample depends on the others of its batch: ranks would see a share
        of it each, and are refused."""
        return False

    @property
    def self_taps(self) -> dict[str, tuple[int, ...]]:
        """As `taps`, of the blocks of the student's own average (`SelfTeacherConfig`)."""
        return {}

    @property
    def search_space(self) -> dict[str, SearchRange]:
        """Where a sweep searches the objective's settings, by name, unless a recipe says otherwise.

        The weight from a tenth to ten times its default, and one block of the whole depth; of a
        weight that is a share of the flow loss's gradient, shares from 0.01 to 1. An objective adds
        its own knobs, those that something reads under its other settings.
        """
        space: dict[str, SearchRange] = {}
        default = type(self).model_fields["weight"].default
        if isinstance(self.weight, GradientShare):
            space["weight.gradient_share"] = tenfold(USUAL_SHARE)
        elif isinstance(default, int | float) and default > 0:
            space["weight"] = tenfold(default)
        return space | {"blocks": DepthRange()}


class NoTeacherConfig(ObjectiveConfig):
    """Settings of an objective that reads no teacher: it has no setting `teacher`.

    A recipe that gives it one is refused.
    """

    if TYPE_CHECKING:
        teacher: Any = None
    else:
        teacher: ClassVar[None] = None  # takes the field away

    @model_validator(mode="before")
    @classmethod
    def _has_no_teacher(cls, values: Any) -> Any:
        if isinstance(values, dict) and "teacher" in values:
            name = cls.model_fields["name"].default
            raise ValueError(f"{name} reads no teacher; remove teacher")
        return values

    @property
    def teachers(self) -> tuple[str, ...]:
        """None."""
        return ()


class SelfTeacherConfig(NoTeacherConfig):
    """Settings of an objective whose teacher is a moving average of the student itself.

    The average goes through the same noise, captions and references, at a cleaner noise level.

    Args:
        deep_blocks: blocks of the average that are compared with, one for each of `blocks`.
        cleaner: the average's noise level lies below the student's by a uniform draw from 0 to
            this, but not below 0: 0.2 (SRA).
        ema: decay of the average, 0.9999 (SRA), which it approaches: after s steps it is
            (1 + s) / (10 + s) while that is less, so that also in a short run no more than about
            the last ninth counts (ours). Apart from `optim.ema`.
    """

    deep_blocks: tuple[int, ...] = Field(min_length=1)
    cleaner: float = Field(default=0.2, ge=0.0, le=1.0)
    ema: float = Field(default=0.9999, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _blocks_come_in_pairs(self) -> Self:
        if len(self.blocks) != len(self.deep_blocks):
            raise ValueError(
                f"deep_blocks names {len(self.deep_blocks)} blocks and blocks {len(self.blocks)}: "
                "name one for each"
            )
        return self

    @property
    def self_taps(self) -> dict[str, tuple[int, ...]]:
        """Blocks of the average whose tokens `forward` gets."""
        return {"deep_blocks": self.deep_blocks}

    @property
    def search_space(self) -> dict[str, SearchRange]:
        """One block of the shallower half towards one of the deeper half."""
        return super().search_space | {"blocks": SHALLOW, "deep_blocks": DEEP}

    def decay_at(self, step: int) -> float:
        """Decay of the average after a step, 0-based."""
        return min(self.ema, (1 + step) / (10 + step))


class TwoLevelConfig(SelfTeacherConfig):
    """Settings of an objective whose samples hold two noise levels, t and s, both as the run draws
    them (Self-Flow). The average sees the cleaner of the two in all tokens.

    The student's input is such a mixture for every objective of the run and for the flow loss,
    while the objective is on and its weight above 0. Gates and flow weights read t.

    Args:
        mask_ratio: probability of each video token to have level s, 0.1 (Self-Flow, of videos); the
            others and the references have t.
    """

    if TYPE_CHECKING:
        cleaner: Any = None
    else:
        cleaner: ClassVar[None] = None  # takes the field away
    mask_ratio: float = Field(default=0.1, gt=0.0, lt=1.0)


def self_key(block: int) -> str:
    """Under which `forward` and `teacher_dims` hold the average's tokens of a block."""
    return f"self/{block}"


NO_CONTEXT = Context()


class Objective(nn.Module, ABC):
    """An alignment loss with the projectors it trains. Concrete classes are final.

    A concrete class is built as `Class(config, *, student_dim, teacher_dims, seed)`; use
    `build_objective`. `teacher_dims` has the width of what `forward` gets as `teacher`. Its
    parameters are trained with the student, saved for resume, and never exported; those without
    `requires_grad` (a frozen Stage 1 network) are neither trained nor saved. It draws no noise,
    reads no batch, logs nothing, and gives every sample the value that the sample would have alone,
    unless `couples_samples` says otherwise.
    """

    Config: ClassVar[type[ObjectiveConfig]]
    tokens: ClassVar[Literal["video", "reference"]]
    reads: ClassVar[Reads] = "teacher"
    """What the tokens are compared with: features of the `teacher` that the config names; those of
    the student's own average (`self`), whose `Config` derives from `SelfTeacherConfig`; the clean
    `latents` of the batch's videos, on the grid of the video tokens; or `nothing` but tokens. With
    the last two, `Config` derives from `NoTeacherConfig`."""
    whole_step: ClassVar[bool] = False
    """Whether `forward` needs all samples of a step at once, of which there are at least two: else
    a recipe is refused."""
    paper: ClassVar[str] = ""
    """arXiv id such as 2410.06940, for `alignlab list objectives`; empty if there is none."""
    config: ObjectiveConfig

    @property
    def needs(self) -> frozenset[Need]:
        """What `forward` reads from the context, which may depend on the config."""
        return frozenset()

    @property
    def couples_samples(self) -> bool:
        """Whether the value of a sample depends on the others of its batch, as the config says."""
        return self.config.couples_samples

    @property
    def side(self) -> Side:
        """On whose grid student and teacher meet."""
        return "student"

    @abstractmethod
    def forward(
        self,
        student: Mapping[int, Tokens],
        teacher: Mapping[str, Features],
        context: Context = NO_CONTEXT,
    ) -> Terms:
        """Computes the loss of a batch.

        Args:
            student: tapped tokens of the kind `tokens`, keyed by block index; holds at least
                `config.tapped_blocks`. Grid and subject ids are the same in every block.
            teacher: features keyed by alias; holds at least `config.teachers`, or, of an objective
                that reads them, the clean latents under `LATENTS`, each token's patch flattened, or
                the average's tokens of each deep block under `self_key(block)`, both on the
                student's grid. They are constants: no gradient flows into them.
            context: holds at least what `needs` names.
        """
