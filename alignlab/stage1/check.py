"""Whether a Stage 2 recipe fits the Stage 1 folder that it names."""

import logging
from collections.abc import Iterator

from alignlab.config import RunConfig
from alignlab.errors import UserError
from alignlab.hub import on_disk
from alignlab.losses.objective import Grid
from alignlab.losses.stage1_folder import Kind, Stage1Info, read_stage1_info

SETTINGS: dict[str, tuple[str, Kind]] = {
    "sara": ("aligner", "sara"),
    "moalign": ("head", "moalign"),
}
"""By objective: the setting that names a Stage 1 folder, and the kind that it must hold."""

log = logging.getLogger(__name__)


def check_stage1(config: RunConfig, alias: str, grid: Grid) -> None:
    """Refuses a Stage 1 network that was trained on other tokens than the objective will give it.

    An objective that names no Stage 1 folder passes.

    Args:
        config: the Stage 2 run.
        alias: of the objective.
        grid: (T, H, W) of the run's video tokens, whose (H, W) a teacher without a grid of its own
            is asked for.

    Raises:
        UserError: the folder cannot be read, or its teacher (family, path, feature) or grid is not
            this run's. The line names both sides.
    """
    objective = config.objectives[alias]
    setting, kind = SETTINGS.get(objective.name, ("", "sara"))
    folder = objective.model_dump().get(setting)
    if folder is None:
        return
    key = f"objectives.{alias}.{setting}"
    try:
        info = read_stage1_info(folder, kind)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error
    differing = list(_differences(config, objective.teachers[0], info, grid))
    if differing:
        raise UserError(
            f"{key}: {folder} was trained on other tokens than this run's: {'; '.join(differing)}; "
            "train Stage 1 with this run's teacher and grid, or change the run"
        )
    if info.text is not None and not _same_model(info.text, config.model.path):
        log.warning(
            "%s: %s was trained with the text encoder of %s, this run has that of %s: they must be "
            "the same",
            *(key, folder, info.text, config.model.path),
        )


def _differences(config: RunConfig, teacher: str, info: Stage1Info, grid: Grid) -> Iterator[str]:
    here = config.teachers[teacher]
    if here.family != info.teacher.family:
        yield f"teacher family {info.teacher.family} there, {here.family} here"
    if not _same_model(info.teacher.path, str(here.path)):
        yield f"teacher path {info.teacher.path} there, {here.path} here"
    if here.feature != info.teacher.feature:
        yield f"teacher feature {info.teacher.feature} there, {here.feature} here"
    asked = here.grid or grid[1:]
    if asked != info.grid:
        yield f"grid {_by(info.grid)} there, {_by(asked)} here"


def _by(grid_HW: tuple[int, int]) -> str:
    return f"{grid_HW[0]}x{grid_HW[1]}"


def _same_model(one: str, other: str) -> bool:
    """Whether two paths or hub ids name one model; a folder may be written in several ways."""
    folders = on_disk(one), on_disk(other)
    if folders[0] is None or folders[1] is None:
        return one == other
    return folders[0].resolve() == folders[1].resolve()
