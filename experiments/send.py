"""What MLflow lacks of a folder, whatever that holds: runs, comparisons, sweeps."""

import logging
from pathlib import Path
from typing import NamedTuple

from alignlab.config.recipe_file import read_recipe
from alignlab.errors import UserError
from alignlab.experiments.compare.tracking import VARIANT, ParentRun
from alignlab.experiments.sweep.config import load_sweep
from alignlab.experiments.sweep.results import best_metrics
from alignlab.experiments.sweep.study import join_study
from alignlab.experiments.sweep.tracking import SweepTracker
from alignlab.runs.log_filters import quiet_libraries
from alignlab.runs.run_folder import RunFolder
from alignlab.tracking import runs_address
from alignlab.tracking.mlflow_run import read_tags
from alignlab.tracking.send import send_run, stored_config

log = logging.getLogger(__name__)

RECIPE = "recipe.yaml"


class Sent(NamedTuple):
    """What `send_folder` did.

    Args:
        complete: MLflow has everything.
        addresses: where its runs are shown.
    """

    complete: bool
    addresses: list[str]


@quiet_libraries()
def send_folder(folder: Path, *, to: str | None = None) -> Sent:
    """Sends what MLflow lacks of all runs in a folder, and of their comparisons and sweeps.

    A run that is being trained is left out: it sends its rows itself. Where MLflow does not
    answer, the rest is not tried.

    Args:
        folder: of a run, a comparison or a sweep, or above them.
        to: where MLflow is; None: as each recipe says.

    Raises:
        UserError: there is no run, or its recipe says `tracking.mlflow: none`.
    """
    runs, sweeps = _found(folder)
    complete, addresses, busy = True, list[str](), set[Path]()
    for path in sweeps:  # first, and comparisons: runs are put under them
        complete = _send_sweep(path, to) and complete
    parents = [
        _parent(path, children, to)
        for path, children in _comparisons(runs).items()
        if path.is_relative_to(folder)
    ]
    for run in runs:
        try:
            sent = send_run(run, to=to)
        except UserError as error:
            if len(runs) == 1:
                raise
            log.warning("%s", error)
            busy.add(run.parent.parent)
            continue
        complete = complete and sent
        address = runs_address(run, stored_config(run, to=to))
        if address is not None and address not in addresses:
            addresses.append(address)
        if not sent:
            break
    for path, parent in parents:
        if path in busy:
            continue
        status = "FINISHED" if (path / "comparison.json").exists() else "KILLED"
        complete = complete and parent.end(status)
    return Sent(complete, addresses)


def _found(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders of runs, and of sweeps, in a folder."""
    recipes = sorted(folder.rglob(RECIPE))
    sweeps = [path.parent for path in recipes if "space" in read_recipe(path, [])]
    runs = [
        path.parent
        for path in recipes
        if path.parent not in sweeps and RunFolder(path.parent).metrics.exists()
    ]
    if not runs:
        raise UserError(f"{folder}: no run there that has logged anything (metrics.jsonl)")
    return runs, sweeps


def _comparisons(runs: list[Path]) -> dict[Path, list[Path]]:
    """Folders of comparisons, each with its runs."""
    found: dict[Path, list[Path]] = {}
    for run in runs:
        if VARIANT in read_tags(run):
            found.setdefault(run.parent.parent, []).append(run)  # NAME/VARIANT/seed-N
    return found


def _parent(path: Path, runs: list[Path], to: str | None) -> tuple[Path, ParentRun]:
    parent = ParentRun(path, stored_config(runs[0], to=to))
    parent.begin({run: {VARIANT: read_tags(run)[VARIANT]} for run in runs})
    return path, parent


def _send_sweep(folder: Path, to: str | None) -> bool:
    overrides = [f"output={folder.resolve().parent}"]
    if to is not None:
        overrides.append(f"tracking.mlflow={to}")
    study = join_study(load_sweep(folder / RECIPE, overrides))
    return SweepTracker(study).end_study(best_metrics(study))
