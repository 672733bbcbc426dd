"""The plan of a recipe: of its run, or of all runs of its comparison."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from alignlab.config.recipe_file import read_recipe
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.plan.rates import HOUR, Rates
from alignlab.plan.architecture import Architectures
from alignlab.plan.fake_encoders import EncoderCosts
from alignlab.plan.run_plan import TEACHERS, RunPlan, plan_run
from alignlab.recipe import load_run

GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class RecipeRuns:
    """What a recipe trains.

    Args:
        name: of the recipe.
        variants: a run of each, by name; of a run its only one.
        seeds: runs of each.
        is_comparison: each run has GPUs of its own; else all train one run together.
        ranks: GPUs that each run of a comparison has (`launch.gpus`).
        has_trials: variants are tuned before they are compared (`tune`).
    """

    name: str
    variants: dict[str, RunConfig]
    seeds: int
    is_comparison: bool
    ranks: int = 1
    has_trials: bool = False


@dataclass(frozen=True)
class VariantPlan:
    """A variant and its cost.

    Args:
        config: its run.
        plan: what that costs.
        hours: GPU-hours of a run, what the dataset cache keeps left out.
        same_as: an earlier variant that costs the same; None: there is none.
    """

    config: RunConfig
    plan: RunPlan
    hours: float
    same_as: str | None = None


@dataclass(frozen=True)
class RecipePlan:
    """The plan of a recipe.

    Args:
        runs: what it trains.
        variants: by name.
        encoding_hours: GPU-hours in which clips are encoded once, for all runs.
        clips: that are encoded; an upper bound where the recipe does not say how many there are.
        clips_are_known: whether it does.
        gpus: that were asked for.
        hours: GPU-hours in all.
        days: by number of GPUs.
        notes: what has to be said.
        rates: that times are of.
    """

    runs: RecipeRuns
    variants: dict[str, VariantPlan]
    encoding_hours: float
    clips: int
    clips_are_known: bool
    gpus: int
    hours: float
    days: dict[int, float]
    notes: list[str]
    rates: Rates

    @property
    def highest(self) -> VariantPlan:
        """The variant that needs the most memory."""
        return max(self.variants.values(), key=lambda variant: variant.plan.peak.total)


def recipe_runs(recipe: str | Path, overrides: list[str] | None) -> RecipeRuns:
    """What a recipe trains.

    Raises:
        UserError: as `load_run` and `load_compare`, or it is a sweep or a Stage 1 training.
    """
    mapping = read_recipe(recipe, overrides or [])
    for key, kind in (("space", "a sweep"), ("stage1", "a Stage 1 training")):
        if key in mapping:
            raise UserError(
                f"{recipe} is {kind}: `alignlab plan` reads runs and comparisons; give it the run "
                "that this one varies"
            )
    if "variants" in mapping:
        comparison = load_compare(recipe, overrides)
        runs = {name: comparison.run(name, comparison.seeds[0]) for name in comparison.trained}
        return RecipeRuns(
            comparison.name,
            runs,
            len(comparison.seeds),
            True,
            comparison.launch.num_ranks,
            comparison.tune is not None,
        )
    run = load_run(recipe, overrides)
    return RecipeRuns(run.name, {run.name: run}, 1, False)


def plan_recipe(
    runs: RecipeRuns,
    architectures: Architectures,
    *,
    gpus: int = 1,
    rates: Rates | None = None,
    clips: int | None = None,
) -> RecipePlan:
    """Plans every variant of a recipe.

    Args:
        runs: what it trains.
        architectures: where settings of models are.
        gpus: that train: a run together, the runs of a comparison as many each as it says.
        rates: of a GPU; None: the defaults.
        clips: of the data set; None: as the recipe says, if it does.

    Raises:
        UserError: a run could not be trained so, or a model's settings are nowhere.
    """
    rates = rates or Rates()
    if runs.is_comparison:
        gpus = max(gpus, runs.ranks)
    planned = _planned(runs, architectures, runs.ranks if runs.is_comparison else gpus, rates)
    one = next(iter(runs.variants.values()))
    known = clips or getattr(one.data, "train_clips", None)
    draws = one.steps * one.optim.batch_size * (runs.seeds if runs.is_comparison else 1)
    count = min(known, draws) if known else draws
    encoding = count * rates.seconds(one, _encoding_flops(planned)) / HOUR
    hours = encoding + runs.seeds * sum(variant.hours for variant in planned.values())
    return RecipePlan(
        runs,
        planned,
        encoding,
        count,
        known is not None,
        gpus,
        hours,
        {
            number: _days(runs, planned, encoding, number)
            for number in sorted({*GPU_COUNTS, gpus})
            if _can_train(runs, one, number)
        },
        _notes(architectures, one, runs),
        rates,
    )


def _planned(
    runs: RecipeRuns,
    architectures: Architectures,
    gpus: int,
    rates: Rates,
) -> dict[str, VariantPlan]:
    encoders: dict[str, EncoderCosts] = {}
    known: dict[str, str] = {}
    found: dict[str, VariantPlan] = {}
    for name, config in runs.variants.items():
        key = cost_key(config)
        if key in known:
            first = found[known[key]]
            found[name] = replace(first, config=config, same_as=known[key])
            continue
        known[key] = name
        read = config.model_dump_json(include={"model": {"path", "precision"}, "data": True})
        plan = plan_run(config, architectures, gpus=gpus, encoders=encoders.get(read))
        encoders[read] = plan.encoders
        hours = config.steps * rates.seconds(config, plan.step_flops) / HOUR
        found[name] = VariantPlan(config, plan, hours)
    return found


def _encoding_flops(planned: Mapping[str, VariantPlan]) -> dict[str, int]:
    """Of a clip, by part: what the runs of all variants read of it, each thing once."""
    once: dict[str, int] = {}
    teachers: dict[object, int] = {}
    for variant in planned.values():
        once |= variant.plan.clip_flops
        if TEACHERS in variant.plan.clip_flops:
            read = variant.plan.step.teachers
            teachers |= {(t.alias, t.kind, t.shape, t.flops): t.flops for t in read}
    if teachers:
        once[TEACHERS] = sum(teachers.values())
    return once


def _can_train(runs: RecipeRuns, run: RunConfig, gpus: int) -> bool:
    """Whether so many GPUs can share a run, or train runs of a comparison."""
    if runs.is_comparison:
        return gpus >= runs.ranks
    return run.optim.batch_size % (run.optim.accumulate * gpus) == 0


def cost_key(config: RunConfig) -> str:
    """Equal where runs cost the same, as far as a plan looks."""
    left_out = {"name", "seed", "output", "tracking"}
    return config.model_dump_json(exclude=left_out)


def _days(
    runs: RecipeRuns, planned: Mapping[str, VariantPlan], encoding: float, gpus: int
) -> float:
    hours = [variant.hours for variant in planned.values() for _ in range(runs.seeds)]
    if not runs.is_comparison:
        return (encoding + sum(hours)) / gpus / 24
    # the longest run first, each where GPUs are free first
    busy = [0.0] * min(gpus // runs.ranks, len(hours))
    for one in sorted(hours, reverse=True):
        place = busy.index(min(busy))
        busy[place] += one / runs.ranks
    return (encoding / gpus + max(busy)) / 24


def _notes(architectures: Architectures, config: RunConfig, runs: RecipeRuns) -> list[str]:
    notes = [*architectures.notes]
    if runs.has_trials:
        notes.append("trials of `tune` are not counted: the comparison alone")
    most = config.data.references[1]
    if most:
        notes.append(f"every sample is taken to have {most} references, the most of the recipe")
    return notes
