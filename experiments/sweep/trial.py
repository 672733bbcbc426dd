"""One trial of a sweep: the recipe with the trial's values, trained once per seed."""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from alignlab.config.data import unknown_name
from alignlab.config.run import RunConfig
from alignlab.errors import UserError, one_line
from alignlab.experiments.sweep.config import SweepConfig
from alignlab.experiments.sweep.lease import Lease
from alignlab.experiments.sweep.space import apply_values, suggest_values, tapped_blocks
from alignlab.experiments.sweep.tracking import SweepTracker
from alignlab.runs.run_folder import RunFolder
from alignlab.train import train
from alignlab.training.aligned_samples import check_recipe
from alignlab.training.setup import Caches, shared_caches

log = logging.getLogger(__name__)

METRICS = "metrics"  # user attribute: metric -> one value per finished seed
ERROR = "error"


class LostTrialError(Exception):
    """Another worker has taken the trial over."""


@dataclass
class Outcome:
    """How a trial ended.

    Args:
        state: COMPLETE, PRUNED, or FAIL for a run that cannot be trained to its end.
        metrics: all metrics by name, one value per finished seed.
        error: why it failed.
    """

    state: TrialState
    metrics: dict[str, list[float]] = field(default_factory=dict)
    error: str = ""


class TrialRunner:
    """Trains trials in this process; encoded clips are shared between them."""

    def __init__(self, config: SweepConfig, tracker: SweepTracker) -> None:
        self._config = config
        self._tracker = tracker
        self._caches: dict[str, Caches] = {}

    def run(self, trial: optuna.Trial, lease: Lease) -> None:
        """Trains what is not trained yet of a trial, and tells Optuna how it ended.

        Raises:
            LostTrialError: the lease is no longer held.
            UserError: a run cannot even be built: the recipe, not the trial, is at fault.
        """
        values = suggest_values(trial, self._config.space)
        self._tracker.begin_trial(trial, values)
        log.info("trial %d: %s", trial.number, shown_values(values))
        outcome = self._train(trial, values)
        if not lease.is_held():
            raise LostTrialError
        if outcome.error:
            log.info("trial %d failed: %s", trial.number, outcome.error)
            trial.set_user_attr(ERROR, outcome.error)
        trial.set_user_attr(METRICS, outcome.metrics)
        means = {name: fmean(by_seed) for name, by_seed in outcome.metrics.items()}
        optimized = None
        if outcome.state == TrialState.COMPLETE:
            optimized = [means[metric.name] for metric in self._config.metric]
        trial.study.tell(trial, optimized, state=outcome.state)
        self._tracker.end_trial(trial, outcome.state.name, means)

    def _train(self, trial: optuna.Trial, values: dict[str, Any]) -> Outcome:
        metrics: dict[str, list[float]] = {}
        for done, seed in enumerate(self._config.seeds, 1):
            try:
                run = trial_run(self._config, values, trial.number, seed)
            except UserError as error:  # each value fits, but not with the others
                return Outcome(TrialState.FAIL, metrics, str(error))
            _forget_start(run)
            try:
                folder = train(run, caches=shared_caches(run, self._caches), wait=True)
            except (UserError, torch.OutOfMemoryError) as error:
                if not _was_built(run) and isinstance(error, UserError):
                    raise
                return Outcome(TrialState.FAIL, metrics, one_line(error))
            self._tracker.link_run(trial, folder)
            for name, value in self._result(folder).items():
                metrics.setdefault(name, []).append(value)
            if self._is_bad(trial, metrics, done) and done < len(self._config.seeds):
                return Outcome(TrialState.PRUNED, metrics)
        for name, bound in self._config.constraints.items():
            if name not in _stored(trial).constraints:  # a resumed trial may come again
                trial.set_constraint(name, fmean(metrics[name]) - bound)
        for metric in self._config.metric:
            if not math.isfinite(fmean(metrics[metric.name])):
                return Outcome(TrialState.FAIL, metrics, f"{metric.name} is not finite")
        return Outcome(TrialState.COMPLETE, metrics)

    def _result(self, folder: Path) -> dict[str, float]:
        result = RunFolder(folder).read_result()
        assert result is not None
        metrics: dict[str, float] = result["metrics"]
        for name in (*(m.name for m in self._config.metric), *self._config.constraints):
            if name not in metrics:
                raise UserError(f"metric: {unknown_name('metric', name, metrics)}")
        return metrics

    def _is_bad(self, trial: optuna.Trial, metrics: dict[str, list[float]], done: int) -> bool:
        """Reports the seeds finished so far; whether the pruner stops the trial."""
        if self._config.pruner.name == "none":
            return False
        by_seed = metrics[self._config.metric[0].name]
        paired = self._config.pruner.name == "wilcoxon"
        if done not in _stored(trial).intermediate_values:
            trial.report(by_seed[-1] if paired else fmean(by_seed), step=done)
        return trial.should_prune()


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


def shown_values(values: dict[str, Any]) -> str:
    """Values as they would be written on the command line."""
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in values.items()
    )


def _stored(trial: optuna.Trial) -> FrozenTrial:
    """The trial as the storage has it."""
    return trial.study.get_trials(deepcopy=False)[trial.number]


def _forget_start(run: RunConfig) -> None:
    """Removes the mark that an earlier, killed start of a run has left; see `_was_built`."""
    folder = RunFolder(Path(run.output) / run.name)
    if folder.read_result() is None:
        (folder.path / "environment.json").unlink(missing_ok=True)


def _was_built(run: RunConfig) -> bool:
    """Whether the run began to train, so that its failure says something about its settings."""
    return (Path(run.output) / run.name / "environment.json").exists()
