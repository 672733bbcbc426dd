"""Alignment losses in a training loop of one's own: docs/own-loop.md.

`alignlab.attach` and `alignlab.Clips` are the names to import.
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from pydantic import Field, SerializeAsAny, ValidationError
from torch import Tensor, nn

from alignlab.config.data import Settings, unknown_name
from alignlab.config.names import check_alias
from alignlab.config.parts import TeacherConfig
from alignlab.config.run import AnyObjective, check_attention, check_block
from alignlab.config.validation_errors import first_problem
from alignlab.errors import UserError
from alignlab.kernels.plugins import ImplementationError
from alignlab.losses import OBJECTIVES
from alignlab.losses.objective import (
    Features,
    Grid,
    ObjectiveConfig,
    SelfTeacherConfig,
    check_implementations,
)
from alignlab.losses.schedule import Ramp
from alignlab.losses.weight import GradientShare
from alignlab.models.taps import find_wan
from alignlab.stage1.compatibility import check_stage1, check_stage1_grid, stage1_folder_of
from alignlab.teachers import (
    TEACHERS,
    DiffusionTeacher,
    Teacher,
    image_families,
    teacher_from,
)
from alignlab.training.aligned_samples import check_starts, trains
from alignlab.training.alignment import Alignment
from alignlab.training.own_clips import Clips as Clips
from alignlab.training.own_clips import GivenClips, Place
from alignlab.training.teacher_check import check_features, noise_clips


class EncodesFrames(Protocol):
    """What a teacher of one's own has; `alignlab.teachers.Teacher` is one."""

    @property
    def dim(self) -> int:
        """Width of its features."""

    @property
    def is_video(self) -> bool:
        """Whether it sees whole clips and leaves their first frame out, as video encoders here
        do; else it sees each frame by itself."""

    @property
    def grid(self) -> tuple[int, int] | None:
        """(height, width) of its tokens of a frame; None: whatever it is asked for."""

    def encode(self, frames_BTHWC: Tensor, grid_HW: tuple[int, int], /) -> Features:
        """Tokens of one clip, or of the references of one, on a grid of (height, width).

        It is called without gradients, at first with noise in the place of the clip.

        Args:
            frames_BTHWC: uint8, 0 to 255, B is 1; on the device of those that `Clips` was given,
                which need not be that of the teacher's weights.
            grid_HW: `grid`, if that is not None, of a video; else that of the transformer's tokens.

        Returns:
            float32, bfloat16 or float16 (1, T', P, `dim`), on any device. T' is T; with `is_video`
            it divides T - 1.
        """


class OwnLoopSettings(Settings):
    """Objectives and teachers as a recipe writes them."""

    teachers: dict[str, TeacherConfig] = Field(default_factory=dict)
    objectives: dict[str, SerializeAsAny[AnyObjective]]


def attach(
    transformer: nn.Module,
    *,
    objectives: Mapping[str, ObjectiveConfig | Mapping[str, Any]],
    teachers: Mapping[str, EncodesFrames | TeacherConfig | Mapping[str, Any]] | None = None,
    references: Literal["after", "before"] | None = None,
    total_steps: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Alignment:
    """Attaches alignment objectives to a diffusers Wan transformer.

    Args:
        transformer: a `WanTransformer3DModel` (text-to-video or image-to-video) or
            `WanVACETransformer3DModel`, with or without LoRA, DDP, FSDP or `torch.compile`. One
            that is compiled must not have been called yet.
        objectives: by an alias of your choice, settings as under `objectives` of a recipe
            (`{"name": "repa", "teacher": "dino", "blocks": [7]}`), or an objective's config.
        teachers: by alias, settings as under `teachers` of a recipe (`{"family": "dinov2"}`),
            which are loaded here; or a loaded `alignlab.teachers.Teacher`; or any other object
            that `EncodesFrames`. None: the objectives read none.
        references: where reference frames lie in the transformer's sequence: after the video's
            frames, or before them. None: it holds the video alone.
        total_steps: of the training; schedules without an `end` of their own read it.
        seed: of the projectors' initial weights, which depend on nothing else.
        device: of projectors and teachers that are loaded here. None: the transformer's.

    Returns:
        What to call in each step; its hooks are on the transformer.

    Raises:
        UserError: settings are wrong, a teacher or a Stage 1 network cannot be used, or an
            objective could never align anything.
    """
    settings, loaded = _validated(objectives, teachers or {})
    model = find_wan(transformer)
    where = next(model.parameters()).device if device is None else torch.device(device)
    for alias, objective in settings.objectives.items():
        _check_objective(alias, objective, len(model.blocks), references, total_steps)
    _check_teachers_are_read(settings, loaded)
    for alias, teacher in settings.teachers.items():
        loaded[alias] = teacher_from(teacher, device=where)
    alignment = Alignment(
        transformer,
        settings.objectives,
        loaded,
        seed=seed,
        total_steps=lambda step: total_steps,
        device=where,
        references=references,
    )
    alignment.check_world_size(dist.get_world_size() if dist.is_initialized() else 1)
    for alias, objective in settings.objectives.items():
        _check_stage1(alias, objective, settings, loaded)
    alignment.add_check(_SoundTeachers(alignment))
    return alignment.attach()


def _validated(
    objectives: Mapping[str, Any], teachers: Mapping[str, Any]
) -> tuple[OwnLoopSettings, dict[str, Teacher]]:
    """Settings of objectives and of teachers that are to be loaded, and teachers that are."""
    if not objectives:
        raise UserError("objectives: none is given, so there is nothing to align")
    loaded: dict[str, Teacher] = {}
    written: dict[str, Any] = {}
    for alias, teacher in teachers.items():
        if isinstance(teacher, Mapping | TeacherConfig):
            written[alias] = teacher
        elif isinstance(teacher, DiffusionTeacher):
            raise _of_latents(alias, "a DiffusionTeacher")
        elif all(hasattr(teacher, name) for name in ("dim", "is_video", "grid", "encode")):
            # of anything else than a Teacher no more is read than these four
            loaded[alias] = cast(Teacher, teacher)
        else:
            raise UserError(
                f"teachers.{alias}: {type(teacher).__name__} is no teacher: give settings, such as "
                "{'family': 'dinov2'}, or alignlab.teachers.Teacher(model, family, feature)"
            )
    try:
        for alias in (*objectives, *teachers):
            check_alias(alias)
        settings = OwnLoopSettings(teachers=written, objectives=dict(objectives))
    except ValidationError as error:
        raise UserError(first_problem(OwnLoopSettings, error)) from error
    except ValueError as error:
        raise UserError(f"objectives, teachers: {error}") from error
    for alias, config in settings.teachers.items():
        if TEACHERS[config.family].reads == "latents":
            raise _of_latents(alias, f"family {config.family}")
        if config.shuffle:
            raise UserError(
                f"teachers.{alias}.shuffle: takes features of other clips of a data set; only "
                "`alignlab train` has one"
            )
    return settings, loaded


def _of_latents(alias: str, what: str) -> UserError:
    return UserError(
        f"teachers.{alias}: {what} reads latents and texts of a run; only `alignlab train` has them"
    )


def _check_objective(
    alias: str,
    objective: ObjectiveConfig,
    num_blocks: int,
    references: Place | None,
    total_steps: int | None,
) -> None:
    """Refuses an objective that could not work on this transformer, or never."""
    where = f"objectives.{alias}"
    for setting, blocks in objective.taps.items():
        for block in blocks:
            check_block(f"{where}.{setting}", block, num_blocks)
    if references not in (None, "after", "before"):
        raise UserError(f"references: {references!r}; choose 'after', 'before' or None")
    if OBJECTIVES[objective.name].tokens == "reference" and references is None:
        raise UserError(
            f"{where}: {objective.name} aligns reference tokens: say where the transformer's "
            "sequence has them, references='after' or 'before'"
        )
    if isinstance(objective.schedule, Ramp) and objective.schedule.end is None:
        if total_steps is None:
            raise UserError(
                f"{where}.schedule: {objective.schedule.kind} without end needs "
                "attach(..., total_steps=...)"
            )
    if isinstance(objective, SelfTeacherConfig):
        raise UserError(
            f"{where}: {objective.name} reads a moving average of the transformer at another noise "
            "level; only `alignlab train` makes one"
        )
    if isinstance(objective.weight, GradientShare):
        raise UserError(
            f"{where}.weight: gradient_share needs the flow loss, which only `alignlab train` "
            "sees; give a number, such as the one that a run measured (`weights` of its "
            "result.json)"
        )
    if trains(objective):
        check_starts(alias, objective)
    try:
        check_implementations(objective)
    except ImplementationError as error:
        raise UserError(f"{where}: {error}") from error


def _check_teachers_are_read(settings: OwnLoopSettings, loaded: Mapping[str, Teacher]) -> None:
    """Refuses teachers that nothing reads, or that have no features for what reads them."""
    is_video = {alias: TEACHERS[row.family].video for alias, row in settings.teachers.items()}
    is_video |= {alias: teacher.is_video for alias, teacher in loaded.items()}
    layers = {alias: len(row.attention_layers) for alias, row in settings.teachers.items()}
    for alias, teacher in loaded.items():  # one of one's own gives hidden tokens
        layers[alias] = len(teacher.heads) if isinstance(teacher, Teacher) else 0
    read = {name for objective in settings.objectives.values() for name in objective.teachers}
    for alias, objective in settings.objectives.items():
        for name in objective.teachers:
            if name not in is_video:
                unknown = unknown_name("teacher", name, is_video)
                raise UserError(f"objectives.{alias}.teacher: {unknown}")
            if is_video[name] and OBJECTIVES[objective.name].tokens == "reference":
                raise UserError(
                    f"objectives.{alias}.teacher: {name} takes whole clips, and references are "
                    f"images: name an image teacher ({image_families()})"
                )
        try:
            check_attention(alias, objective, layers)
        except ValueError as error:
            raise UserError(str(error)) from error
    for alias in is_video:
        if alias not in read:
            raise UserError(f"teachers.{alias}: no objective reads it; remove it")


def _check_stage1(
    alias: str,
    objective: ObjectiveConfig,
    settings: OwnLoopSettings,
    loaded: Mapping[str, Teacher],
) -> None:
    """Refuses a Stage 1 network of another teacher; its grid is known at the first step."""
    named = stage1_folder_of(alias, objective)
    if named is None:
        return
    name = objective.teachers[0]
    if name not in settings.teachers:
        raise UserError(
            f"{named.key}: its network knows one teacher, by family, feature and weights: give "
            f"teachers.{name} by settings, not as a loaded object"
        )
    teacher = settings.teachers[name]
    check_stage1(alias, objective, teacher, loaded[name], grid=None, text=None)


class _SoundTeachers:
    """Looks once at every teacher: its grid suits Stage 1, and it tells two clips of noise apart.

    The noise is where the clips are, and as long as they: teachers of others know no other frames.
    What the frames are like is known at the first step, and the references' maybe later.
    """

    def __init__(self, alignment: Alignment) -> None:
        self._alignment = alignment
        self._left = [a for a, row in alignment.objectives.items() if row.config.teachers]

    def __call__(self, given: GivenClips, grid: Grid) -> bool:
        given.clips.check_sigma()
        alignment, left = self._alignment, []
        for alias in self._left:
            objective = alignment.objectives[alias]
            shown = _shown(given, objective.tokens)
            if shown is None:
                left.append(alias)
                continue
            for read in alignment.reads_on(grid, [alias]):
                if read.kind == "video":
                    check_stage1_grid(alias, objective.config, read.grid_HW)
                frames, height, width, _ = shown.shape
                noise_BTHWC = noise_clips(frames, (height, width)).to(shown.device)
                tokens_BTPD = torch.stack([given.encoded(read, clip) for clip in noise_BTHWC])
                check_features(f"teachers.{given.name_of(read)}", tokens_BTPD)
        self._left = left
        return not left


def _shown(given: GivenClips, kind: str) -> Tensor | None:
    """The pictures of a kind of one sample, (T, H, W, 3) or (K, H, W, 3), if there are any."""
    if kind == "video":
        frames = given.clips.frames_BTHWC
        return None if frames is None else frames[0]
    return next((images for images in given.references if len(images)), None)
