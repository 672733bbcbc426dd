"""What MLflow lacks of a folder, whatever that holds: runs, comparisons, sweeps."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from alignlab.config.parts import TrainingConfig
from alignlab.config.recipe_file import read_recipe
from alignlab.errors import UserError
from alignlab.experiments.compare.tracking import VARIANT, ParentRun
from alignlab.experiments.sweep.config import SweepConfig, load_sweep
from alignlab.experiments.sweep.results import best_metrics
from alignlab.experiments.sweep.study import join_study
from alignlab.experiments.sweep.tracking import SweepTracker
from alignlab.runs.file_lock import HeldError
from alignlab.runs.log_filters import quiet_libraries
from alignlab.runs.run_folder import RunFolder, output_of
from alignlab.tracking import runs_address
from alignlab.tracking.connection import Connection, connection
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

    A run that is being trained is left out: it sends its rows itself. What is wrong with a folder
    is told, and the others are sent. Where a place of MLflow does not answer, nothing more is tried
    there, and a line says what was left out.

    Args:
        folder: of a run, a comparison or a sweep, or above them.
        to: where MLflow is; None: as each recipe says.

    Raises:
        UserError: there is no run, or something is wrong with the only one.
    """
    failed, away = _Failed(), _Away()
    runs, sweeps = _found(folder, failed)
    if len(runs) == 1 and not (sweeps or failed.folders):
        failed.raises = True
    complete, addresses, parents = True, list[str](), dict[Path, ParentRun]()
    for path in sweeps:  # first, and comparisons: runs are put under them
        with failed.told(path):
            config = _sweep_config(path, to)
            sent = away.unless(config.base, path, partial(_send_sweep, config))
            complete = complete and sent
    for path, children in _comparisons(runs).items():
        if path.is_relative_to(Path(os.path.abspath(folder))):
            with failed.told(path):
                parents[path] = _parent(path, children, to)
    for run in runs:
        with failed.told(run):
            sent = away.unless(stored_config(run, to=to), run, partial(send_run, run, to=to))
            complete = complete and sent
            address = runs_address(run, stored_config(run, to=to))
            if address is not None and address not in addresses:
                addresses.append(address)
    busy = {comparison_of(run) for run in failed.busy}
    for path, parent in parents.items():
        if path in busy:
            continue
        status = "FINISHED" if (path / "comparison.json").exists() else "KILLED"
        with failed.told(path):
            ended = away.unless(parent.config, path, partial(parent.end, status, children=False))
            complete = complete and ended
    away.tell()
    return Sent(complete and not failed.folders, addresses)


class _Away:
    """Places of MLflow that did not answer, and what was not tried there since."""

    def __init__(self) -> None:
        self._left: dict[Connection, list[Path]] = {}

    def unless(self, config: TrainingConfig, folder: Path, send: Callable[[], bool]) -> bool:
        """Sends something to the place of a recipe, unless it is away; whether that has it all."""
        way = connection(config)
        if way in self._left:
            self._left[way].append(folder)
            return False
        sent = send()
        if way is not None and not sent and way.is_away:
            self._left[way] = []
        return sent

    def tell(self) -> None:
        """A line for each place: what was left out."""
        for way, folders in self._left.items():
            if folders:
                more = f" and {len(folders) - 1} more" if len(folders) > 1 else ""
                log.warning(
                    "MLflow at %s does not answer: %s%s not tried there; give the command again "
                    "when it does",
                    *(way.shown, folders[0], f"{more} were" if more else " was"),
                )


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
            found.setdefault(comparison_of(run), []).append(run)
    return found


def comparison_of(run: Path) -> Path:
    """The folder of the comparison that a run is of: NAME/VARIANT/seed-N; of `.` as well."""
    return Path(os.path.abspath(run)).parents[1]


def _parent(path: Path, runs: list[Path], to: str | None) -> ParentRun:
    parent = ParentRun(path, stored_config(runs[0], to=to))
    parent.begin({run: {VARIANT: read_tags(run)[VARIANT]} for run in runs})
    return parent


def _sweep_config(folder: Path, to: str | None) -> SweepConfig:
    path = Path(os.path.abspath(folder))
    name = str(read_recipe(path / RECIPE, []).get("name", path.name))
    overrides = [f"output={output_of(path, name)}"]
    if to is not None:
        overrides.append(f"tracking.mlflow={to}")
    return load_sweep(path / RECIPE, overrides, stored=True)


def _send_sweep(config: SweepConfig) -> bool:
    study = join_study(config)
    return SweepTracker(study).end_study(best_metrics(study))
