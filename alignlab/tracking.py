"""Scalars of a run: `metrics.jsonl` always, MLflow unless the recipe says `none`."""

import errno
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock

from alignlab.config.merging import flatten
from alignlab.config.parts import TrainingConfig
from alignlab.config.paths import expanded_url, sqlite_url, user_path
from alignlab.recipe import recipe_hash
from alignlab.runs.atomic_files import write_text
from alignlab.runs.metric_rows import append_row, keep_rows
from alignlab.runs.run_folder import RunFolder

MAX_PARAM = 6000  # MLflow refuses longer values


class Tracker:
    """Writes rows of scalars; a context manager around training.

    A resumed run continues the same MLflow run (a new one where the tracking server does not know
    it), and rows that will be written again are dropped from `metrics.jsonl`.

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
        self._config = config
        self._environment = environment
        self._mlflow: Any = None
        self._run_id = ""
        keep_rows(folder.metrics, start)

    def __enter__(self) -> Self:
        if self._config.tracking.mlflow != "none":
            self._start_mlflow()
        return self

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """One row; `step` counts finished optimizer steps."""
        row = {"step": step, "time": round(time.time(), 3), **scalars}
        append_row(self._folder.metrics, row)
        if self._mlflow is not None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            metrics = [Metric(key, value, now, step) for key, value in scalars.items()]
            with _database_errors(self._config):
                self._mlflow.log_batch(self._run_id, metrics=metrics)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._mlflow is None:
            return
        from mlflow.exceptions import MlflowException

        try:
            self._mlflow.set_terminated(self._run_id, "FINISHED" if exc is None else "FAILED")
        except MlflowException:
            if exc is None:  # else the error that ended the run says more
                raise

    def _start_mlflow(self) -> None:
        id_file = self._folder.path / "mlflow_run_id"
        with mlflow_client(self._config) as client:
            self._mlflow = client
            known = self._continue_run(id_file.read_text().strip()) if id_file.exists() else None
            self._run_id = known or self._create_run()
        write_text(id_file, self._run_id)

    def _continue_run(self, run_id: str) -> str | None:
        from mlflow.exceptions import MlflowException

        try:
            self._mlflow.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run_id

    def _create_run(self) -> str:
        experiment = experiment_id(self._mlflow, self._config)
        tags = {f"alignlab.{key}": value[:MAX_PARAM] for key, value in self._environment.items()}
        tags["alignlab.recipe_hash"] = recipe_hash(self._config)
        run = self._mlflow.create_run(experiment, run_name=self._config.name, tags=tags)
        for key, value in flatten(self._config.model_dump(mode="json")).items():
            self._mlflow.log_param(run.info.run_id, key, str(value)[:MAX_PARAM])
        return str(run.info.run_id)


class SilentTracker(Tracker):
    """Of a rank that leaves the log to rank 0."""

    def __init__(self) -> None:
        self._mlflow = None

    def __enter__(self) -> Self:
        return self

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        pass


@contextmanager
def mlflow_client(config: TrainingConfig) -> Iterator[Any]:
    """MLflow's client of a recipe, whose `tracking.mlflow` is not `none`.

    While this is entered, no other process does the same with a database in `output`: runs that
    start at once must not all create its tables, or an experiment of the same name.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # no network unless asked
    from mlflow import MlflowClient

    uri, database = config.tracking.mlflow, _mlflow_database(config)
    lock = FileLock(f"{database}.lock") if uri == "sqlite" else nullcontext()
    with _database_errors(config), lock:
        yield MlflowClient(sqlite_url(database) if uri == "sqlite" else expanded_url(uri))


def experiment_id(client: Any, config: TrainingConfig) -> str:
    """Id of the MLflow experiment of a run, comparison or sweep; it is created if need be."""
    name = config.name.split("/")[0]
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    artifacts = _mlflow_database(config).with_name("mlartifacts").as_uri()
    return str(client.create_experiment(name, artifact_location=artifacts))


@contextmanager
def _database_errors(config: TrainingConfig) -> Iterator[None]:
    """A full disk under MLflow's database is the OSError that it is everywhere else."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    try:
        yield
    except (MlflowException, OperationalError) as error:
        if "disk is full" not in str(error):
            raise
        database = str(_mlflow_database(config))
        raise OSError(errno.ENOSPC, "No space left on device", database) from error


def _mlflow_database(config: TrainingConfig) -> Path:
    return user_path(config.output).resolve() / "mlflow.db"
