"""The log of a training: `metrics.jsonl`, and MLflow, which follows it."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from alignlab.config.parts import TrainingConfig
from alignlab.errors import EndedEarlyError
from alignlab.recipe import recipe_hash
from alignlab.runs.metric_rows import append_row, keep_rows
from alignlab.runs.run_folder import RunFolder
from alignlab.tracking.connection import NOW, PACED, UNLESS_AWAY, Connection, When, Work, connection
from alignlab.tracking.mlflow_run import (
    RECIPE_HASH,
    TAGS,
    MlflowRun,
    experiment_id,
    read_state,
)
from alignlab.tracking.names import mlflow_params

log = logging.getLogger(__name__)

END_S = 60.0  # for the rows that are left at the end of a training
INTERRUPTED_S = 5.0


class Tracker:
    """Writes rows of scalars; a context manager around training.

    Rows are written to `metrics.jsonl` first, and sent to MLflow from there: at once, or together
    where MLflow is slow, or when it answers again, at the latest at the end. What is missing then,
    `alignlab track` sends. A resumed run continues the same MLflow run, and rows that will be
    written again are dropped from `metrics.jsonl`; MLflow gets no row twice.

    Args:
        folder: the run folder.
        config: its recipe; `tracking` is read.
        start: the step that training resumes from.
        environment: facts that become MLflow tags.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: TrainingConfig,
        *,
        start: int,
        environment: Mapping[str, str],
    ) -> None:
        self._folder = folder
        self._shipper: Shipper | None = None
        way = connection(config)
        if way is not None:
            self._shipper = Shipper(way, folder, config, environment, anew=start == 0)
        keep_rows(folder.metrics, start)

    def __enter__(self) -> Self:
        if self._shipper is not None:
            self._shipper.ship(UNLESS_AWAY)
        return self

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """One row; `step` counts finished optimizer steps."""
        row = {"step": step, "time": round(time.time(), 3), **scalars}
        append_row(self._folder.metrics, row)
        if self._shipper is not None:
            self._shipper.add(row)
            self._shipper.ship(PACED)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._shipper is None:
            return
        if exc is None:
            self._shipper.end("FINISHED", within_s=END_S)
        else:
            self._shipper.end(status_of(exc), within_s=INTERRUPTED_S)


class SilentTracker(Tracker):
    """Of a rank that leaves the log to rank 0."""

    def __init__(self) -> None:
        self._shipper = None

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        pass


class Shipper:
    """Brings the rows of a run folder to MLflow.

    Args:
        way: to MLflow.
        folder: the run folder.
        config: its recipe.
        environment: facts that become tags.
        anew: nothing was trained there yet.
        only_sender: the caller holds the lock of that name.
    """

    def __init__(
        self,
        way: Connection,
        folder: RunFolder,
        config: TrainingConfig,
        environment: Mapping[str, str],
        *,
        anew: bool = False,
        only_sender: bool = False,
    ) -> None:
        self._way = way
        self._folder = folder
        tags = {f"alignlab.{key}": value for key, value in environment.items()}
        tags |= {RECIPE_HASH: recipe_hash(config), "alignlab.seed": str(config.seed)}
        self._run = MlflowRun(
            folder.path,
            way,
            experiment=experiment_name(config),
            name=config.name,
            tags=tags,
            params=mlflow_params(config),
            metrics=folder.metrics,
            anew=anew,
            locked=only_sender,
        )

    def add(self, row: Mapping[str, float]) -> None:
        """A row that has been written to the file."""
        self._run.add(row)

    def ship(self, when: When) -> bool:
        """Sends a request's worth of rows; whether that went well."""

        def work(client: Any) -> None:
            self._run.open(client)
            self._run.send(client)

        return self._attempt(work, when)

    def end(self, status: str, *, within_s: float) -> bool:
        """Sends the rows that are left, and files, and ends the run; whether MLflow has it all.

        Args:
            status: `FINISHED`, `FAILED` or `KILLED`.
            within_s: no further request is begun after that.
        """
        until = time.monotonic() + within_s
        went_well = self.ship(NOW)
        while went_well and self._run.unsent and time.monotonic() < until:
            went_well = self.ship(NOW)
        unsent = self._run.unsent
        if went_well:
            files = (self._folder.recipe, self._folder.result)
            has_files = self._way.upload(self._run.upload, files)
            went_well = self._attempt(
                lambda client: self._run.close(client, status, complete=has_files), NOW
            )
            went_well = went_well and has_files
        complete = went_well and not unsent
        if not complete and not (self._folder.path / TAGS).exists():  # else its parent tells
            tell_unsent(self._way, self._folder.path)
        return complete

    def _attempt(self, work: Work, when: When) -> bool:
        done = self._way.attempt(work, when=when)
        if self._way.is_away:
            self._run.forget()
        return done


def status_of(error: BaseException) -> str:
    """MLflow's status of what an error ended: it failed, or was ended on purpose."""
    is_meant = isinstance(error, KeyboardInterrupt | SystemExit | EndedEarlyError)
    return "KILLED" if is_meant else "FAILED"


def tell_unsent(way: Connection, folder: Path) -> None:
    """One line: what MLflow does not have of a folder, and the command that sends it."""
    log.warning(
        "MLflow at %s does not have all of %s: `alignlab track %s` sends what is missing",
        *(way.shown, folder, folder),
    )


def experiment_name(config: TrainingConfig) -> str:
    """The experiment of a run, comparison or sweep."""
    return config.name.split("/")[0]


def ask(config: TrainingConfig) -> None:
    """Tells before a model is built whether MLflow does not answer."""
    way = connection(config)
    if way is not None:
        way.attempt(lambda client: experiment_id(client, experiment_name(config), way))


def runs_address(folder: Path, config: TrainingConfig) -> str | None:
    """Where the runs of a folder's experiment are shown; None if MLflow never had it."""
    way, state = connection(config), read_state(folder)
    if way is None or "experiment_id" not in state:
        return None
    return way.runs_address(state["experiment_id"])
