"""What a recipe trains: a run, a Stage 1 network, runs of a comparison, trials of a sweep."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from alignlab.config.recipe_file import read_recipe
from alignlab.config.run import RunConfig
from alignlab.experiments.compare.config import CompareConfig, load_compare
from alignlab.experiments.launchers.config import LaunchConfig
from alignlab.experiments.sweep.config import (
    BlocksSpace,
    CategoricalSpace,
    FloatSpace,
    IntSpace,
    Parameter,
    SweepConfig,
    load_sweep,
)
from alignlab.experiments.sweep.space import apply_values, check_space, grid_points, label
from alignlab.experiments.tune.plan import load_tune
from alignlab.recipe import load_run, validated
from alignlab.stage1.config import Stage1Config

Training = RunConfig | Stage1Config
_NO_SHAPE = ("weight", "gate", "schedule", "warmup")
"""Settings of objectives that multiply: no tensor has another size by them."""


@dataclass(frozen=True)
class Trials:
    """Runs that tune a variant before it is compared.

    Args:
        runs: how many.
        steps: of each.
    """

    runs: int
    steps: int


@dataclass(frozen=True)
class RecipeRuns:
    """What a recipe trains.

    Args:
        name: of the recipe.
        kind: a `run` or a `stage1` training has all GPUs; the runs of the others have GPUs of their
            own.
        variants: a run of each, by name; of a run its only one. Of a sweep the settings as written,
            and one for each value of its space at which a run may need more memory.
        counts: how many runs are trained of each; 0: it is looked at for its memory alone.
        seeds: seeds that all of them share.
        ranks: GPUs that each run has (`launch.gpus`).
        trials: that tune a variant before, by its name.
        costs_as: the variant whose cost the budget gives to all; None: each has its own.
        notes: what has to be said of them.
    """

    name: str
    kind: Literal["run", "stage1", "comparison", "sweep"]
    variants: Mapping[str, Training]
    counts: Mapping[str, int]
    seeds: int = 1
    ranks: int = 1
    trials: Mapping[str, Trials] = field(default_factory=dict)
    costs_as: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_alone(self) -> bool:
        """Whether there is one training, which has all GPUs."""
        return self.kind in ("run", "stage1")

    @property
    def num_trials(self) -> int:
        """Trials of a sweep."""
        return sum(self.counts.values()) // self.seeds

    @property
    def sizes(self) -> str:
        """How many runs there are, as text."""
        if self.kind == "sweep":
            return f"{self.num_trials} trials x {self.seeds}"
        sizes = f"{len(self.variants)} x {self.seeds}"
        if self.trials:
            sizes += f" and {sum(trials.runs for trials in self.trials.values())} of trials"
        return sizes


def recipe_runs(recipe: str | Path, overrides: list[str] | None) -> RecipeRuns:
    """What a recipe trains.

    Raises:
        UserError: as `load_run`, `load_compare`, `load_sweep`, `load_tune` and `load_stage1_run`.
    """
    mapping = read_recipe(recipe, overrides or [])
    if "space" in mapping:
        return _of_sweep(load_sweep(recipe, overrides))
    if "stage1" in mapping:
        stage1 = validated(Stage1Config, mapping)
        return RecipeRuns(stage1.name, "stage1", {stage1.name: stage1}, {stage1.name: 1})
    if "variants" not in mapping:
        run = load_run(recipe, overrides)
        return RecipeRuns(run.name, "run", {run.name: run}, {run.name: 1})
    if mapping.get("tune") is None:
        return _of_comparison(load_compare(recipe, overrides), {})
    plan = load_tune(recipe, overrides)
    trials = {
        variant: Trials((sweep.trials or 0) * len(sweep.seeds), sweep.base.steps)
        for variant, sweep in plan.sweeps.items()
    }
    return _of_comparison(plan.config, trials)


def _of_comparison(config: CompareConfig, trials: Mapping[str, Trials]) -> RecipeRuns:
    runs = {name: config.run(name, config.seeds[0]) for name in config.trained}
    notes = _launch_notes(config.launch)
    if config.budget != "steps":
        notes += (
            f"budget: {config.budget}: every run is taken to cost what the baseline's "
            f"{runs[config.baseline].steps:,} steps cost; how many steps that are is decided by "
            "measuring, before the training",
        )
    if trials:
        notes += ("a trial is taken to cost as much a step as its variant as written",)
    return RecipeRuns(
        config.name,
        "comparison",
        runs,
        dict.fromkeys(config.trained, len(config.seeds)),
        len(config.seeds),
        config.launch.num_ranks,
        trials,
        None if config.budget == "steps" else config.baseline,
        notes,
    )


def _of_sweep(config: SweepConfig) -> RecipeRuns:
    check_space(config)
    count = config.trials or len(grid_points(config))
    variants = {config.name: config.base}
    for key, parameter in config.space.items():
        for value in _sizes(key, parameter):
            changed = apply_values(config.base, {key: value})
            if changed != config.base:
                variants[f"{key}={label(value)}"] = changed
    notes: tuple[str, ...] = (
        "every trial is taken to cost what the settings as written cost; values that change a "
        "size are planned one at a time, and for their memory alone",
    )
    if config.pruner.name != "none":
        notes += (f"pruner: {config.pruner.name} stops trials early: it is not counted",)
    return RecipeRuns(
        config.name,
        "sweep",
        variants,
        {config.name: count * len(config.seeds)},
        len(config.seeds),
        config.launch.num_ranks,
        notes=_launch_notes(config.launch) + notes,
    )


def _sizes(key: str, parameter: Parameter) -> list[Any]:
    """Values of a parameter at which a run may need most memory; none of what has no shape."""
    if key.split(".")[-1] in _NO_SHAPE:
        return []
    match parameter:
        case FloatSpace():
            return []
        case IntSpace():
            return [parameter.low, parameter.high]
        case CategoricalSpace():
            return list(parameter.choices)
        case BlocksSpace(choose="single"):
            return [[parameter.first], [parameter.last]]
        case BlocksSpace():
            size = parameter.max_size or parameter.count
            return [list(range(parameter.last - size + 1, parameter.last + 1))]


def _launch_notes(launch: LaunchConfig) -> tuple[str, ...]:
    if launch.gpus == 0:
        return ("launch.gpus: 0: each rank is planned as if it had a GPU",)
    return ()
