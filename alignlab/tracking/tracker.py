"""The log of a training: `metrics.jsonl`, and the trackers that follow it."""

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from alignlab.config.parts import TrainingConfig
from alignlab.config.run import RunConfig
from alignlab.errors import EndedEarlyError, UserError, one_line
from alignlab.model_card import FILE, model_card
from alignlab.passwords import without_password
from alignlab.recipe import recipe_hash
from alignlab.runs.checksums import write_json
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
from alignlab.tracking.other_trackers import OtherTrackers, check_packages
from alignlab.tracking.run_content import datasets, digest_tags, run_files
from alignlab.tracking.system_metrics import SystemMetrics

log = logging.getLogger(__name__)

END_S = 60.0  # for the rows that are left at the end of a training
INTERRUPTED_S = 5.0


class Tracker:
    """Writes rows of scalars; a context manager around training.

    Rows are written to `metrics.jsonl` first, and sent to MLflow from there: at once, or together
    where MLflow is slow, or when it answers again, at the latest at the end. What is missing then,
    `alignlab track` sends. A resumed run continues the same MLflow run, and rows that will be
    written again are dropped from `metrics.jsonl`; MLflow gets no row twice. The trackers of
    `tracking.also` follow the file likewise (`other_trackers.py`).

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
            self._shipper.system_metrics = config.tracking.system_metrics
        keep_rows(folder.metrics, start)
        folder.error.unlink(missing_ok=True)
        self._others: OtherTrackers | None = None
        self._begin_others = partial(OtherTrackers, folder, config, anew=start == 0)

    def __enter__(self) -> Self:
        if self._shipper is not None:
            self._shipper.ship(UNLESS_AWAY)
        self._others = self._begin_others()
        return self

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """One row; `step` counts finished optimizer steps."""
        row = {"step": step, "time": round(time.time(), 3), **scalars}
        append_row(self._folder.metrics, row)
        if self._shipper is not None:
            self._shipper.add(row)
            self._shipper.ship(PACED)
        if self._others is not None:
            self._others.log(row)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        status = "FINISHED" if exc is None else status_of(exc)
        if isinstance(exc, Exception) and status == "FAILED":
            told = without_password(one_line(exc)) or type(exc).__name__
            with suppress(OSError):  # maybe the disk is full, and that is what is raised
                write_json(self._folder.error, {"error": told})
        if self._others is not None:
            self._others.end(status)
        if self._shipper is not None:
            self._shipper.end(status, within_s=END_S if exc is None else INTERRUPTED_S)


class SilentTracker(Tracker):
    """Of a rank that leaves the log to rank 0."""

    def __init__(self) -> None:
        self._shipper = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

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
        self.system_metrics = False
        """Whether MLflow measures the machine while the run is open."""
        self._monitor: SystemMetrics | None = None
        self._way = way
        self._folder = folder
        self._config = config
        tags = {f"alignlab.{key}": value for key, value in environment.items()}
        tags |= {RECIPE_HASH: recipe_hash(config), "alignlab.seed": str(config.seed)}
        tags |= digest_tags(folder, config)
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
            if self.system_metrics and self._monitor is None:
                self._monitor = SystemMetrics(self._run.run_id, self._way.uri)
            self._run.send(client)

        return self._attempt(work, when)

    def end(self, status: str, *, within_s: float) -> bool:
        """Sends the rows that are left, and files, and ends the run; whether MLflow has it all.

        Args:
            status: `FINISHED`, `FAILED` or `KILLED`.
            within_s: no further request is begun after that.
        """
        until = time.monotonic() + within_s
        if self._monitor is not None:
            self._monitor.end()
            self._monitor, self.system_metrics = None, False
        went_well = self.ship(NOW)
        while went_well and self._run.unsent and time.monotonic() < until:
            went_well = self.ship(NOW)
        unsent = self._run.unsent
        if went_well:
            has_files = self._send_content(until)
            went_well = self._attempt(
                lambda client: self._run.close(client, status, complete=has_files), NOW
            )
            went_well = went_well and has_files
        complete = went_well and not unsent
        if not complete and not (self._folder.path / TAGS).exists():  # else its parent tells
            tell_unsent(self._way, self._folder.path)
        return complete

    def _send_content(self, until: float) -> bool:
        """Adds what a run has besides rows; whether MLflow has all of it that it takes."""
        run, facts = self._run, datasets(self._folder, self._config)
        files = run_files(self._folder)
        done = self._way.upload(run.upload, files[:2], until=until)  # first what was there always
        done = done and time.monotonic() < until
        done = done and self._attempt(lambda client: run.set_datasets(client, facts), NOW)
        done = done and self._way.upload(run.upload, files[2:], until=until)
        if not done or not isinstance(self._config, RunConfig) or not self._folder.result.exists():
            return done
        try:
            card = model_card(self._folder)
        except UserError as error:  # a damaged file; what there is was sent
            log.warning("no model card: %s", error)
            return True
        return time.monotonic() < until and self._way.add(
            lambda client: run.upload_text(client, FILE, card)
        )

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
    """Tells before a model is built whether MLflow does not answer.

    Raises:
        UserError: a tracker's package is not installed.
    """
    check_packages(config)
    way = connection(config)
    if way is not None:
        way.attempt(lambda client: experiment_id(client, experiment_name(config), way))


def runs_address(folder: Path, config: TrainingConfig) -> str | None:
    """Where the runs of a folder's experiment are shown; None if MLflow never had it."""
    way, state = connection(config), read_state(folder)
    if way is None or "experiment_id" not in state:
        return None
    return way.runs_address(state["experiment_id"])
