"""What `alignlab tune` trains: a sweep for each variant, and the comparison of the best of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.config.data import unknown_name
from alignlab.config.merging import merge
from alignlab.config.paths import user_path
from alignlab.config.recipe_file import read_recipe
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.compare import run as comparison
from alignlab.experiments.compare.config import CompareConfig, compare_config, dump_compare
from alignlab.experiments.compare.tuned import is_within
from alignlab.experiments.sweep.borders import shown_range
from alignlab.experiments.sweep.config import SweepConfig
from alignlab.experiments.sweep.space import check_space, tapped_blocks
from alignlab.experiments.sweep.worker import check as check_sweep
from alignlab.experiments.tune.config import TuneConfig
from alignlab.experiments.tune.spaces import variant_space
from alignlab.recipe import refuse_other_command, to_yaml, validated
from alignlab.tracking.other_trackers import check_packages

TUNING = "tuning"
"""Folder of the sweeps in that of the comparison."""


@dataclass(frozen=True)
class TunePlan:
    """What is tuned and compared.

    Args:
        recipe: as it was read, with the overrides.
        config: the comparison of the variants as they stand; its `tune` says how they are tuned.
        sweeps: of each variant.
    """

    recipe: Mapping[str, Any]
    config: CompareConfig
    sweeps: dict[str, SweepConfig]

    @property
    def tune(self) -> TuneConfig:
        """How the variants are tuned."""
        assert self.config.tune is not None
        return self.config.tune

    @property
    def folder(self) -> Path:
        """Of the comparison."""
        return user_path(self.config.output) / self.config.name

    def trial_steps(self, variant: str) -> int:
        """Steps of all runs of a variant's sweep; trials that repeat another train fewer."""
        sweep = self.sweeps[variant]
        assert sweep.trials is not None
        return sweep.trials * len(sweep.seeds) * sweep.base.steps

    @property
    def tuning_steps(self) -> int:
        """Steps of all sweeps."""
        return sum(map(self.trial_steps, self.sweeps))

    @property
    def compared_steps(self) -> int:
        """Steps of the comparison, where no other budget than steps changes them."""
        runs = (self.config.run(v, s) for v in self.config.trained for s in self.config.seeds)
        return sum(run.steps for run in runs)

    @property
    def sentence(self) -> str:
        """How much is trained."""
        config, tune = self.config, self.tune
        one = next(iter(self.sweeps.values())).base.steps
        of_trials = len(self.sweeps) * (tune.trials or 0) * len(tune.seeds)
        runs = len(config.trained) * len(config.seeds)
        return (
            f"{config.name}: {len(self.sweeps)} sweeps of {_counted(tune.trials or 0, 'trial')}, "
            f"{_counted(len(tune.seeds), 'seed')} of {one:,} steps each ({of_trials} runs, "
            f"{self.tuning_steps:,} steps), then {_counted(runs, 'run')} of the best settings "
            f"({self.compared_steps:,} steps): {of_trials + runs} runs, "
            f"{self.tuning_steps + self.compared_steps:,} steps in all"
        )


def load_tune(
    recipe: str | Path, overrides: list[str] | None = None, *, trials: int | None = None
) -> TunePlan:
    """What a comparison's recipe has tuned and compared.

    Args:
        recipe: path of a YAML file, or the name of a shipped recipe such as `tune_from_scratch`.
        overrides: `dotted.key=value` strings, such as `tune.steps=100`.
        trials: of each variant; None: `tune.trials` of the recipe.

    Raises:
        UserError: as `load_compare`, a variant comes from a sweep already, tuning and comparison
            share a seed, or a variant's space does not fit its run.
    """
    mapping = read_recipe(recipe, overrides or [])
    if mapping.get("tune") is None:
        refuse_other_command(recipe, mapping, "compare")
    mapping["tune"] = mapping.get("tune") or {}
    if trials is not None and isinstance(mapping["tune"], dict):
        mapping["tune"] = mapping["tune"] | {"trials": trials}
    config = compare_config(mapping)
    assert config.tune is not None
    _check_tune(config, config.tune)
    return TunePlan(mapping, config, _sweeps(config, config.tune))


def check(plan: TunePlan) -> None:
    """Refuses, before the first trial, what one of the sweeps or the comparison would refuse.

    Raises:
        UserError: it names the variant or the setting.
    """
    comparison.check(plan.config)
    for variant, sweep in plan.sweeps.items():
        try:
            check_sweep(sweep)
        except UserError as error:
            raise UserError(_in_recipe(variant, str(error))) from None
    check_packages(plan.config.base)


def tuned_recipe(plan: TunePlan) -> dict[str, Any]:
    """The recipe of the comparison of what the sweeps found, for `alignlab compare`.

    Every variant comes `from` its sweep, with what it changes besides its objectives and what was
    searched.
    """
    variants = {}
    for variant, changes in plan.config.variants.items():
        searched = plan.sweeps[variant].space
        kept = {
            key: value
            for key, value in changes.items()
            if key.split(".")[0] != "objectives"
            and not is_within(key, searched)
            and not any(is_within(one, (key,)) for one in searched)
        }
        variants[variant] = {"from": best_of(plan, variant), **kept}
    recipe = {key: value for key, value in plan.recipe.items() if key != "tune"}
    return recipe | {"variants": variants}


def best_of(plan: TunePlan, variant: str) -> str:
    """The best recipe of a variant's sweep, as the comparison names it."""
    sweep = plan.sweeps[variant]
    return f"{sweep.output}/{sweep.name}/best.yaml"


def dump_tune(plan: TunePlan) -> str:
    """The resolved recipe as YAML, with what each variant searches as comments."""
    lines = []
    for variant, sweep in plan.sweeps.items():
        space = {
            key: one.model_dump(mode="json", exclude_none=True) for key, one in sweep.space.items()
        }
        lines += [f"variant {variant} searches:", *to_yaml({"space": space}).splitlines()]
    return dump_compare(plan.config) + "".join(f"# {line}\n" for line in lines)


def shown_spaces(plan: TunePlan) -> list[str]:
    """A line for each setting that a variant's sweep searches."""
    return [
        f"{variant}: {key}: {shown_range(one)}"
        for variant, sweep in plan.sweeps.items()
        for key, one in sweep.space.items()
    ]


def _check_tune(config: CompareConfig, tune: TuneConfig) -> None:
    if tune.trials is None:
        raise UserError("tune.trials: missing; say how many with --trials N or tune.trials=N")
    shared = sorted(set(tune.seeds) & set(config.seeds))
    if shared:
        raise UserError(
            f"tune.seeds: {', '.join(map(str, shared))} would be trained with in the comparison as "
            "well, where the best would look better than it is: choose others"
        )
    for variant in tune.spaces:
        if variant not in config.variants:
            raise UserError(f"tune.spaces: {unknown_name('variant', variant, config.variants)}")
    for variant in config.trained:
        if variant == TUNING:
            raise UserError(f"variants.{variant}: the sweeps lie in {variant}: choose another name")
    for variant in config.tuned:
        raise UserError(
            f"variants.{variant}.from: `alignlab tune` sweeps every variant itself; give its "
            "objectives instead, or use `alignlab compare`"
        )


def _sweeps(config: CompareConfig, tune: TuneConfig) -> dict[str, SweepConfig]:
    """The sweeps of all variants, whose trials are all measured on the same blocks."""
    sweeps = {v: _sweep(config, tune, v, run) for v, run in config.runs.items()}
    for variant, sweep in sweeps.items():
        try:
            check_space(sweep)
        except UserError as error:
            raise UserError(_in_recipe(variant, str(error))) from None
    blocks = {block for sweep in sweeps.values() for block in tapped_blocks(sweep)}
    if config.base.eval.blocks is not None or not blocks:
        return sweeps
    return {
        variant: sweep.model_copy(
            update={"base": _changed(sweep.base, {"eval.blocks": sorted(blocks)})}
        )
        for variant, sweep in sweeps.items()
    }


def _sweep(config: CompareConfig, tune: TuneConfig, variant: str, run: RunConfig) -> SweepConfig:
    changes: dict[str, Any] = {"name": f"{config.name}/{TUNING}/{variant}"}
    changes["steps"] = tune.steps or config.base.steps
    changes |= {"eval.every": None, "eval.sample_every": None}
    if not tune.metric.name.startswith("gen/"):  # nobody looks at the clips of a trial
        changes |= {"eval.sample_clips": 0, "eval.generated_clips": None, "eval.metrics": []}
    return validated(
        SweepConfig,
        {
            "base": _changed(run, changes),
            "space": variant_space(tune, config.base, variant, run),
            "sampler": tune.sampler,
            "metric": (tune.metric,),
            "trials": tune.trials,
            "seeds": tune.seeds,
            "launch": config.launch,
        },
        under=f"tune.spaces.{variant}",
    )


def _changed(run: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The run with these settings, all of them set in the recipe's own form."""
    return validated(RunConfig, merge(run.model_dump(mode="json", exclude_unset=True), changes))


def _in_recipe(variant: str, problem: str) -> str:
    """The line of a sweep's problem, by the names of this recipe."""
    for key, place in (("space.", f"tune.spaces.{variant}."), ("metric:", "tune.metric:")):
        if problem.startswith(key):
            return place + problem.removeprefix(key)
    if problem.startswith("sampler:"):
        return f"tune.{problem}"
    return f"variant {variant}: {problem}"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
