"""What MLflow lacks of a folder, whatever that holds: runs, comparisons, sweeps."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from alignlab.config.recipe_file import read_recipe
from alignlab.errors import UserError
from alignlab.experiments.compare.tracking import VARIANT, ParentRun
from alignlab.experiments.sweep.config import load_sweep
from alignlab.experiments.sweep.results import best_metrics
from alignlab.experiments.sweep.study import join_study
from alignlab.experiments.sweep.tracking import SweepTracker
from alignlab.runs.file_lock import HeldError
from alignlab.runs.log_filters import quiet_libraries
from alignlab.runs.run_folder import RunFolder
from alignlab.tracking import runs_address
from alignlab.tracking.mlflow_run import read_tags
from alignlab.tracking.send import output_of, send_run, stored_config

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

    A run that is being trained is left out: it sends its rows itself. What is wrong with a folder
    is told, and the others are sent. Where MLflow does not answer, the rest is not tried.

    Args:
        folder: of a run, a comparison or a sweep, or above them.
        to: where MLflow is; None: as each recipe says.

    Raises:
        UserError: there is no run, or something is wrong with the only one.
    """
    failed = _Failed()
    runs, sweeps = _found(folder, failed)
    if len(runs) == 1 and not (sweeps or failed.folders):
        failed.raises = True
    complete, addresses, parents = True, list[str](), dict[Path, ParentRun]()
    for path in sweeps:  # first, and comparisons: runs are put under them
        with failed.told(path):
            complete = _send_sweep(path, to) and complete
    for path, children in _comparisons(runs).items():
        if path.is_relative_to(folder):
            with failed.told(path):
                parents[path] = _parent(path, children, to)
    for run in runs:
        sent = True
        with failed.told(run):
            sent = send_run(run, to=to)
            address = runs_address(run, stored_config(run, to=to))
            if address is not None and address not in addresses:
                addresses.append(address)
        complete = complete and sent
        if not sent:
            break
    unsent = {run.parent.parent for run in failed.folders | failed.busy}
    for path, parent in parents.items():
        if path in unsent:
            continue
        status = "FINISHED" if (path / "comparison.json").exists() else "KILLED"
        with failed.told(path):
            complete = complete and parent.end(status)
    return Sent(complete and not failed.folders, addresses)


class _Failed:
    """Folders with which something is wrong."""

    def __init__(self) -> None:
        self.folders: set[Path] = set()
        self.busy: set[Path] = set()  # with those, nothing is
        self.raises = False

    @contextmanager
    def told(self, folder: Path) -> Iterator[None]:
        """Tells what is wrong with a folder, and goes on after it."""
        try:
            yield
        except UserError as error:
            if self.raises:
                raise
            log.warning("%s", error)
            (self.busy if isinstance(error, HeldError) else self.folders).add(folder)


def _found(folder: Path, failed: _Failed) -> tuple[list[Path], list[Path]]:
    """The folders of runs, and of sweeps, in a folder."""
    runs, sweeps = [], []
    for recipe in sorted(folder.rglob(RECIPE)):
        path = recipe.parent
        with failed.told(path):
            if "space" in read_recipe(recipe, []):
                sweeps.append(path)
            elif RunFolder(path).metrics.exists():
                runs.append(path)
    if not (runs or failed.folders):
        raise UserError(f"{folder}: no run there that has logged anything (metrics.jsonl)")
    return runs, sweeps


def _comparisons(runs: list[Path]) -> dict[Path, list[Path]]:
    """Folders of comparisons, each with its runs."""
    found: dict[Path, list[Path]] = {}
    for run in runs:
        if VARIANT in read_tags(run):
            found.setdefault(run.parent.parent, []).append(run)  # NAME/VARIANT/seed-N
    return found


def _parent(path: Path, runs: list[Path], to: str | None) -> ParentRun:
    parent = ParentRun(path, stored_config(runs[0], to=to))
    parent.begin({run: {VARIANT: read_tags(run)[VARIANT]} for run in runs})
    return parent


def _send_sweep(folder: Path, to: str | None) -> bool:
    name = str(read_recipe(folder / RECIPE, []).get("name", folder.name))
    overrides = [f"output={output_of(folder, name)}"]
    if to is not None:
        overrides.append(f"tracking.mlflow={to}")
    study = join_study(load_sweep(folder / RECIPE, overrides, stored=True))
    return SweepTracker(study).end_study(best_metrics(study))
