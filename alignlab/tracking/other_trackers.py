"""Trackers besides MLflow (`tracking.also`): the interface, the table, and what holds for all.

Each follows `metrics.jsonl` as MLflow does, and no training depends on it: the first failure of one
is told, and it gets no more until the run is resumed.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from alignlab.config.parts import TrainingConfig
from alignlab.errors import UserError, first_line, printable
from alignlab.passwords import without_password
from alignlab.runs.metric_rows import read_rows
from alignlab.runs.run_folder import RunFolder
from alignlab.tracking.points import Point, points

log = logging.getLogger(__name__)


class OtherTracker(ABC):
    """A tracker of one training, in one process; made when the training begins or is resumed.

    It first gets every row that `metrics.jsonl` has, then those that are written.

    Args:
        folder: the run folder.
        config: its recipe.
        anew: nothing was trained there yet.
    """

    @abstractmethod
    def __init__(self, folder: RunFolder, config: TrainingConfig, *, anew: bool) -> None: ...

    @abstractmethod
    def log(self, row: Sequence[Point]) -> None:
        """The metrics of one row, all of one step; never empty."""

    @abstractmethod
    def end(self, status: str) -> None:
        """Closes it: `FINISHED`, `FAILED` or `KILLED`. It gets nothing more."""

    @staticmethod
    @abstractmethod
    def failures() -> tuple[type[Exception], ...]:
        """What the package raises where the tracker cannot be written."""


class TrackerRow(NamedTuple):
    """A line of the table.

    Args:
        title: as sentences have it.
        package: that has to be installed.
        module: of this room, imported where it is asked for.
        class_name: there.
    """

    title: str
    package: str
    module: str
    class_name: str


OTHER_TRACKERS: Mapping[str, TrackerRow] = {
    "wandb": TrackerRow("W&B", "wandb", "wandb_run", "WandbRun"),
    "tensorboard": TrackerRow("TensorBoard", "tensorboard", "tensorboard_run", "TensorBoardRun"),
}
"""By their names in recipes (`TrackingConfig.also`)."""


def check_packages(config: TrainingConfig) -> None:
    """Refuses trackers whose packages are not installed; before there is any work.

    Raises:
        UserError: it names the package, and what installs it.
    """
    for name in config.tracking.also:
        package = OTHER_TRACKERS[name].package
        if not _is_installed(package):
            raise UserError(
                f"tracking.also: {package} is not installed: pip install 'alignlab[{package}]', or "
                f"leave {name} out"
            )
    if config.tracking.system_metrics and not _is_installed("psutil"):
        raise UserError(
            "tracking.system_metrics: psutil is not installed: pip install psutil, or leave it out"
        )


class OtherTrackers:
    """All that a recipe names.

    Args:
        folder: the run folder; its rows are those that a resumed run keeps.
        config: its recipe.
        anew: nothing was trained there yet.
    """

    def __init__(self, folder: RunFolder, config: TrainingConfig, *, anew: bool) -> None:
        self._trackers: dict[str, OtherTracker] = {}
        for name in config.tracking.also:
            row = OTHER_TRACKERS[name]
            kind = getattr(import_module(f"alignlab.tracking.{row.module}"), row.class_name)
            self._begin(name, kind, folder, config, anew=anew)

    def log(self, row: Mapping[str, float]) -> None:
        """A row that has been written to the file."""
        for name in list(self._trackers):
            self._attempt(name, lambda tracker: _log(tracker, [row]))

    def end(self, status: str) -> None:
        """Closes them; a second time it does nothing."""
        for name in list(self._trackers):
            self._attempt(name, lambda tracker: tracker.end(status))
        self._trackers.clear()

    def _begin(
        self, name: str, kind: Any, folder: RunFolder, config: TrainingConfig, *, anew: bool
    ) -> None:
        try:
            self._trackers[name] = kind(folder, config, anew=anew)
        except kind.failures() as error:
            _tell(name, error)
            return
        self._attempt(name, lambda tracker: _log(tracker, read_rows(folder.metrics)))

    def _attempt(self, name: str, work: Callable[[OtherTracker], None]) -> None:
        tracker = self._trackers[name]
        try:
            work(tracker)
        except tracker.failures() as error:
            del self._trackers[name]
            _tell(name, error)


def _log(tracker: OtherTracker, rows: Iterable[Mapping[str, float]]) -> None:
    for row in rows:
        if metrics := points(row):
            tracker.log(metrics)


def _tell(name: str, error: Exception) -> None:
    log.warning(
        "%s: %s: it gets no more rows of this run until that is resumed; metrics.jsonl has every "
        "row",
        *(OTHER_TRACKERS[name].title, printable(without_password(first_line(error))[:300])),
    )


def _is_installed(package: str) -> bool:
    """By its metadata: a folder called `wandb` in the current one would pass for the module."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
