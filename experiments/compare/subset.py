"""A part of a comparison: some variants, seeds or metrics, against another baseline, elsewhere."""

import dataclasses
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignlab.config.data import unknown_name
from alignlab.errors import UserError
from alignlab.experiments.compare.finding import Expectation
from alignlab.experiments.compare.result import Budget, Comparison, Cost, RunResult
from alignlab.experiments.report.metric_table import (
    COST_QUANTITIES,
    STEPS_TO_TARGET,
    split_name,
)
from alignlab.experiments.report.steps_to_target import TARGET

log = logging.getLogger(__name__)

Settings = dict[str, dict[str, Any]]
"""Setting -> variant -> value."""


def subset(
    comparison: Comparison,
    *,
    variants: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    baseline: str | None = None,
    metrics: Sequence[str] | None = None,
) -> Comparison:
    """The comparison with some of its variants, seeds and metrics only.

    Args:
        comparison: the whole; it stays as it is.
        variants: those to keep besides the baseline, in the comparison's order; None: all.
        seeds: those to keep; None: all.
        baseline: the variant that differences are taken to; None: the comparison's own.
        metrics: as `table.csv` names them; `val/flow` and `cknna` stand for all their parts.
            `steps_to_target` brings `val/flow` with it, of which it is made. None: all.

    Raises:
        UserError: one of them is not in the comparison.
    """
    if baseline is not None:
        comparison = _with_baseline(comparison, baseline)
    if variants is not None:
        comparison = _with_variants(comparison, variants)
    if seeds is not None:
        comparison = _with_seeds(comparison, seeds)
    return comparison if metrics is None else _with_metrics(comparison, metrics)


def with_runs(
    comparison: Comparison, change: Callable[[RunResult], RunResult | None]
) -> dict[str, tuple[RunResult, ...]]:
    """Every field that holds runs, changed; a run is left out where `change` gives None."""
    changed = {}
    for field in dataclasses.fields(comparison):
        runs = getattr(comparison, field.name)
        if isinstance(runs, tuple) and all(isinstance(run, RunResult) for run in runs):
            changed[field.name] = tuple(new for run in runs if (new := change(run)) is not None)
    return changed


def moved(comparison: Comparison, source: Path, target: Path | None) -> Comparison:
    """The comparison with the folders of its runs relative to another folder.

    Clips of runs whose files are not there are left out, and that is logged.

    Args:
        comparison: of `source`.
        source: its folder.
        target: where its report is to be; None: nowhere, and clips are of no use.
    """
    lost: list[str] = []

    def change(run: RunResult) -> RunResult:
        if target is None:
            return dataclasses.replace(run, samples=())
        folder = (source / run.run_dir).resolve()
        samples = run.samples
        if not clips_are_there(run, source):
            lost.append(f"{run.variant} with seed {run.seed}")
            samples = ()
        run_dir = os.path.relpath(folder, target.resolve())
        return dataclasses.replace(run, run_dir=run_dir, samples=samples)

    found = dataclasses.replace(comparison, **_fields(with_runs(comparison, change)))
    if lost:
        log.warning(
            "%s: clips of %d runs are not there (%s): the report is without them",
            *(source, len(lost), _few(lost)),
        )
    return found


def clips_are_there(run: RunResult, folder: Path) -> bool:
    """Whether all files of a run's clips are where its comparison, in `folder`, has them."""
    names = [
        name
        for clip in run.samples
        for name in (clip.video, clip.real, *clip.references)
        if name is not None
    ]
    return all((folder / run.run_dir / name).is_file() for name in names)


def differing_only(settings: Mapping[str, Mapping[str, Any]], variants: Sequence[str]) -> Settings:
    """Of settings by variant those in which these variants differ."""
    kept: Settings = {}
    for name, values in settings.items():
        own = {variant: values.get(variant) for variant in variants}
        if any(value != own[variants[0]] for value in own.values()):
            kept[name] = own
    return kept


def _with_baseline(comparison: Comparison, baseline: str) -> Comparison:
    if baseline not in comparison.variants:
        raise UserError(f"--baseline: {unknown_name('variant', baseline, comparison.variants)}")
    if baseline == comparison.baseline:
        return comparison
    if comparison.cost is not None:
        log.warning(
            "the cost of a step was measured against %s: the report is without it",
            comparison.baseline,
        )
    budget = comparison.budget
    if budget is not None:
        ratios = {v: ratio / budget.ratios[baseline] for v, ratio in budget.ratios.items()}
        budget = dataclasses.replace(budget, ratios=ratios)
    # what else holds runs is of the former baseline
    others = {name: () for name in with_runs(comparison, lambda run: run) if name != "results"}
    changes: dict[str, Any] = {"baseline": baseline, "budget": budget, "cost": None} | others
    return dataclasses.replace(_without_finding(comparison), **changes)


def _with_variants(comparison: Comparison, variants: Sequence[str]) -> Comparison:
    for variant in variants:
        if variant not in comparison.variants:
            raise UserError(f"--variants: {unknown_name('variant', variant, comparison.variants)}")
    wanted = {comparison.baseline, *variants}
    if any(expected.variant not in wanted for expected in _expected(comparison)):
        comparison = _without_finding(comparison)
    kept = tuple(variant for variant in comparison.variants if variant in wanted)
    gone = set(comparison.variants) - wanted
    runs = with_runs(comparison, lambda run: None if run.variant in gone else run)
    tuning = {n: {v: values.get(v) for v in kept} for n, values in comparison.tuning.items()}
    is_tuned = any(value is not None for values in tuning.values() for value in values.values())
    changes: dict[str, Any] = {
        "variants": kept,
        "differing": differing_only(comparison.differing, kept),
        "cost": _cost_of(comparison.cost, kept),
        "budget": _budget_of(comparison.budget, kept),
        "tuning": tuning if is_tuned else {},
    }
    return dataclasses.replace(comparison, **(_fields(runs) | changes))


def _with_seeds(comparison: Comparison, seeds: Sequence[int]) -> Comparison:
    for seed in seeds:
        if seed not in comparison.seeds:
            known = ", ".join(map(str, comparison.seeds))
            raise UserError(f"--seeds: no runs with seed {seed}; there are {known}")
    kept = tuple(seed for seed in comparison.seeds if seed in seeds)
    runs = with_runs(comparison, lambda run: run if run.seed in kept else None)
    return dataclasses.replace(comparison, **(_fields(runs) | {"seeds": kept}))


def _with_metrics(comparison: Comparison, metrics: Sequence[str]) -> Comparison:
    names = {name for run in comparison.results for name in (*run.metrics, *run.measured)}
    has_curves = any(TARGET in run.measured for run in comparison.results)
    known = {*names, *(split_name(name)[0] for name in names)}
    known |= {STEPS_TO_TARGET} if has_curves else set()
    known |= set() if comparison.cost is None else set(COST_QUANTITIES)
    for metric in metrics:
        if metric not in known:
            raise UserError(f"--metrics: {unknown_name('metric', metric, sorted(known))}")
    wanted = {*metrics, *([TARGET] if STEPS_TO_TARGET in metrics else [])}
    shown = wanted | ({STEPS_TO_TARGET} if TARGET in wanted else set())
    asked = [expected.metric for expected in _expected(comparison)]
    if any(name not in shown and split_name(name)[0] not in shown for name in asked):
        comparison = _without_finding(comparison)

    def kept(found: Mapping[str, Any]) -> dict[str, Any]:
        return {n: v for n, v in found.items() if n in wanted or split_name(n)[0] in wanted}

    def change(run: RunResult) -> RunResult:
        return dataclasses.replace(run, metrics=kept(run.metrics), measured=kept(run.measured))

    has_costs = any(metric in COST_QUANTITIES for metric in metrics)
    cost = comparison.cost if has_costs else None
    return dataclasses.replace(
        comparison, **(_fields(with_runs(comparison, change)) | {"cost": cost})
    )


def _expected(comparison: Comparison) -> tuple[Expectation, ...]:
    return () if comparison.finding is None else comparison.finding.expect


def _without_finding(comparison: Comparison) -> Comparison:
    """A part of a comparison does not judge all that a finding expects."""
    if comparison.finding is None:
        return comparison
    log.warning("the published finding is of all that the recipe compares: the report is without")
    return dataclasses.replace(comparison, finding=None)


def _cost_of(cost: Cost | None, variants: Collection[str]) -> Cost | None:
    if cost is None:
        return None
    kept = {variant: one for variant, one in cost.variants.items() if variant in variants}
    return dataclasses.replace(cost, variants=kept)


def _budget_of(budget: Budget | None, variants: Collection[str]) -> Budget | None:
    if budget is None:
        return None
    return dataclasses.replace(
        budget,
        ratios={v: ratio for v, ratio in budget.ratios.items() if v in variants},
        steps={v: steps for v, steps in budget.steps.items() if v in variants},
    )


def _fields(runs: Mapping[str, tuple[RunResult, ...]]) -> dict[str, Any]:
    """As keywords for `dataclasses.replace`, whose types are those of all fields."""
    return dict(runs)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
