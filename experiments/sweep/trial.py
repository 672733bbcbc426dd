"""One trial of a sweep: the recipe with the trial's values, trained once per seed."""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from alignlab.config.paths import user_path
from alignlab.config.run import RunConfig
from alignlab.errors import UserError, one_line
from alignlab.experiments.compare.own_metrics import (
    as_inputs,
    installed_own_metrics,
    own_metrics_of,
)
from alignlab.experiments.launchers.local import train_one
from alignlab.experiments.sweep.config import SweepConfig
from alignlab.experiments.sweep.lease import Lease
from alignlab.experiments.sweep.pruning import (
    PRUNED_AT,
    PrunedRunError,
    is_pruned,
    judges_inside,
    stored_trial,
    trained_steps,
)
from alignlab.experiments.sweep.space import apply_values, suggest_values, tapped_blocks
from alignlab.experiments.sweep.study import METRICS, SAME_AS, SweepStudy, sweep_folder
from alignlab.experiments.sweep.tracking import SweepTracker
from alignlab.passwords import without_password
from alignlab.runs.file_lock import file_lock
from alignlab.runs.input_record import InputRecord
from alignlab.runs.inputs import read_inputs
from alignlab.runs.kept_checkpoints import drop_pruned
from alignlab.runs.run_folder import RunFolder
from alignlab.training.aligned_samples import check_recipe
from alignlab.training.setup import Caches

log = logging.getLogger(__name__)

ERROR = "error"
LOOK_EVERY_S = 2.0


class LostTrialError(Exception):
    """Another worker has taken the trial over."""


class WaitForDuplicateError(Exception):
    """The trial that trains the same settings waits for a worker: it comes first."""


@dataclass
class Outcome:
    """How a trial ended.

    Args:
        state: COMPLETE, PRUNED, or FAIL for a run that diverged or cannot be trained to its end.
        metrics: all metrics by name, one value per finished seed.
        error: why it failed.
    """

    state: TrialState
    metrics: dict[str, list[float]] = field(default_factory=dict)
    error: str = ""


class TrialRunner:
    """Trains trials in this process; encoded clips are shared between them."""

    def __init__(self, study: SweepStudy, tracker: SweepTracker) -> None:
        self._study = study
        self._config = study.config
        self._tracker = tracker
        self._caches: dict[str, Caches] = {}

    def run(self, trial: optuna.Trial, lease: Lease) -> None:
        """Trains what is not trained yet of a trial, and tells Optuna how it ended.

        What another trial has trained with the same settings is taken from there.

        Raises:
            LostTrialError: the lease is no longer held.
            WaitForDuplicateError: the trial is to be put back.
            UserError: a run cannot even be built: the recipe, not the trial, is at fault.
        """
        values = suggest_values(trial, self._config.space)
        self._tracker.begin_trial(trial, values)
        log.info("trial %d: %s", trial.number, shown_values(values))
        outcome = self._train(trial, values, self._duplicate(trial))
        if not lease.is_held():
            raise LostTrialError
        if outcome.error:
            error = without_password(outcome.error)
            log.info("trial %d failed: %s", trial.number, error)
            trial.set_user_attr(ERROR, error)
        trial.set_user_attr(METRICS, outcome.metrics)
        means = {name: fmean(by_seed) for name, by_seed in outcome.metrics.items()}
        optimized = None
        if outcome.state == TrialState.COMPLETE:
            optimized = [means[metric.name] for metric in self._config.metric]
        trial.study.tell(trial, optimized, state=outcome.state)
        self._tracker.end_trial(trial)

    def _duplicate(self, trial: optuna.Trial) -> FrozenTrial | None:
        """The trial that has trained the same settings; waits for one that does so now."""
        waited = False
        while (duplicate := self._study.claim_settings(trial.number)) is not None:
            if duplicate.state.is_finished():
                break
            if duplicate.state == TrialState.WAITING:
                raise WaitForDuplicateError
            if not waited:
                log.info("trial %d: trial %d trains the same now", trial.number, duplicate.number)
            waited = True
            time.sleep(LOOK_EVERY_S)
            self._study.put_back_dead()
        if duplicate is not None:
            state, number = duplicate.state.name.lower(), duplicate.number
            log.info(
                "trial %d has the settings of trial %d: its result (%s) is reused and counts as a "
                "trial",
                *(trial.number, number, state),
            )
            trial.set_user_attr(SAME_AS, number)
        return duplicate

    def _train(
        self, trial: optuna.Trial, values: dict[str, Any], duplicate: FrozenTrial | None
    ) -> Outcome:
        first = self._config.metric[0].name
        metrics: dict[str, list[float]] = {}
        if duplicate is not None:
            stored = duplicate.user_attrs[METRICS]
            metrics = {name: list(by_seed) for name, by_seed in stored.items()}
        for done, seed in enumerate(self._config.seeds, 1):
            if done > len(metrics.get(first, ())):
                failed = self._train_seed(trial, values, seed, metrics)
                if failed is not None:
                    return failed
            if self._is_bad(trial, metrics[first][:done], done) and done < len(self._config.seeds):
                trial.set_user_attr(PRUNED_AT, trained_steps(self._config, done))
                return Outcome(TrialState.PRUNED, metrics)
        for name, bound in self._config.constraints.items():
            if name not in stored_trial(trial).constraints:  # a resumed trial may come again
                trial.set_constraint(name, fmean(metrics[name]) - bound)
        for metric in self._config.metric:
            if not math.isfinite(fmean(metrics[metric.name])):
                return Outcome(TrialState.FAIL, metrics, f"{metric.name} is not finite")
        return Outcome(TrialState.COMPLETE, metrics)

    def _train_seed(
        self,
        trial: optuna.Trial,
        values: dict[str, Any],
        seed: int,
        metrics: dict[str, list[float]],
    ) -> Outcome | None:
        """Trains a run and appends its metrics; the outcome of the trial if that fails."""
        try:
            run = trial_run(self._config, values, trial.number, seed)
        except UserError as error:  # each value fits, but not with the others
            return Outcome(TrialState.FAIL, metrics, str(error))
        start = _last_start(run)
        refuse_other_inputs(self._config, run)
        self._tracker.begin_run(trial, user_path(run.output) / run.name)
        inside = None
        if judges_inside(self._config) and seed == self._config.seeds[0]:
            inside = partial(self._judge, trial)
        caches, needs = self._caches, self._config.launch
        try:
            folder = train_one(run, caches, needs, wait=True, on_evaluation=inside)
        except PrunedRunError:  # the decision is stored by then
            drop_pruned(RunFolder(user_path(run.output) / run.name), run)
            return Outcome(TrialState.PRUNED, metrics)
        except (UserError, torch.OutOfMemoryError) as error:
            # what ends a run before it begins to train says nothing of the trial's settings
            if isinstance(error, UserError) and _last_start(run) == start:
                raise
            return Outcome(TrialState.FAIL, metrics, one_line(error))
        _record_inputs(self._config, folder)
        result = RunFolder(folder).read_result()
        assert result is not None
        for name, value in result["metrics"].items():
            metrics.setdefault(name, []).append(value)
        if result.get("diverged"):  # runs of older versions do not say
            return Outcome(TrialState.FAIL, metrics, f"diverged, seed {seed}")
        for name in (*(m.name for m in self._config.metric), *self._config.constraints):
            if name not in result["metrics"]:
                return Outcome(TrialState.FAIL, metrics, f"{name} was not measured, seed {seed}")
        return None

    def _judge(self, trial: optuna.Trial, step: int, metrics: Mapping[str, float]) -> None:
        """Ends the run of a first seed where the pruner stops the trial."""
        value = metrics.get(self._config.metric[0].name)
        if value is not None and is_pruned(trial, value, step):
            log.info("trial %d: pruned at step %d", trial.number, step)
            trial.set_user_attr(PRUNED_AT, step)
            raise PrunedRunError

    def _is_bad(self, trial: optuna.Trial, by_seed: list[float], done: int) -> bool:
        """Reports the seeds finished so far; whether the pruner stops the trial."""
        if self._config.pruner.name == "none":
            return False
        value = by_seed[-1] if self._config.pruner.name == "wilcoxon" else fmean(by_seed)
        inside = judges_inside(self._config)
        return is_pruned(trial, value, trained_steps(self._config, done) if inside else done)


def trial_run(config: SweepConfig, values: dict[str, Any], number: int, seed: int) -> RunConfig:
    """The run of a trial and seed, named `<name>/trial-<number>/seed-<seed>`.

    It is evaluated on every block that any trial may align, unless the recipe says which.

    Raises:
        UserError: the values do not fit each other, or leave an objective nothing to align.
    """
    run = apply_values(config.base, values)
    check_recipe(run)
    name = f"{config.name}/trial-{number:04d}/seed-{seed}"
    update: dict[str, Any] = {"name": name, "seed": seed}
    if run.eval.blocks is None:
        update["eval"] = run.eval.model_copy(update={"blocks": tapped_blocks(config)})
    return run.model_copy(update=update)


def trained_as(study: SweepStudy, trial: FrozenTrial) -> int:
    """Number of the trial in whose folder the run of a trial's first seed lies."""
    while (number := trial.user_attrs.get(SAME_AS)) is not None:
        trial = study.trials()[number]
    return trial.number


def repeated(study: SweepStudy) -> str:
    """How many trials took another's result, for the end of a sentence; empty for none."""
    count = sum(SAME_AS in trial.user_attrs for trial in study.trials())
    took = "trial has the settings of an earlier one and took its result"
    if count > 1:
        took = "trials have the settings of an earlier one and took its result"
    return f"; {count} {took}" if count else ""


def refuse_other_inputs(config: SweepConfig, run: RunConfig) -> InputRecord:
    """Refuses a run that would read other files than the finished runs of the sweep.

    Or that would be measured by other versions of a package's metrics.

    Returns:
        What these have read.

    Raises:
        UserError: it names the inputs and the files, or a package that is not installed.
    """
    record = InputRecord(sweep_folder(config), config.output)
    record.refuse_changes(
        [*read_inputs(run, fetch=False), *as_inputs(installed_own_metrics(run.eval))],
        since="this sweep began",
        remedy="choose another name=...",
    )
    return record


def _record_inputs(config: SweepConfig, run_folder: Path) -> None:
    """Adds what a finished run has read to what all trials must read."""
    folder = sweep_folder(config)
    with file_lock(folder / ".inputs.lock", waiting=lambda: f"waiting for a worker of {folder}"):
        record, of_run = (InputRecord(path, config.output) for path in (folder, run_folder))
        record.refuse_differences(
            of_run, remedy=f"remove {run_folder}, restore the files and resume the sweep"
        )
        metrics = as_inputs(own_metrics_of(RunFolder(run_folder)) or {})
        record.refuse_changes(
            metrics, since="this sweep began", remedy=f"remove {run_folder} and resume the sweep"
        )
        record.add(of_run.inputs.values())
        record.keep(metrics, fixed=False)


def shown_values(values: dict[str, Any]) -> str:
    """Values as they would be written on the command line."""
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in values.items()
    )


def _last_start(run: RunConfig) -> tuple[int, int] | None:
    """Which start of a run, as it begins to train, has written the facts about it; None: none has.

    The file is replaced by each, so that another one is another inode, or of another time.
    """
    path = user_path(run.output) / run.name / "environment.json"
    if not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns
