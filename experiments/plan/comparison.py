"""The plan of a recipe: of its training, or of all that it trains together."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.plan.rates import HOUR, Rates, precision_of
from alignlab.experiments.plan.recipe_runs import RecipeRuns, Training
from alignlab.plan.architecture import Architectures
from alignlab.plan.fake_clips import ENTITIES
from alignlab.plan.fake_encoders import EncoderCosts
from alignlab.plan.run_plan import TEACHERS, RunPlan, plan_run
from alignlab.plan.stage1_plan import plan_stage1
from alignlab.progress import step_progress
from alignlab.stage1.config import Stage1Config

GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class VariantPlan:
    """A variant and its cost.

    Args:
        config: what is trained.
        plan: what that costs.
        runs: how many are trained; 0: it was looked at for its memory alone.
        hours: GPU-hours of a run, what the dataset cache keeps left out.
        trial_runs: that tune it before.
        trial_hours: GPU-hours of one of these.
        same_as: an earlier variant that costs the same; None: there is none.
    """

    config: Training
    plan: RunPlan
    runs: int
    hours: float
    trial_runs: int = 0
    trial_hours: float = 0.0
    same_as: str | None = None

    @property
    def all_hours(self) -> list[float]:
        """GPU-hours of each of its trainings."""
        return [self.hours] * self.runs + [self.trial_hours] * self.trial_runs


@dataclass(frozen=True)
class Encoding:
    """What the dataset cache keeps of a data set, for all runs that read it.

    Args:
        clips: that are encoded; an upper bound where the recipe does not say how many there are.
        is_known: whether it does.
        kept: bytes of a clip, by what they are.
        hours: GPU-hours in which all are encoded, each once.
    """

    clips: int
    is_known: bool
    kept: dict[str, int]
    hours: float

    @property
    def bytes_per_clip(self) -> int:
        """Of all that is kept of one."""
        return sum(self.kept.values())


@dataclass(frozen=True)
class RecipePlan:
    """The plan of a recipe.

    Args:
        runs: what it trains.
        variants: by name.
        encodings: of each data set.
        gpus: that were asked for.
        days: by number of GPUs.
        notes: what has to be said.
        rates: that times are of.
    """

    runs: RecipeRuns
    variants: dict[str, VariantPlan]
    encodings: list[Encoding]
    gpus: int
    days: dict[int, float]
    notes: list[str]
    rates: Rates

    @property
    def highest(self) -> VariantPlan:
        """The variant that needs the most memory."""
        return max(self.variants.values(), key=lambda variant: variant.plan.peak.total)

    @property
    def encoding_hours(self) -> float:
        """GPU-hours in which clips are encoded once, for all runs."""
        return sum(one.hours for one in self.encodings)

    @property
    def hours(self) -> float:
        """GPU-hours in all."""
        each = (math.fsum(variant.all_hours) for variant in self.variants.values())
        return self.encoding_hours + math.fsum(each)

    @property
    def cache_bytes(self) -> int:
        """Of the dataset cache."""
        return sum(one.clips * one.bytes_per_clip for one in self.encodings)


def plan_recipe(
    runs: RecipeRuns,
    architectures: Architectures,
    *,
    gpus: int | None = None,
    rates: Rates | None = None,
    clips: int | None = None,
) -> RecipePlan:
    """Plans every variant of a recipe.

    Args:
        runs: what it trains.
        architectures: where settings of models are.
        gpus: that train: one training together, else runs as many each as `launch` says; None: one
            run's.
        rates: of a GPU; None: the defaults.
        clips: of the data set; None: as the recipe says, if it does.

    Raises:
        UserError: a run could not be trained so, it has not so few GPUs, or a model's settings are
            nowhere.
    """
    rates = rates or Rates()
    if gpus is not None and not runs.is_alone and gpus < runs.ranks:
        raise UserError(
            f"{gpus} GPUs train no run of {runs.name}, which has {runs.ranks} (launch.gpus): "
            f"give --gpus {runs.ranks} or more, or change launch.gpus"
        )
    gpus = gpus or runs.ranks
    planned = _planned(runs, architectures, gpus if runs.is_alone else runs.ranks, rates)
    encodings = _encodings(runs, planned, rates, clips)
    counts = (n for n in sorted({*GPU_COUNTS, gpus}) if _can_train(runs, n))
    days = {count: _days(runs, planned, encodings, count) for count in counts}
    notes = [*architectures.notes, *runs.notes, *_notes(runs)]
    return RecipePlan(runs, planned, encodings, gpus, days, notes, rates)


def plan_training(
    config: Training,
    architectures: Architectures,
    *,
    gpus: int = 1,
    encoders: EncoderCosts | None = None,
) -> RunPlan:
    """`plan_run` or `plan_stage1`, as the config says."""
    if isinstance(config, Stage1Config):
        return plan_stage1(config, architectures, gpus=gpus)
    return plan_run(config, architectures, gpus=gpus, encoders=encoders)


def _planned(
    runs: RecipeRuns,
    architectures: Architectures,
    gpus: int,
    rates: Rates,
) -> dict[str, VariantPlan]:
    encoders: dict[str, EncoderCosts | None] = {}
    known: dict[str, str] = {}
    found: dict[str, VariantPlan] = {}
    with step_progress(f"plan of {runs.name}", total=len(runs.variants)) as advance:
        for name, config in runs.variants.items():
            key = cost_key(config)
            if key in known:
                plan = found[known[key]].plan
            else:
                read = config.model_dump_json(
                    include={"model": {"path", "precision"}, "data": True}
                )
                plan = plan_training(config, architectures, gpus=gpus, encoders=encoders.get(read))
                encoders[read] = plan.encoders
            found[name] = _variant(runs, name, config, plan, rates, known.get(key))
            known.setdefault(key, name)
            advance(len(found), name)
    if runs.costs_as is None:
        return found
    hours = found[runs.costs_as].hours
    return {name: replace(variant, hours=hours) for name, variant in found.items()}


def _variant(
    runs: RecipeRuns, name: str, config: Training, plan: RunPlan, rates: Rates, same: str | None
) -> VariantPlan:
    a_step = rates.seconds(precision_of(config), plan.step_flops) / HOUR
    trials = runs.trials.get(name)
    return VariantPlan(
        config,
        plan,
        runs.counts.get(name, 0),
        config.steps * a_step,
        0 if trials is None else trials.runs,
        0.0 if trials is None else trials.steps * a_step,
        same,
    )


def _encodings(
    runs: RecipeRuns, planned: Mapping[str, VariantPlan], rates: Rates, clips: int | None
) -> list[Encoding]:
    """By data set, what all variants that are trained on it have the cache keep."""
    groups: dict[str, list[VariantPlan]] = {}
    for variant in planned.values():
        if variant.runs:
            how = {"cache", "workers", "prefetch"}
            data = variant.config.data.model_dump_json(exclude=how)
            groups.setdefault(data, []).append(variant)
    return [_encoding(runs, group, rates, clips) for group in groups.values()]


def _encoding(
    runs: RecipeRuns, group: list[VariantPlan], rates: Rates, clips: int | None
) -> Encoding:
    known = clips or getattr(group[0].config.data, "train_clips", None)
    # runs of a seed draw the same clips
    most = max(one.config.steps * one.config.optim.batch_size for one in group)
    draws = most * runs.seeds
    count = min(known, draws) if known else draws
    kept: dict[str, int] = {}
    for variant in group:
        kept |= variant.plan.clip.cached
    seconds = rates.seconds(precision_of(group[0].config), _encoding_flops(group))
    return Encoding(count, known is not None, kept, count * seconds / HOUR)


def _encoding_flops(group: list[VariantPlan]) -> dict[str, int]:
    """Of a clip, by part: what the runs of all variants read of it, each thing once."""
    once: dict[str, int] = {}
    teachers: dict[object, int] = {}
    for variant in group:
        once |= variant.plan.clip_flops
        if TEACHERS in variant.plan.clip_flops:
            read = variant.plan.step.teachers
            teachers |= {(t.alias, t.kind, t.shape, t.flops): t.flops for t in read}
    if teachers:
        once[TEACHERS] = sum(teachers.values())
    return once


def _can_train(runs: RecipeRuns, gpus: int) -> bool:
    """Whether so many GPUs can share the training, or train runs each."""
    if runs.kind == "stage1":
        return gpus == 1
    if not runs.is_alone:
        return gpus >= runs.ranks
    (run,) = runs.variants.values()
    assert isinstance(run, RunConfig)
    return run.optim.batch_size % (run.optim.accumulate * gpus) == 0


def cost_key(config: Training) -> str:
    """Equal where trainings cost the same, as far as a plan looks."""
    left_out = {"name", "seed", "output", "tracking"}
    return config.model_dump_json(exclude=left_out)


def _days(
    runs: RecipeRuns, planned: Mapping[str, VariantPlan], encodings: list[Encoding], gpus: int
) -> float:
    encoding = sum(one.hours for one in encodings)
    hours = [one for variant in planned.values() for one in variant.all_hours]
    if runs.is_alone:
        return (encoding + sum(hours)) / gpus / 24
    # the longest run first, each where GPUs are free first
    busy = [0.0] * min(gpus // runs.ranks, len(hours))
    for one in sorted(hours, reverse=True):
        place = busy.index(min(busy))
        busy[place] += one / runs.ranks
    return (encoding / gpus + max(busy)) / 24


def _notes(runs: RecipeRuns) -> list[str]:
    notes = []
    most = max(config.data.references[1] for config in runs.variants.values())
    if most and runs.kind != "stage1":
        notes.append(f"every sample is taken to have {most} references, the most of the recipe")
    if runs.kind == "stage1":
        notes.append(f"every clip is taken to have {ENTITIES} entities, with a mask of each")
    return notes
