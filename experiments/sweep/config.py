"""The settings of a sweep: what is varied, how it is searched, what is optimised."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from alignlab.config.data import Settings
from alignlab.config.parts import Seeds
from alignlab.config.recipe_file import read_recipe
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.evaluation.measured_names import COSTS
from alignlab.experiments.launchers.config import LaunchConfig
from alignlab.recipe import refuse_other_command, to_yaml, validated

SWEEP_KEYS = (
    "space",
    "sampler",
    "pruner",
    "metric",
    "constraints",
    "trials",
    "seeds",
    "launch",
    "storage",
)

MAX_VALUES = 1_000_000
MAX_GRID = 100_000


def _check_range(low: float, high: float, *, log: bool) -> None:
    if low > high:
        raise ValueError(f"high: {high} is below low, {low}")
    if log and low <= 0:
        raise ValueError(f"low: {low} has no logarithm; a log space begins above 0")


def _refuse_unread(settings: Settings, key: str, readers: tuple[str, ...], name: str) -> None:
    if getattr(settings, key) is not None and name not in readers:
        raise ValueError(f"{key}: nothing reads it with name: {name}; remove it")


class FloatSpace(Settings):
    """A number between `low` and `high`, both included."""

    kind: Literal["float"]
    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    log: bool = False
    """Search the logarithm: for weights and learning rates."""
    step: float | None = Field(default=None, gt=0)
    """Only `low`, `low + step`, ... A grid needs it."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        _check_range(self.low, self.high, log=self.log)
        if self.log and self.step is not None:
            raise ValueError("step: nothing reads it with log: true; remove one")
        if self.step is not None and (self.high - self.low) / self.step > MAX_VALUES:
            raise ValueError(f"step: {self.step:g} makes more than {MAX_VALUES} values")
        return self


class IntSpace(Settings):
    """A whole number between `low` and `high`, both included."""

    kind: Literal["int"]
    low: int
    """Smallest value."""
    high: int
    """Largest value."""
    log: bool = False
    """Search the logarithm."""
    step: int = Field(default=1, ge=1)
    """Only `low`, `low + step`, ..."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        _check_range(self.low, self.high, log=self.log)
        if self.log and self.step != 1:
            raise ValueError("step: nothing reads it with log: true; remove one")
        return self


class CategoricalSpace(Settings):
    """One of several values, which may be lists or mappings; they have no order."""

    kind: Literal["categorical"]
    choices: tuple[Any, ...] = Field(min_length=1)
    """The values."""

    @field_validator("choices")
    @classmethod
    def _distinct(cls, choices: tuple[Any, ...]) -> tuple[Any, ...]:
        for one, other in itertools.combinations(choices, 2):
            if one == other:
                raise ValueError(f"{one!r} and {other!r} are the same")
        return choices


class BlocksSpace(Settings):
    """Transformer blocks, counted from 0, for a `blocks` setting."""

    kind: Literal["blocks"]
    choose: Literal["range", "single", "subset"]
    """`range`: neighbours; `single`: one block; `subset`: any blocks."""
    first: int = Field(default=0, ge=0)
    """Lowest block that may be chosen."""
    last: int = Field(ge=0)
    """Highest block that may be chosen."""
    max_size: int | None = Field(default=None, ge=1)
    """Most blocks chosen at once. A subset needs it; a range may be as long as there are blocks."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.last < self.first:
            raise ValueError(f"last: {self.last} is below first, {self.first}")
        if self.choose == "single" and self.max_size is not None:
            raise ValueError("max_size: nothing reads it with choose: single; remove it")
        if self.choose == "subset" and self.max_size is None:
            raise ValueError("max_size: missing; a subset needs it")
        if self.max_size is not None and self.max_size > self.count:
            raise ValueError(f"max_size: {self.max_size} is more than the {self.count} blocks")
        return self

    @property
    def count(self) -> int:
        """How many blocks there are to choose from."""
        return self.last - self.first + 1


Parameter = Annotated[
    FloatSpace | IntSpace | CategoricalSpace | BlocksSpace, Field(discriminator="kind")
]


def by_name(value: object) -> object:
    """A name alone stands for the mapping that has nothing else."""
    return {"name": value} if isinstance(value, str) else value


class SamplerConfig(Settings):
    """How the next trial's values are chosen."""

    name: Literal["tpe", "gp", "cmaes", "random", "grid", "nsga2"] = "tpe"
    """Optuna's sampler. `grid` tries every combination once."""
    seed: int = Field(default=0, ge=0)
    """A trial's values depend on it, on the trial's number and on the trials finished before."""
    startup: int | None = Field(default=None, ge=1)
    """Random trials before the model of `tpe` (Optuna: 10), `gp` (10) or `cmaes` (1) is used."""
    population: int | None = Field(default=None, ge=2)
    """Trials per generation of `nsga2` (Optuna: 50) and `cmaes` (by the space's size)."""

    @model_validator(mode="after")
    def _settings_are_read(self) -> Self:
        _refuse_unread(self, "startup", ("tpe", "gp", "cmaes"), self.name)
        _refuse_unread(self, "population", ("nsga2", "cmaes"), self.name)
        return self


class PrunerConfig(Settings):
    """When a trial that does badly is stopped: between two of its seeds, and with `eval.every` by
    `median` and `hyperband` also while its first seed trains (`experiments/sweep/pruning.py`)."""

    name: Literal["none", "median", "hyperband", "wilcoxon"] = "none"
    """`median`, `hyperband`: by the mean over the seeds so far, and inside the first seed's run by
    its number at that step; `wilcoxon`: by a signed-rank test against the best trial, paired by
    seed."""
    startup: int | None = Field(default=None, ge=0)
    """Trials finished before `median` stops any (Optuna: 5)."""
    p: float | None = Field(default=None, gt=0, lt=1)
    """Threshold of `wilcoxon` (Optuna: 0.1)."""
    reduction: int | None = Field(default=None, ge=2)
    """`hyperband` keeps one trial of so many (Optuna: 3)."""

    @model_validator(mode="after")
    def _settings_are_read(self) -> Self:
        _refuse_unread(self, "startup", ("median",), self.name)
        _refuse_unread(self, "p", ("wilcoxon",), self.name)
        _refuse_unread(self, "reduction", ("hyperband",), self.name)
        return self


class MetricConfig(Settings):
    """A number of the run's `result.json` that is optimised."""

    name: str
    """Such as `val/flow`, `teacher_retrieval/mean`, `time/step`."""
    direction: Literal["minimize", "maximize"] | None = None
    """Left out: the better side that the report knows for this metric."""


def _metrics(value: object) -> object:
    if isinstance(value, str | dict):
        return (by_name(value),)
    return tuple(by_name(item) for item in value) if isinstance(value, list | tuple) else value


class SweepConfig(Settings):
    """A search over settings of one run."""

    base: RunConfig
    """What all trials share."""
    space: dict[str, Parameter] = Field(min_length=1)
    """What is varied, by dotted recipe key."""
    sampler: Annotated[SamplerConfig, BeforeValidator(by_name)] = SamplerConfig()
    """How the next trial's values are chosen."""
    pruner: Annotated[PrunerConfig, BeforeValidator(by_name)] = PrunerConfig()
    """When a trial is stopped early."""
    metric: Annotated[tuple[MetricConfig, ...], BeforeValidator(_metrics)] = Field(min_length=1)
    """What is optimised: mean over the seeds. Several: a Pareto front."""
    constraints: dict[str, float] = Field(default_factory=dict)
    """Largest value that a metric may have, such as `memory/peak_mib: 8000`."""
    trials: int | None = Field(default=None, ge=1)
    """How many; left out, and only then, with `sampler: grid`."""
    seeds: Seeds
    """Every trial trains once per seed."""
    launch: LaunchConfig = LaunchConfig()
    """What each worker needs of its machine; it trains one run at a time."""
    storage: str | None = None
    """Optuna's storage: an SQLAlchemy URL, `journal:///PATH` or a path that ends in `.log` or
    `.journal`. Left out: `study.db` (SQLite) in the sweep's folder."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [metric.name for metric in self.metric]
        if len(set(names)) < len(names):
            raise ValueError(f"metric: {names} names a metric twice")
        if (self.trials is None) != (self.sampler.name == "grid"):
            grid = self.sampler.name == "grid"
            raise ValueError(
                "trials: a grid has as many as it has points; remove trials"
                if grid
                else "trials: missing; say how many trials the sweep has"
            )
        self._pruner_has_something_to_read()
        return self

    def _pruner_has_something_to_read(self) -> None:
        pruner, count = self.pruner, len(self.seeds)
        if pruner.name == "none":
            return
        if len(self.metric) > 1:
            raise ValueError("pruner: trials with several metrics cannot be pruned; use none")
        need = 2
        every = steps_between(self)
        if every is not None:
            # as many rungs as between seeds: the first evaluation counts as one
            count = count * self.base.steps // every
        if pruner.name == "hyperband":
            # with fewer seeds than one reduction there is a single rung, the last
            need = pruner.reduction or 3
        elif pruner.name == "wilcoxon":
            # n seeds give no p-value below 2^-n, and pruning at the last seed saves nothing
            need = math.floor(-math.log2(pruner.p or 0.1)) + 2
        if count < need:
            found = f"seeds and needs at least {need} of them, the recipe has {count}"
            if every is not None:
                found = f"evaluations and needs at least {need} of them, a trial has {count}"
            raise ValueError(
                f"pruner: {pruner.name} stops a trial between its {found}{_why_not_inside(self)}"
            )

    @property
    def name(self) -> str:
        """Folder of the sweep under `output`, and name of the study."""
        return self.base.name

    @property
    def output(self) -> str:
        """Folder of all runs."""
        return self.base.output


def steps_between(config: SweepConfig) -> int | None:
    """Steps between the numbers that the pruner reads inside a run; None where it reads none."""
    base, metric = config.base, config.metric[0].name
    if config.pruner.name not in ("median", "hyperband") or len(config.metric) > 1:
        return None
    if metric in COSTS or "steps" in config.space:  # runs of other lengths have no steps in common
        return None
    every = base.eval.sample_every if metric.startswith("gen/") else base.eval.every
    return every if every is not None and every < base.steps else None


def _why_not_inside(config: SweepConfig) -> str:
    """Why the pruner reads nothing inside a run, and what helps; in brackets."""
    metric = config.metric[0].name
    if config.pruner.name == "wilcoxon":
        return " (it pairs trials by seed)"
    if metric in COSTS:
        return f" ({metric} is measured at the end of a run only)"
    if "steps" in config.space:
        return " (runs of different steps cannot be compared inside)"
    key = "eval.sample_every" if metric.startswith("gen/") else "eval.every"
    return f" (with a smaller {key}, {metric} is measured inside a run as well)"


def load_sweep(
    recipe: str | Path, overrides: list[str] | None = None, *, stored: bool = False
) -> SweepConfig:
    """The config of a sweep. That its space fits the run is checked when the sweep begins.

    Args:
        recipe: path of a YAML file, or the name of a shipped recipe such as `sweep_refalign`.
        overrides: `dotted.key=value` strings, such as `space.objectives.ra.weight.high=3`.
        stored: see `alignlab.recipe.validated`.

    Raises:
        UserError: as `load_run`, and when the recipe is no sweep.
    """
    mapping = read_recipe(recipe, overrides or [])
    refuse_other_command(recipe, mapping, "sweep")
    if "seeds" in mapping and "seed" in mapping:
        raise UserError("seed: a sweep with 'seeds' does not read it; remove one")
    search = {key: mapping.pop(key) for key in SWEEP_KEYS if key in mapping}
    if isinstance(search["space"], Mapping):
        search["space"] = dotted_space(search["space"])
    search.setdefault("seeds", [mapping.pop("seed", 0)])
    base = validated(RunConfig, mapping, stored=stored)
    return validated(SweepConfig, {**search, "base": base})


def dump_sweep(config: SweepConfig) -> str:
    """The resolved recipe as YAML; loading it again gives an equal config."""
    resolved = config.base.model_dump(mode="json", exclude={"seed"})
    return to_yaml(
        resolved | config.model_dump(mode="json", include=set(SWEEP_KEYS), exclude_none=True)
    )


def dotted_space(space: Any, prefix: str = "") -> dict[str, Any]:
    """A nested space by dotted key: what holds anything but mappings and null is a parameter."""
    if not isinstance(space, Mapping) or not all(
        value is None or isinstance(value, Mapping) for value in space.values()
    ):
        return {prefix.removesuffix("."): space}
    dotted: dict[str, Any] = {}
    for key, value in space.items():
        dotted |= dotted_space(value, f"{prefix}{key}.")
    return dotted
