"""Runs of a comparison that start from another run's weights (`model.init_from`).

Whether they can is looked at before anything is trained. The other run may be one of the same
comparison that comes before them.
"""

from collections.abc import Mapping

from alignlab.config.paths import user_path
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.launchers import RunKey
from alignlab.runs.checkpoint_folders import has_weights_name, step_path
from alignlab.runs.init_source import SETTING, init_source, named_run
from alignlab.runs.run_folder import RunFolder
from alignlab.training.init_from import check_fits

Runs = Mapping[RunKey, RunConfig]


def check_sources(runs: Runs) -> None:
    """Refuses runs that could not start from what they name.

    What a run that has begun started from may be gone.

    Args:
        runs: in the order in which they are trained.

    Raises:
        UserError: there is no such run or checkpoint, the run is not finished and comes later, or
            one of the two trains a LoRA and the other all weights.
    """
    own = {_folder(run).path.resolve(): key for key, run in runs.items()}
    order = list(runs)
    for key, run in runs.items():
        if run.model.init_from is None or _folder(run).has_begun:
            continue
        there = named_run(run.model.init_from)
        source = own.get(there.path.resolve())
        if source is not None and order.index(source) < order.index(key):
            check_fits(run, runs[source], there.path)
            continue
        init_source(run)
        check_fits(run, there.config(), there.path)


def refuse_prolonged_sources(runs: Runs) -> None:
    """Refuses to prolong a run whose last weights another run of the comparison starts from.

    That would be the start of other runs: those that have begun started from what is the last step
    no longer.

    Args:
        runs: as they would be trained.

    Raises:
        UserError: it names both, and the checkpoint to name.
    """
    folders = {_folder(run).path.resolve(): run for run in runs.values()}
    for key, run in runs.items():
        named = run.model.init_from
        if named is None or has_weights_name(user_path(named).name):
            continue
        source = folders.get(named_run(named).path.resolve())
        if source is None or not _folder(source).result.exists():
            continue
        held = _folder(source).config().steps
        if held < source.steps:
            checkpoint = step_path(_folder(source).checkpoints, held)
            raise UserError(
                f"{SETTING}: {key[0]} starts from the last weights of {named}, which steps="
                f"{source.steps} would prolong, so that they are others: give steps={held}, or "
                f"choose another name and let it start from {checkpoint}"
            )


def _folder(run: RunConfig) -> RunFolder:
    return RunFolder(user_path(run.output) / run.name)
