"""A sweep in MLflow: one parent run per study, one run per trial under it, training runs below.

Optuna's study and trials keep the MLflow run ids as user attributes (a trial that ended before
MLflow answered has it in `mlflow.json` in its folder alone), MLflow's runs the study's name and the
trial's number as tags. All of it is made from what Optuna keeps, so that what could
not be sent at the time is sent later.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from alignlab.experiments.sweep.lease import Watch
from alignlab.experiments.sweep.study import METRICS, SAME_AS, SweepStudy, shown_url, sweep_folder
from alignlab.runs.log_filters import quiet_libraries
from alignlab.tracking.connection import NOW, UNLESS_AWAY, Connection, When, connection
from alignlab.tracking.mlflow_run import ENDED, PARENT, MlflowRun, read_state, write_tags
from alignlab.tracking.names import tracked_name
from alignlab.tracking.send import send_each_unless_ended
from alignlab.tracking.tracker import END_S, experiment_name, status_of, tell_unsent

MLFLOW_ID = "mlflow_run_id"
STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
FILES = ("recipe.yaml", "best.yaml", "trials.csv", "sweep.html")


class SweepTracker:
    """Writes the runs of a study and its trials; does nothing with `tracking.mlflow: none`."""

    def __init__(self, sweep: SweepStudy) -> None:
        self._sweep = sweep
        self._folder = sweep_folder(sweep.config)
        self._place = sweep.config.base.tracking.mlflow
        self._way = connection(sweep.config.base)
        self._watch = Watch()

    @contextmanager
    def studied(self) -> Iterator[None]:
        """Opens the parent run for a while; an error closes it."""
        if self._way is None:
            yield
            return
        way, run = self._way, self._study_run(self._way)
        with quiet_libraries():
            self._open(way, run)
        try:
            yield
        except BaseException as error:
            status = status_of(error)
            if run.run_id and not way.is_away:
                way.attempt(lambda client: run.close(client, status), when=NOW)
            raise

    def end_study(self, metrics: Mapping[str, float]) -> bool:
        """Sends what MLflow lacks, and closes the parent run with the best trial's metrics.

        The runs of trials that nobody works on are closed as well, and the parent's of a sweep
        that nobody does: `KILLED`, as long as the sweep is not resumed.

        Returns:
            Whether MLflow has all of it.
        """
        if self._way is None:
            return True
        way, run = self._way, self._study_run(self._way)
        with quiet_libraries():
            complete = self._open(way, run, when=NOW)
            has_all = complete and self._send_trials(way)
            if any(self._is_busy(trial) for trial in self._sweep.trials()):
                return has_all
            status = "FINISHED" if self._sweep.is_finished() else "KILLED"
            if complete and not way.is_away:
                ended = [t.datetime_complete for t in self._sweep.trials() if t.datetime_complete]
                when_s = max(moment.timestamp() for moment in ended) if ended else time.time()

                files = [self._folder / name for name in FILES]
                has_all = way.upload(run.upload, files) and has_all

                def close(client: Any) -> None:
                    run.set_metrics(client, metrics, when_s)
                    run.close(client, status, complete=has_all)

                complete = way.attempt(close, when=NOW)
            complete = complete and has_all
        if not complete:
            tell_unsent(way, self._folder)
        return complete

    def begin_trial(self, trial: optuna.Trial, values: Mapping[str, Any]) -> None:
        """Creates the trial's run, or opens it again where the trial is resumed."""
        if self._way is None:
            return
        run = self._trial_run(self._way, trial.number, trial.user_attrs, values)
        with quiet_libraries():
            if self._way.attempt(run.open) and trial.user_attrs.get(MLFLOW_ID) != run.run_id:
                trial.set_user_attr(MLFLOW_ID, run.run_id)

    def begin_run(self, trial: optuna.Trial, folder: Path) -> None:
        """Says in the folder of a training run, which may not exist, whose child it is."""
        if self._way is not None:
            self._tell_run(folder, trial.number)

    def end_trial(self, trial: optuna.Trial) -> None:
        """Closes the run of a trial that has ended."""
        if self._way is not None:
            with quiet_libraries():
                self._send_trial(self._way, self._sweep.trials()[trial.number])

    def _open(self, way: Connection, run: MlflowRun, *, when: When = UNLESS_AWAY) -> bool:
        done = way.attempt(run.open, when=when)
        study = self._sweep.study
        if done and study.user_attrs.get(MLFLOW_ID) != run.run_id:
            study.set_user_attr(MLFLOW_ID, run.run_id)
        return done

    def _study_run(self, way: Connection) -> MlflowRun:
        study = self._sweep.study
        return MlflowRun(
            self._folder,
            way,
            experiment=experiment_name(self._sweep.config.base),
            name=study.study_name,
            tags={
                "optuna.study": study.study_name,
                "optuna.storage": shown_url(self._sweep.config),
            },
            known_id=study.user_attrs.get(MLFLOW_ID, ""),
        )

    def _trial_run(
        self,
        way: Connection,
        number: int,
        attrs: Mapping[str, Any],
        values: Mapping[str, Any],
        state: str = "",
    ) -> MlflowRun:
        study = self._sweep.study
        tags = {"optuna.study": study.study_name, "optuna.trial": str(number)}
        if SAME_AS in attrs:
            tags["optuna.same_as"] = str(attrs[SAME_AS])
        if state:
            tags["optuna.state"] = state
        folder = self._trial_folder(number)
        self._tell_trial(number)
        return MlflowRun(
            folder,
            way,
            experiment=experiment_name(self._sweep.config.base),
            name=f"{study.study_name}/{folder.name}",
            tags=tags,
            params={tracked_name(key): str(value) for key, value in values.items()},
            known_id=attrs.get(MLFLOW_ID, ""),
        )

    def _send_trials(self, way: Connection) -> bool:
        """Sends what MLflow lacks of trials that have ended, and of the runs below them."""
        complete, until = True, time.monotonic() + END_S
        for trial in self._sweep.trials():
            folder, finished = self._trial_folder(trial.number), trial.state.is_finished()
            if self._is_busy(trial) or not (finished or read_state(folder)):
                continue
            self._tell_trial(trial.number)
            if not finished or ENDED not in read_state(folder):
                if time.monotonic() > until or not self._send_trial(way, trial, when=NOW):
                    return False
            runs = self._run_folders(trial.number)
            for run in runs:
                self._tell_run(run, trial.number)
            sent = send_each_unless_ended(runs, way, to=self._place, until=until)
            complete = complete and sent
            if way.is_away:
                return False
        return complete

    def _send_trial(self, way: Connection, trial: FrozenTrial, *, when: When = UNLESS_AWAY) -> bool:
        from alignlab.experiments.sweep.results import trial_values  # which reads this module

        values, attrs = trial_values(self._sweep, trial), trial.user_attrs
        run = self._trial_run(way, trial.number, attrs, values, trial.state.name)
        means = {name: fmean(by_seed) for name, by_seed in attrs.get(METRICS, {}).items()}
        ended = trial.datetime_complete
        when_s = time.time() if ended is None else ended.timestamp()

        def work(client: Any) -> None:
            run.open(client)
            run.set_metrics(client, means, when_s)
            run.close(client, STATUS.get(trial.state.name, "KILLED"))

        return way.attempt(work, when=when)

    def _is_busy(self, trial: FrozenTrial) -> bool:
        """Whether somebody works on it."""
        return trial.state == TrialState.RUNNING and not self._watch.is_dead(trial)

    def _tell_run(self, folder: Path, number: int) -> None:
        """Writes into the folder of a trial's run whose child it is."""
        parent = read_state(self._trial_folder(number)).get("run_id")
        write_tags(folder, {"optuna.trial": str(number)} | ({PARENT: parent} if parent else {}))

    def _tell_trial(self, number: int) -> None:
        """Writes into the folder of a trial whose child it is."""
        parent = self._sweep.study.user_attrs.get(MLFLOW_ID)
        write_tags(self._trial_folder(number), {PARENT: parent} if parent else {})

    def _run_folders(self, number: int) -> list[Path]:
        """Of the seeds that were trained or are about to be; a duplicate has none."""
        folder = self._trial_folder(number)
        return [path.parent for path in sorted(folder.glob("seed-*/recipe.yaml"))]

    def _trial_folder(self, number: int) -> Path:
        return self._folder / f"trial-{number:04d}"
