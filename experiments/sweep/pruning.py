"""When a trial that does badly is stopped: inside the run of its first seed, and between seeds.

Where a run measures the metric while it trains (`eval.every`; of generated clips
`eval.sample_every`), `median` and `hyperband` judge the run of the first seed at each of these
steps. Later seeds are judged at their ends only: `median` takes the best that a trial has had,
which is then that of a finished run. A trial's step is the number of optimizer steps that it has
trained, over its seeds, so a number is compared with those of other trials of the same seeds at the
same step, and with no others. Where nothing is measured inside, and for `wilcoxon`, steps are seeds
finished.

Every decision is kept: a trial that is resumed after a kill reports no number twice and decides
what it had decided.
"""

from typing import Any

import optuna
from optuna.storages import BaseStorage

from alignlab.errors import EndedEarlyError
from alignlab.experiments.sweep.config import SweepConfig, steps_between

DECISION = "pruning:"  # user attributes: the decision at a step, and what the pruner keeps of it
PRUNED_AT = "pruned_at"  # user attribute: optimizer steps over the trial's seeds


class PrunedRunError(EndedEarlyError):
    """Ends a run inside of which its trial was pruned."""


def judges_inside(config: SweepConfig) -> bool:
    """Whether a trial may be pruned while its first seed trains."""
    return steps_between(config) is not None


def trained_steps(config: SweepConfig, seeds: int) -> int:
    """Optimizer steps of a trial after so many seeds."""
    return seeds * config.base.steps


def is_pruned(trial: optuna.Trial, value: float, step: int) -> bool:
    """Reports a trial's number at a step, once, and gives the pruner's decision there."""
    study, key = trial.study, f"{DECISION}{step}"
    storage: BaseStorage = study._storage
    decision = stored_trial(trial).user_attrs.get(key)
    if decision is None:
        if step not in stored_trial(trial).intermediate_values:
            trial.report(value, step=step)
        # a pruner writes into the trial before it has decided: asked again, it would decide
        # otherwise
        held: Any = _HeldWrites(storage)
        seen = optuna.Study(study.study_name, held, study.sampler, study.pruner)
        pruned = bool(optuna.Trial(seen, trial._trial_id).should_prune())  # may be numpy's
        decision = {"pruned": pruned, "kept": held.written}
        trial.set_user_attr(key, decision)
    for name, kept in decision["kept"].items():
        storage.set_trial_system_attr(trial._trial_id, name, kept)
    return bool(decision["pruned"])


class _HeldWrites:
    """A storage that is read only: attributes of trials are kept here."""

    def __init__(self, storage: BaseStorage) -> None:
        self.written: dict[str, Any] = {}
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.written[key] = value


def stored_trial(trial: optuna.Trial) -> optuna.trial.FrozenTrial:
    """The trial as the storage has it."""
    return trial.study.get_trials(deepcopy=False)[trial.number]
