"""The alignment of a run: made from its recipe, checked against its data before the first step."""

from collections.abc import Mapping

import torch

from alignlab.config.run import RunConfig
from alignlab.data.sample import ClipDataset
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.errors import UserError
from alignlab.losses.objective import Grid
from alignlab.models.wan import Wan
from alignlab.runs.prolong import SchedulePlan
from alignlab.stage1.compatibility import check_stage1
from alignlab.teachers import DiffusionTeacher, Teacher, teacher_of_clips
from alignlab.training.aligned_samples import trains
from alignlab.training.alignment import Alignment
from alignlab.training.encoded import FeatureRead
from alignlab.training.shuffle import check_shuffled
from alignlab.training.teacher_check import check_noise


def run_alignment(config: RunConfig, wan: Wan, grid: Grid, device: torch.device) -> Alignment:
    """The objectives of a run and the teachers that they read; no hook is there yet.

    Args:
        config: the run.
        wan: its transformer, whose encoders give diffusion teachers their latents and texts.
        grid: (T, H, W) of the video tokens.
        device: where projectors and teachers go.

    Raises:
        UserError: a teacher or a Stage 1 network cannot be used.
    """
    is_cached = config.data.cache.mode != "off" and config.data.cache.teachers
    used = {name for objective in config.objectives.values() for name in objective.teachers}
    teachers = {
        alias: teacher_of_clips(
            teacher, config.data, wan.frozen, alias=alias, device=device, load=not is_cached
        )
        for alias, teacher in config.teachers.items()
        if alias in used
    }
    for alias, objective in config.objectives.items():
        if not objective.teachers:
            continue
        name = objective.teachers[0]
        check_stage1(
            alias,
            objective,
            config.teachers[name],
            teachers[name],
            grid=grid,
            text=config.model.path,
        )
    return alignment_to(teachers, config, wan, grid, device)


def alignment_to(
    teachers: Mapping[str, Teacher | DiffusionTeacher],
    config: RunConfig,
    wan: Wan,
    grid: Grid,
    device: torch.device,
) -> Alignment:
    """The objectives of a run, which read these teachers, by alias; see `run_alignment`."""
    return Alignment(
        wan.transformer,
        config.objectives,
        teachers,
        seed=config.seed,
        total_steps=SchedulePlan.of(config).total_steps,
        device=device,
        grid=grid,
        shuffled=[alias for alias in teachers if config.teachers[alias].shuffle],
    )


def check_data(alignment: Alignment, clips: ClipDataset) -> None:
    """Refuses training clips that lack what an objective needs.

    Raises:
        UserError: an objective needs entity masks, and a clip has none; or it reads reference
            tokens, and no clip has a reference; or one clip alone has features to shuffle.
    """
    key = clips.without_masks()
    for alias, objective in alignment.objectives.items():
        reads_references = objective.tokens == "reference" and trains(objective.config)
        if reads_references and not clips.share_with_references():
            raise UserError(
                f"objectives.{alias}: aligns reference tokens, and no training clip has a "
                "reference; list images under `references` in the data set's metadata "
                "(docs/data.md), or remove the objective"
            )
        if key is not None and "masks" in objective.needs:
            raise UserError(
                f"objectives.{alias}: needs entity masks, and {key} has none; add `masks` and "
                "`entities` to the data set's metadata (docs/data.md)"
            )
        for name in alignment.shuffled.intersection(objective.config.teachers):
            check_shuffled(name, clips, references=objective.tokens == "reference")


def check_teachers(
    alignment: Alignment, config: RunConfig, grid: Grid, values: EncodedValues
) -> None:
    """Refuses teachers whose features say nothing, by those of two different clips of noise.

    Args:
        alignment: of the run.
        config: the run.
        grid: (T, H, W) of its video tokens.
        values: where these features are kept as well: a teacher is not loaded to be checked.

    Raises:
        UserError: features are not finite, or those of the two clips are the same.
    """
    for alias, teacher in alignment.teachers.items():
        where = f"teachers.{alias}: {config.teachers[alias].path}, feature {teacher.feature}"
        read = FeatureRead(teacher, "video", teacher.grid or grid[1:])
        check_noise(where, read, config.data, values)
