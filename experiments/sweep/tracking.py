"""A sweep in MLflow: one parent run per study, one run per trial under it, training runs below.

Optuna's study and trials keep the MLflow run ids as user attributes, MLflow's runs the study's
name and the trial's number as tags.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

from alignlab.experiments.sweep.study import SweepStudy, shown_url
from alignlab.runs.log_filters import quiet_libraries
from alignlab.tracking import experiment_id, mlflow_client

MLFLOW_ID = "mlflow_run_id"
PARENT = "mlflow.parentRunId"
STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}


class SweepTracker:
    """Writes the runs of a study and its trials; does nothing with `tracking.mlflow: none`."""

    def __init__(self, sweep: SweepStudy) -> None:
        self._sweep = sweep
        self._client: Any = None
        self._experiment = ""
        base = sweep.config.base
        if base.tracking.mlflow != "none":
            with quiet_libraries(), mlflow_client(base) as self._client:
                self._experiment = experiment_id(self._client, base)

    def begin_study(self) -> None:
        """Creates the parent run, or opens it again."""
        if self._client is None:
            return
        study = self._sweep.study
        run_id = study.user_attrs.get(MLFLOW_ID)
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            return
        tags = {"optuna.study": study.study_name, "optuna.storage": shown_url(self._sweep.config)}
        run = self._client.create_run(self._experiment, run_name=study.study_name, tags=tags)
        study.set_user_attr(MLFLOW_ID, run.info.run_id)

    def end_study(self, metrics: Mapping[str, float]) -> None:
        """Closes the parent run with the best trial's metrics."""
        if self._client is not None:
            run_id = self._sweep.study.user_attrs[MLFLOW_ID]
            self._log_metrics(run_id, metrics)
            self._client.set_terminated(run_id, "FINISHED")

    def begin_trial(self, trial: optuna.Trial, values: Mapping[str, Any]) -> None:
        """Creates the trial's run, or opens it again where the trial is resumed."""
        if self._client is None:
            return
        run_id = trial.user_attrs.get(MLFLOW_ID)
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            return
        study = self._sweep.study
        tags = {
            PARENT: study.user_attrs[MLFLOW_ID],
            "optuna.study": study.study_name,
            "optuna.trial": str(trial.number),
        }
        name = f"{study.study_name}/trial-{trial.number:04d}"
        run_id = self._client.create_run(self._experiment, run_name=name, tags=tags).info.run_id
        for key, value in values.items():
            self._client.log_param(run_id, key, str(value))
        trial.set_user_attr(MLFLOW_ID, run_id)

    def link_run(self, trial: optuna.Trial, run_folder: Path) -> None:
        """Puts a training run under its trial."""
        if self._client is not None:
            run_id = (run_folder / MLFLOW_ID).read_text().strip()
            self._client.set_tag(run_id, PARENT, trial.user_attrs[MLFLOW_ID])
            self._client.set_tag(run_id, "optuna.trial", str(trial.number))

    def tag_duplicate(self, trial: optuna.Trial, number: int) -> None:
        """Says whose result the trial has: that of the trial of this number."""
        if self._client is not None:
            self._client.set_tag(trial.user_attrs[MLFLOW_ID], "optuna.same_as", str(number))

    def end_trial(self, trial: optuna.Trial, state: str, metrics: Mapping[str, float]) -> None:
        """Closes the trial's run; `state` is Optuna's name of the trial's end."""
        if self._client is not None:
            run_id = trial.user_attrs[MLFLOW_ID]
            self._log_metrics(run_id, metrics)
            self._client.set_tag(run_id, "optuna.state", state)
            self._client.set_terminated(run_id, STATUS[state])

    def _log_metrics(self, run_id: str, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._client.log_metric(run_id, key, value)
