"""Whether a Stage 2 recipe fits the Stage 1 folder that it names."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from alignlab.config.parts import TeacherConfig, TrainingConfig
from alignlab.config.paths import user_path
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.losses import build_objective
from alignlab.losses.objective import Grid, Objective, ObjectiveConfig
from alignlab.losses.stage1.folder import Kind, Stage1Info, read_stage1_info, stage1_rows
from alignlab.models.model_files import on_disk
from alignlab.progress import warn_once
from alignlab.runs.checksums import DamagedError, damaged_files, read_checksums
from alignlab.runs.digest import frozen_digest
from alignlab.runs.run_folder import RunFolder
from alignlab.teachers import DiffusionTeacher, Teacher


class NamedFolder(NamedTuple):
    """A Stage 1 folder as an objective names it."""

    key: str
    folder: str
    kind: Kind


def check_stage1(
    alias: str,
    objective: ObjectiveConfig,
    settings: TeacherConfig,
    teacher: Teacher | DiffusionTeacher,
    *,
    grid: Grid | None,
    text: str | None,
) -> None:
    """Refuses a Stage 1 network that was trained on other tokens than the objective will give it.

    An objective that names no Stage 1 folder passes.

    Args:
        alias: of the objective.
        objective: its settings.
        settings: of its teacher.
        teacher: loaded by these.
        grid: (T, H, W) of the video tokens, whose (H, W) a teacher without a grid of its own is
            asked for; None: not known yet (`check_stage1_grid`).
        text: the model whose text encoder embeds captions; None: not known.

    Raises:
        UserError: the folder cannot be read, or its teacher (family, feature, weights or, where
            Stage 1 did not record a digest of them, path) or grid is not this run's. The line
            names both sides.
    """
    named = stage1_folder_of(alias, objective)
    if named is None:
        return
    info = read_info(named)
    differing = list(_differences(info, settings, teacher))
    if grid is not None:
        differing += _other_grid(info, settings.grid or grid[1:])
    if differing:
        raise _other_tokens(named, differing)
    if text is not None and info.text is not None and not _same_model(info.text, text):
        warn_once(
            f"{named.key}: {named.folder} was trained with the text encoder of {info.text}, this "
            f"run has that of {text}: they must be the same"
        )


def check_stage1_grid(alias: str, objective: ObjectiveConfig, grid_HW: tuple[int, int]) -> None:
    """Refuses a Stage 1 network that was trained on another grid; see `check_stage1`.

    Args:
        alias: of the objective.
        objective: its settings.
        grid_HW: of its teacher's tokens.

    Raises:
        UserError: the line names both sides.
    """
    named = stage1_folder_of(alias, objective)
    if named is None:
        return
    differing = _other_grid(read_info(named), grid_HW)
    if differing:
        raise _other_tokens(named, differing)


def _other_tokens(named: NamedFolder, differing: list[str]) -> UserError:
    return UserError(
        f"{named.key}: {named.folder} was trained on other tokens than this run's: "
        f"{'; '.join(differing)}; "
        "train Stage 1 with this run's teacher and grid, or change the run"
    )


def stage1_digests(config: RunConfig, objectives: Mapping[str, Objective]) -> dict[str, str]:
    """Digest of the frozen network of each objective that names a Stage 1 folder, by alias."""
    named = (
        a
        for a, objective in config.objectives.items()
        if stage1_folder_of(a, objective) is not None
    )
    return {alias: frozen_digest(objectives[alias]) for alias in named}


def is_finished(config: TrainingConfig, folder: RunFolder) -> bool:
    """Whether a training is done; a run, with the Stage 1 networks that its folders hold now.

    A Stage 1 folder that is gone by now says nothing against the run.

    Raises:
        UserError: it is done, but with another Stage 1 network, or a folder cannot be read, or what
            it left is damaged.
    """
    result = folder.read_result()
    if result is None or not folder.is_finished_at(config.steps):
        return False
    folder.check_files(result)
    if not isinstance(config, RunConfig):
        return True
    for alias, used in result.get("stage1", {}).items():
        named = stage1_folder_of(alias, config.objectives[alias])
        if named is None or on_disk(named.folder) is None:
            continue
        if _digest_now(named, config.objectives[alias]) != used:
            raise UserError(
                f"{folder.path} holds a run with another Stage 1 network than {named.folder}, "
                f"which {named.key} names, holds now: bring it back, choose another name, or "
                "remove the run's folder"
            )
    return True


def stage1_folder_of(alias: str, objective: ObjectiveConfig) -> NamedFolder | None:
    """The Stage 1 folder that an objective names, if it names one."""
    row = stage1_rows().get(objective.name)
    folder = None if row is None else getattr(objective, row.setting)
    if row is None or folder is None:
        return None
    return NamedFolder(f"objectives.{alias}.{row.setting}", folder, objective.name)


def read_info(named: NamedFolder) -> Stage1Info:
    """What a Stage 1 folder says of itself.

    Raises:
        UserError: there is no such folder, a file of it is damaged, or it is of another kind.
    """
    folder = user_path(named.folder)
    if folder.is_dir():
        _check_files(named.key, folder)
    try:
        return read_stage1_info(named.folder, named.kind)
    except ValueError as error:
        raise UserError(f"{named.key}: {error}") from error


def _check_files(key: str, folder: Path) -> None:
    """Refuses a folder of which a file is not what Stage 1 wrote."""
    fix = "copy it back from elsewhere, or train Stage 1 again"
    try:
        expected = read_checksums(folder) or {}
    except DamagedError as error:
        raise UserError(f"{key}: {error}") from error
    for name, problem in damaged_files(folder, expected).items():
        raise UserError(f"{key}: {folder / name} is damaged ({problem}): {fix}")


def _digest_now(named: NamedFolder, objective: ObjectiveConfig) -> str:
    """The digest that a run with the folder's network would have."""
    widths = dict.fromkeys(objective.teachers, read_info(named).teacher_dim)
    try:
        # the student's width does not matter to what is frozen
        return frozen_digest(build_objective(objective, student_dim=1, teacher_dims=widths))
    except ValueError as error:  # such as damaged weights
        raise UserError(f"{named.key}: {error}") from error


def _differences(
    info: Stage1Info, here: TeacherConfig, teacher: Teacher | DiffusionTeacher
) -> Iterator[str]:
    there = info.teacher
    if here.family != there.family:
        yield f"teacher family {there.family} there, {here.family} here"
    if there.weights is None:
        if not _same_model(there.path, str(here.path)):
            yield f"teacher path {there.path} there, {here.path} here"
    elif there.weights != teacher.digest():
        yield f"teacher weights of {there.path} there, others of {here.path} here"
    if here.feature != there.feature:
        yield f"teacher feature {there.feature} there, {here.feature} here"


def _other_grid(info: Stage1Info, grid_HW: tuple[int, int]) -> list[str]:
    if grid_HW == info.grid:
        return []
    return [f"grid {_by(info.grid)} there, {_by(grid_HW)} here"]


def _by(grid_HW: tuple[int, int]) -> str:
    return f"{grid_HW[0]}x{grid_HW[1]}"


def _same_model(one: str, other: str) -> bool:
    """Whether two paths or hub ids name one model; a folder may be written in several ways."""
    folders = on_disk(one), on_disk(other)
    if folders[0] is None or folders[1] is None:
        return one == other
    return folders[0].resolve() == folders[1].resolve()
