"""What a sampler draws for a trial: all at once, so that no kill leaves a part of it.

Optuna keeps the params of a trial one by one, and the next draw depends on those before: a worker
that is killed between two of them leaves params that no other worker would draw. Here all are drawn
first, kept in one write, and then given to Optuna as params that are fixed.
"""

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import _filter_study
from optuna.trial import FrozenTrial

from alignlab.experiments.sweep.config import SweepConfig
from alignlab.experiments.sweep.samplers import build_sampler
from alignlab.experiments.sweep.space import distributions

FIXED = "fixed_params"  # Optuna's name of the system attribute


def fix_params(study: optuna.Study, trial_id: int, config: SweepConfig) -> None:
    """Draws the params of a trial and keeps them; nothing where they are kept already."""
    storage = study._storage
    trial = storage.get_trial(trial_id)
    space = {
        name: distribution
        for key, parameter in config.space.items()
        for name, distribution in distributions(key, parameter).items()
    }
    if FIXED in trial.system_attrs or space.keys() <= trial.params.keys():
        return
    for key in trial.system_attrs:
        # what a worker drew that was killed here; samplers take it for another trial's
        if ":relative_params:" in key:
            storage.set_trial_system_attr(trial_id, key, "")
    sampler = build_sampler(config.sampler, trial.number)
    params = _drawn(study, sampler, storage.get_trial(trial_id), space)
    storage.set_trial_system_attr(trial_id, FIXED, params)


def _drawn(
    study: optuna.Study,
    sampler: optuna.samplers.BaseSampler,
    trial: FrozenTrial,
    space: Mapping[str, BaseDistribution],
) -> dict[str, Any]:
    """The params that Optuna would draw, in the order of `space`."""
    seen = _filter_study(study, trial)  # hyperband: the trials of one bracket
    sampler.before_trial(seen, trial)
    relative: dict[str, Any] | None = None
    params: dict[str, Any] = {}
    for name, distribution in space.items():
        if distribution.single():
            params[name] = _only_value(distribution)
            continue
        if relative is None:
            joint = sampler.infer_relative_search_space(seen, trial)
            relative = sampler.sample_relative(seen, trial, joint)
        if name in relative and distribution._contains(
            distribution.to_internal_repr(relative[name])
        ):
            params[name] = relative[name]
        else:
            params[name] = sampler.sample_independent(seen, trial, name, distribution)
    return params


def _only_value(distribution: BaseDistribution) -> Any:
    match distribution:
        case CategoricalDistribution(choices=choices):
            return choices[0]
        case FloatDistribution(low=low) | IntDistribution(low=low):
            return low
    raise TypeError(distribution)
