"""Several finished comparisons as one: further seeds of the same variants, or further variants.

Nothing is trained. What was not measured alike is refused (`alike`), runs that several have count
once, and metrics are those of the blocks that all have measured.
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

from pydantic import JsonValue

from alignlab.environment import command_line
from alignlab.errors import UserError
from alignlab.evaluation.blocks import metrics_of_blocks
from alignlab.experiments.compare.alike import (
    Source,
    refuse_other_numbers,
    refuse_others,
    refuse_unequal_tuning,
    tell_unsure,
)
from alignlab.experiments.compare.config import differing_values
from alignlab.experiments.compare.finding import Finding
from alignlab.experiments.compare.result import Budget, Comparison, Cost, Curve, RunResult
from alignlab.experiments.compare.subset import moved, with_runs
from alignlab.experiments.report.metric_table import block_of
from alignlab.experiments.report.text import as_text
from alignlab.recipe import to_yaml

log = logging.getLogger(__name__)

Item = TypeVar("Item")


def merged(
    comparisons: Sequence[tuple[Path, Comparison]],
    target: Path | None,
    *,
    baseline: str | None = None,
) -> Comparison:
    """One comparison of all variants and seeds, in the order in which they come.

    Args:
        comparisons: each with its folder; at least one.
        target: the folder of the result, to which the run folders are relative; None: nothing is
            written, and clips are left out.
        baseline: of the result, where they have different ones; `subset` gives one another.

    Raises:
        UserError: they were not measured alike, the same run has other numbers, or they have
            different baselines and none is given.
    """
    sources = [Source(folder, comparison) for folder, comparison in comparisons]
    first = sources[0].comparison
    for one, other in combinations(sources, 2):  # what two share need not be the first's
        refuse_others(one, other)
    tell_unsure(sources)
    chosen = _common_baseline(sources, baseline)
    changes = _merged_recipe(sources, chosen) | _merged_runs(sources, target)
    if any(source.comparison.baseline != chosen for source in sources):
        changes["again"] = ()  # runs of what was the baseline
    changes |= _merged_origin([source.comparison for source in sources])
    for field in dataclasses.fields(first):
        values = [getattr(source.comparison, field.name) for source in sources]
        if field.name not in changes and any(value != values[0] for value in values):
            log.warning("%s: not the same in all comparisons, the first's is kept", field.name)
    names = {run.variant for run in changes.get("again", first.again)}
    if shared := names.intersection(changes["variants"]):
        raise UserError(
            f"{shared.pop()} is the second training of a baseline in one comparison and a variant "
            "in another: not merged"
        )
    found = dataclasses.replace(first, **changes)
    refuse_unequal_tuning(found)
    missing = len(found.variants) * len(found.seeds) - len(found.results)
    if missing:
        log.warning("%d of the runs of all variants with all seeds are missing", missing)
    return found


def _common_baseline(sources: Sequence[Source], asked: str | None) -> str:
    """The baseline that all have, so that costs, budgets and tuning are still against it."""
    first, *others = sources
    for other in others:
        if other.comparison.baseline != first.comparison.baseline:
            if asked is not None:
                return asked
            raise UserError(
                f"{first.folder} has the baseline {first.comparison.baseline} and {other.folder} "
                f"has {other.comparison.baseline}: say which by --baseline"
            )
    return first.comparison.baseline


def _merged_runs(sources: Sequence[Source], target: Path | None) -> dict[str, Any]:
    """Every field that holds runs, with those of all; runs that several have count once."""
    blocks = _common_blocks(sources)
    fields: dict[str, dict[tuple[str, int], tuple[Source, RunResult]]] = {}
    for source in sources:
        for name, runs in with_runs(
            moved(source.comparison, source.folder, target), lambda run: _of_blocks(run, blocks)
        ).items():
            kept = fields.setdefault(name, {})
            for run in runs:
                owner, earlier = kept.setdefault((run.variant, run.seed), (source, run))
                if earlier is not run:
                    refuse_other_numbers(earlier, run, f"{owner.folder} and {source.folder}")
    variants = _in_order(source.comparison.variants for source in sources)
    seeds = _in_order(source.comparison.seeds for source in sources)

    def place(run: RunResult) -> tuple[int, int]:
        is_variant = run.variant in variants
        return seeds.index(run.seed), variants.index(run.variant) if is_variant else len(variants)

    runs_of = {
        name: tuple(sorted((run for _, run in kept.values()), key=place))
        for name, kept in fields.items()
        if kept
    }
    return {"variants": variants, "seeds": seeds} | runs_of


def _common_blocks(sources: Sequence[Source]) -> set[int] | None:
    """The blocks that all comparisons have measured; None where that is all of them."""
    measured = {
        source.folder: {block_of(name) for run in source.comparison.results for name in run.metrics}
        for source in sources
        if source.comparison.results
    }
    by_folder = {
        folder: {block for block in blocks if block is not None}
        for folder, blocks in measured.items()
    }
    if any(by_folder.values()) and not all(by_folder.values()):
        without = ", ".join(str(folder) for folder, blocks in by_folder.items() if not blocks)
        log.warning("%s: no block was measured: metrics of blocks are left out", without)
        return set()
    first, *others = by_folder.values() or [set()]
    if all(blocks == first for blocks in others):
        return None
    common, all_blocks = first.intersection(*others), first.union(*others)
    if not common:
        named = "; ".join(
            f"{folder}: {', '.join(map(str, sorted(blocks))) or 'none'}"
            for folder, blocks in by_folder.items()
        )
        raise UserError(
            f"eval.blocks: no block was measured in all comparisons ({named}): train one of them "
            "again with the blocks of the other in eval.blocks"
        )
    log.warning(
        "blocks %s were not measured in all comparisons and are left out, also of the means over "
        "blocks",
        ", ".join(map(str, sorted(all_blocks - common))),
    )
    return common


def _of_blocks(run: RunResult, blocks: set[int] | None) -> RunResult:
    if blocks is None:
        return run
    return dataclasses.replace(
        run,
        metrics=metrics_of_blocks(run.metrics, blocks),
        measured=_curves_of_blocks(run.measured, blocks),
    )


def _curves_of_blocks(curves: Mapping[str, Curve], blocks: set[int]) -> dict[str, Curve]:
    steps = sorted({step for curve in curves.values() for step, _ in curve})
    kept: dict[str, list[tuple[int, float]]] = {}
    by_name = {name: dict(curve) for name, curve in curves.items()}
    for step in steps:
        found = {name: curve[step] for name, curve in by_name.items() if step in curve}
        for name, value in metrics_of_blocks(found, blocks).items():
            kept.setdefault(name, []).append((step, value))
    return {name: tuple(points) for name, points in kept.items()}


def _merged_recipe(sources: Sequence[Source], baseline: str) -> dict[str, Any]:
    """What follows from the recipes: settings, cost, budget and tuning of all variants."""
    comparisons = [source.comparison for source in sources]
    variants = _in_order(one.variants for one in comparisons)
    if baseline not in variants:
        raise UserError(f"--baseline: no variant {baseline!r}; there are {', '.join(variants)}")
    owners = {v: source for source in reversed(sources) for v in source.comparison.variants}
    allowed = _in_order(one.allowed for one in comparisons)
    recipe = sources[0].recipe | {
        "baseline": baseline,
        "seeds": list(_in_order(one.seeds for one in comparisons)),
        "variants": {v: owners[v].recipe["variants"][v] for v in variants},
    }
    if allowed:
        recipe["allow_differences"] = list(allowed)
    finding = _merged_finding(sources, baseline)
    recipe.pop("finding", None)
    if finding is not None:
        recipe["finding"] = finding.model_dump(mode="json")
    if any(source.recipe.get("aa") for source in sources):
        recipe["aa"] = True
    return {
        "baseline": baseline,
        "recipe": to_yaml(recipe),
        "differing": differing_values({v: owners[v].settings(v) for v in variants}),
        "allowed": allowed,
        "cost": _merged_cost(comparisons, baseline),
        "budget": _merged_budget(comparisons),
        "tuning": _merged_tuning(comparisons, variants),
        "finding": finding,
    }


def _merged_finding(sources: Sequence[Source], baseline: str) -> Finding | None:
    """The finding that the comparisons check, if it is one and of this baseline."""
    found = [s.comparison for s in sources if s.comparison.finding is not None]
    if not found:
        return None
    if all((one.finding, one.baseline) == (found[0].finding, baseline) for one in found):
        return found[0].finding
    log.warning("comparisons check different findings, or of other baselines: the report has none")
    return None


def _merged_cost(comparisons: Sequence[Comparison], baseline: str) -> Cost | None:
    """The costs of all variants, if they were measured in the same way; else none, with a word."""
    costs = [one.cost for one in comparisons if one.cost is not None]
    if not costs:
        return None
    first = costs[0]
    facts = {(cost.device, cost.rounds, cost.data_steps, cost.unknown) for cost in costs}
    baselines = {one.baseline for one in comparisons} | {baseline}
    if len(facts) > 1 or len(baselines) > 1 or any(baseline not in c.variants for c in costs):
        log.warning(
            "the cost of a step was not measured alike in all comparisons: the report is without it"
        )
        return None
    seconds = first.variants[baseline].seconds
    variants = dict(first.variants)
    for cost in costs[1:]:
        for variant, one in cost.variants.items():
            ratio = one.slower.value  # `seconds` is the baseline's times that ratio
            new = dataclasses.replace(one, seconds=seconds * ratio)
            variants.setdefault(variant, new)
    beyond = max(cost.beyond for cost in costs)
    return dataclasses.replace(first, variants=variants, beyond=beyond)


def _merged_budget(comparisons: Sequence[Comparison]) -> Budget | None:
    budgets = [one.budget for one in comparisons if one.budget is not None]
    if not budgets:
        return None
    ratios: dict[str, float] = {}
    steps: dict[str, int] = {}
    for budget in budgets:
        ratios, steps = budget.ratios | ratios, budget.steps | steps
    return dataclasses.replace(budgets[0], ratios=ratios, steps=steps)


def _merged_tuning(
    comparisons: Sequence[Comparison], variants: Sequence[str]
) -> dict[str, dict[str, JsonValue]]:
    names = _in_order(one.tuning for one in comparisons)
    owners = {v: one for one in reversed(comparisons) for v in one.variants}
    return {n: {v: owners[v].tuning.get(n, {}).get(v) for v in variants} for n in names}


def _merged_origin(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Who made them, how and where."""
    facts = _in_order(one.environment for one in comparisons)
    environment: dict[str, JsonValue] = {}
    for name in facts:
        values = [one.environment[name] for one in comparisons if name in one.environment]
        is_one = all(value == values[0] for value in values)
        environment[name] = values[0] if is_one else ", ".join(_in_order([map(as_text, values)]))
    commands = _in_order([(one.command for one in comparisons)])
    return {
        "name": " + ".join(_in_order([(one.name for one in comparisons)])),
        "environment": environment,
        "duration_s": sum(one.duration_s for one in comparisons),
        "command": "; ".join([*commands, command_line("alignlab")]),
        "commit": ", ".join(filter(None, _in_order([(one.commit for one in comparisons)]))),
        "own_metrics": {name: m for one in comparisons for name, m in one.own_metrics.items()},
    }


def _in_order(lists: Iterable[Iterable[Item]]) -> tuple[Item, ...]:
    """What any of the lists has, once, in the order in which it comes."""
    return tuple(dict.fromkeys(item for items in lists for item in items))
