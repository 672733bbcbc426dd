"""What runs of a launch need before they can begin: models on this machine, and other runs."""

from collections.abc import Container, Mapping

from alignlab.config.paths import user_path
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.launchers.run_progress import RunKey
from alignlab.models.wan import checked_pipeline
from alignlab.runs.init_source import named_run
from alignlab.runs.inputs import used_teachers
from alignlab.runs.run_folder import RunFolder
from alignlab.stage1.compatibility import read_info, stage1_folder_of
from alignlab.teachers.load import teacher_folder


def check_folders(runs: Mapping[RunKey, RunConfig]) -> None:
    """Refuses runs whose model, teachers or Stage 1 networks are not here, before any is trained.

    What is on the hub is fetched, as the first run that reads it would.

    Raises:
        UserError: it names the variant.
    """
    for variant, run in {variant: run for (variant, _), run in runs.items()}.items():
        try:
            _check(run)
        except UserError as error:
            raise UserError(f"variant {variant}: {error}") from error


def waits(key: RunKey, runs: Mapping[RunKey, RunConfig], missing: Container[RunKey]) -> bool:
    """Whether a run starts from the weights of another one that is not finished yet.

    Args:
        key: of the run.
        runs: all of the launch.
        missing: those that are not finished.
    """
    named = runs[key].model.init_from
    if named is None or _folder(runs[key]).has_begun:
        return False
    source = named_run(named).path.resolve()
    return any(k in missing and _folder(r).path.resolve() == source for k, r in runs.items())


def _check(run: RunConfig) -> None:
    checked_pipeline(run.model.path, run.model.expert)
    for alias in used_teachers(run):
        teacher = run.teachers[alias]
        assert teacher.path is not None  # the family's, if left out
        teacher_folder(teacher.family, teacher.path)
    for alias, objective in run.objectives.items():
        named = stage1_folder_of(alias, objective)
        if named is not None:
            read_info(named)


def _folder(run: RunConfig) -> RunFolder:
    return RunFolder(user_path(run.output) / run.name)
