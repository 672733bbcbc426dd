"""The numbers of a report, computed once for every form of it.

Every table (HTML, Markdown, CSV, terminal) is made of `SummaryRow`, text included, so they cannot
disagree. Differences are paired: variant minus baseline with the same seed, hence with the same
initial weights, samples, noise and timesteps.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable

from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.report.cost_rows import cost_groups, cost_notes
from alignlab.experiments.report.metric_table import (
    QUANTITIES,
    REPLACED_BY,
    block_of,
    quantity,
    split_name,
)
from alignlab.experiments.report.statistics import paired_statistics, without_rounding
from alignlab.experiments.report.summary_row import SummaryRow as SummaryRow
from alignlab.experiments.report.summary_row import joined as joined
from alignlab.experiments.report.summary_row import ratio_text as ratio_text


def summary_rows(comparison: Comparison) -> list[SummaryRow]:
    """All metrics of all variants, metric by metric: headline first, costs last.

    Costs that were measured once for all seeds stand before those that the runs logged, and take
    the place of what `REPLACED_BY` names in the summary table.
    """
    numbers = {(run.variant, run.seed): run.metrics for run in comparison.results}
    measured = cost_groups(comparison)
    chosen = set(comparison.headline)
    groups: list[list[SummaryRow]] = []
    for metric in _ordered(comparison, {name for run in numbers.values() for name in run}):
        headline = metric in chosen if chosen else quantity(metric).headline
        headline = headline and REPLACED_BY.get(metric) not in measured
        group = [_row(comparison, numbers, metric, v, headline) for v in comparison.variants]
        groups.append(_with_best(_with_statistics(group)))
    place = next((i for i, g in enumerate(groups) if g[0].quantity.cost), len(groups))
    groups[place:place] = measured.values()
    return [row for group in groups for row in group]


def by_metric(rows: Iterable[SummaryRow]) -> list[list[SummaryRow]]:
    """Group rows by metric, both in their order."""
    groups: dict[str, list[SummaryRow]] = {}
    for row in rows:
        groups.setdefault(row.metric, []).append(row)
    return list(groups.values())


def summary_notes(comparison: Comparison, rows: list[SummaryRow]) -> list[str]:
    """What a reader must know before trusting the tables, one sentence each."""
    notes = []
    missing = [
        f"{variant} (seed {seed})"
        for variant in comparison.variants
        for seed in comparison.seeds
        if comparison.run(variant, seed) is None
    ]
    if missing:
        notes.append(
            f"Runs without a result: {', '.join(missing)}. Their variants' numbers, marked †, are "
            "over fewer seeds."
        )
    if len(comparison.seeds) == 1:
        notes.append(
            f"One seed ({comparison.seeds[0]}) only: no spread is known, and a difference may be "
            "that seed's alone."
        )
    notes.extend(cost_notes(comparison, rows))
    if comparison.allowed:
        names = ", ".join(comparison.allowed)
        notes.append(
            f"Measured or tuned differently, as the recipe allows: {names}. Numbers that depend on "
            "it do not compare."
        )
    num_hidden = 0
    for group in by_metric(rows):
        flags = [f"{row.variant}: {row.flag}" for row in group if row.is_incomplete]
        if flags and group[0].headline:
            notes.append(f"{group[0].quantity.label} ({group[0].metric}): {', '.join(flags)}.")
        num_hidden += bool(flags) and not group[0].headline
    if num_hidden:
        notes.append(f"Outside this table, {num_hidden} more metrics lack numbers of some runs.")
    return notes


Numbers = dict[tuple[str, int], dict[str, float]]


def _ordered(comparison: Comparison, names: set[str]) -> list[str]:
    # A metric asked for by name that no run has is shown, as missing.
    chosen = list(comparison.headline)
    order = list(QUANTITIES)

    def place(name: str) -> tuple[bool, bool, int, str, int, str]:
        base, part = split_name(name)
        known, block = quantity(name), block_of(name)
        rank = order.index(base) if base in order else len(order)
        return known.cost, not known.headline, rank, base, -1 if block is None else block, part

    return chosen + sorted(names - set(chosen), key=place)


def _row(
    comparison: Comparison, numbers: Numbers, metric: str, variant: str, headline: bool
) -> SummaryRow:
    known, is_baseline = quantity(metric), variant == comparison.baseline

    def of(name: str) -> dict[int, float]:
        found = {seed: numbers.get((name, seed), {}).get(metric) for seed in comparison.seeds}
        return {seed: value for seed, value in found.items() if value is not None}

    values, base = of(variant), of(comparison.baseline)
    shared = [] if is_baseline else [seed for seed in values if seed in base]
    differences = {seed: _difference(values[seed], base[seed]) for seed in shared}
    mean, std = _spread(list(values.values()))
    num_better = None
    if known.better != "none" and not is_baseline:
        sign = -1.0 if known.better == "lower" else 1.0
        num_better = sum(sign * difference > 0.0 for difference in differences.values())
    return SummaryRow(
        metric=metric,
        quantity=known,
        headline=headline,
        variant=variant,
        is_baseline=is_baseline,
        num_seeds=len(comparison.seeds),
        num_runs=sum(name == variant for name, _ in numbers),
        values=values,
        mean=mean,
        std=std,
        differences=differences,
        paired=None,
        num_better=num_better,
    )


def _difference(value: float, base: float) -> float:
    return without_rounding(value - base, max(abs(value), abs(base)))


def _spread(values: list[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    if not all(math.isfinite(value) for value in values):
        return math.nan, None
    if len(values) == 1:
        return values[0], None
    scale = max(abs(value) for value in values)
    return statistics.fmean(values), without_rounding(statistics.stdev(values), scale)


def _with_statistics(group: list[SummaryRow]) -> list[SummaryRow]:
    """The rows of one metric with their paired statistics, corrected over its variants."""
    sizes = [abs(v) for row in group for v in row.values.values() if math.isfinite(v)]
    differences = {row.variant: list(row.differences.values()) for row in group}
    found = paired_statistics(differences, max(sizes, default=0.0))
    return [dataclasses.replace(row, paired=found.get(row.variant)) for row in group]


def _with_best(group: list[SummaryRow]) -> list[SummaryRow]:
    known = group[0].quantity
    means = [row.mean for row in group if row.mean is not None]
    is_judged = known.better != "none" and not known.cost
    if not is_judged or any(row.flag for row in group) or len(set(means)) < 2:
        return group
    best = min(means) if known.better == "lower" else max(means)
    return [dataclasses.replace(row, is_best=row.mean == best) for row in group]
