"""Optuna's samplers and pruners from a sweep's recipe, and what they need.

A sampler is built anew for every trial, seeded by the trial's number: workers never repeat each
other's draws, and a sweep resumed after a kill draws what it would have drawn. `random` and `grid`
promise that with any number of workers, the others with one at a time: they learn from the trials
that ended before, and with several workers that depends on which is faster.
"""

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.distributions import CategoricalDistribution

from alignlab.errors import UserError
from alignlab.experiments.sweep.config import SamplerConfig, SweepConfig, steps_between
from alignlab.experiments.sweep.space import distributions
from alignlab.randomness import generator

NEEDS = {"gp": ("scipy", "torch"), "cmaes": ("cmaes", "scipy")}


@contextmanager
def experimental_accepted() -> Iterator[None]:
    """Optuna warns of interfaces that may change; the tests would notice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def check_sampler(config: SweepConfig) -> None:
    """Refuses a sampler that cannot run here, or not on this space.

    Raises:
        UserError: a package is missing, or the space or the number of metrics does not suit it.
    """
    name = config.sampler.name
    for package in NEEDS.get(name, ()):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"sampler: {name} needs the package {package}: pip install {package}, "
                "or choose another sampler"
            )
    if name != "cmaes":
        return
    if len(config.metric) > 1:
        raise UserError("sampler: cmaes optimises one metric; use nsga2, tpe or gp for several")
    for key, parameter in config.space.items():
        for distribution in distributions(key, parameter).values():
            if isinstance(distribution, CategoricalDistribution):
                raise UserError(
                    f"sampler: cmaes cannot choose among categories (space.{key}); "
                    "use tpe, gp, random or nsga2"
                )


def build_sampler(config: SamplerConfig, number: int) -> optuna.samplers.BaseSampler:
    """The sampler that draws the params of trial `number`."""
    seed = generator(config.seed, "sweep", number).initial_seed() % 2**32
    startup = config.startup
    match config.name:
        case "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup or 10)
        case "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup or 10)
        case "cmaes":
            size = config.population
            return optuna.samplers.CmaEsSampler(
                seed=seed, popsize=size, n_startup_trials=startup or 1
            )
        case "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=config.population or 50)
        case "random" | "grid":  # a grid's points are fixed when the study is made
            return optuna.samplers.RandomSampler(seed=seed)


def reads_earlier_trials(config: SweepConfig) -> bool:
    """Whether what a trial draws, or how far it trains, depends on the trials that ended before."""
    return config.sampler.name not in ("random", "grid") or config.pruner.name != "none"


def build_pruner(config: SweepConfig) -> optuna.pruners.BasePruner:
    """The pruner; for its steps see `experiments.sweep.pruning`."""
    pruner = config.pruner
    match pruner.name:
        case "none":
            return optuna.pruners.NopPruner()
        case "median":
            startup = 5 if pruner.startup is None else pruner.startup
            return optuna.pruners.MedianPruner(n_startup_trials=startup)
        case "hyperband":
            every = steps_between(config)
            last = len(config.seeds) * (1 if every is None else config.base.steps)
            return optuna.pruners.HyperbandPruner(
                min_resource=every or 1,
                max_resource=last,
                reduction_factor=pruner.reduction or 3,
            )
        case "wilcoxon":
            with experimental_accepted():
                return optuna.pruners.WilcoxonPruner(p_threshold=pruner.p or 0.1)
