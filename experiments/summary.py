"""The numbers of a report, computed once for every form of it.

Every table (HTML, Markdown, CSV, terminal) is made of `SummaryRow`, text included, so they cannot
disagree. Differences are paired: variant minus baseline with the same seed, hence with the same
initial weights, samples, noise and timesteps.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from alignlab.experiments.numbers import (
    DASH,
    format_interval,
    format_number,
    format_p,
    format_spread,
)
from alignlab.experiments.quantities import QUANTITIES, Quantity, block_of, quantity, split_name
from alignlab.experiments.result import Comparison
from alignlab.experiments.statistics import Paired, paired_statistics, without_rounding


@dataclass(frozen=True)
class SummaryRow:
    """One metric of one variant.

    Args:
        metric: flat name.
        quantity: meaning of the metric.
        headline: in the summary table.
        variant, is_baseline: the variant, and whether differences are taken to it.
        num_seeds, num_runs: seeds asked for, and how many of them finished.
        values: number per seed, for the seeds that have one.
        mean, std: over seeds; the sample standard deviation (n - 1), None with fewer than two
            seeds; both None when there is no number, NaN and None when one is not finite.
        differences: variant minus baseline per seed, for the seeds that both have.
        paired: statistics of `differences`; None for the baseline, and when no seed is shared or a
            difference is not finite.
        num_better: of `differences`, how many lie on the better side; None without a better side.
        is_best: best mean of the variants; never of a cost, or with a number missing anywhere.
    """

    metric: str
    quantity: Quantity
    headline: bool
    variant: str
    is_baseline: bool
    num_seeds: int
    num_runs: int
    values: dict[int, float]
    mean: float | None
    std: float | None
    differences: dict[int, float]
    paired: Paired | None
    num_better: int | None
    is_best: bool = False

    @property
    def text(self) -> tuple[str, str]:
        """Mean and spread as shown; an em dash for no number, no spread with one seed."""
        return (DASH, "") if self.mean is None else format_spread(self.mean, self.std)

    @property
    def value_text(self) -> str:
        """Mean and spread in one text, with a dagger when seeds are missing or not finite."""
        return joined(self.text) + ("†" if self.flag else "")

    @property
    def diff_text(self) -> str:
        """Paired difference and its 95% interval as shown; empty for the baseline."""
        if self.is_baseline:
            return ""
        if self.paired is None:
            return DASH
        mean, low, high = self.paired.mean, self.paired.low, self.paired.high
        if low is None or high is None or low == high:
            return format_number(mean, sign=True)
        return format_interval(mean, low, high, sign=True)

    @property
    def agreement(self) -> str:
        """In how many of several seeds the variant beats the baseline: "2/3"; empty for a cost."""
        is_equal = self.paired is not None and self.paired.is_equal
        if self.num_better is None or len(self.differences) < 2 or self.quantity.cost or is_equal:
            return ""
        return f"{self.num_better}/{len(self.differences)}"

    @property
    def change(self) -> str:
        """What may be claimed: "better", "worse", "changed" (no better side), "" for nothing."""
        if self.paired is None or not self.paired.is_found:
            return ""
        if self.quantity.better == "none":
            return "changed"
        is_better = (self.paired.mean > 0.0) == (self.quantity.better == "higher")
        return "better" if is_better else "worse"

    @property
    def p_text(self) -> str:
        """Holm-corrected p-value as shown; empty where there is none, or no spread behind it."""
        if self.paired is None or self.paired.holm_p is None or self.paired.low is None:
            return ""
        return format_p(self.paired.holm_p)

    @property
    def flag(self) -> str:
        """Why this number is not what it should be, or empty."""
        wild = [str(seed) for seed, value in self.values.items() if not math.isfinite(value)]
        if not self.values:
            return "not measured"
        parts = []
        if len(self.values) < self.num_seeds:
            parts.append(f"{len(self.values)} of {self.num_seeds} seeds")
        if wild:
            parts.append(f"not finite with seed {', '.join(wild)}")
        return "; ".join(parts)

    @property
    def is_incomplete(self) -> bool:
        """Whether a finished run lacks this number, or has one that is not finite."""
        finite = [value for value in self.values.values() if math.isfinite(value)]
        return len(finite) < max(self.num_runs, 1)


def joined(texts: tuple[str, str]) -> str:
    """Mean and spread in one text: "0.412 ± 0.004"."""
    return " ± ".join(text for text in texts if text)


def summary_rows(comparison: Comparison) -> list[SummaryRow]:
    """All metrics of all variants, metric by metric: headline first, costs last."""
    numbers = {(run.variant, run.seed): run.metrics for run in comparison.results}
    chosen = set(comparison.headline)
    rows: list[SummaryRow] = []
    for metric in _ordered(comparison, {name for run in numbers.values() for name in run}):
        headline = metric in chosen if chosen else quantity(metric).headline
        group = [_row(comparison, numbers, metric, v, headline) for v in comparison.variants]
        rows.extend(_with_best(_with_statistics(group)))
    return rows


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
    if comparison.allowed:
        notes.append(
            f"Measured differently, as the recipe allows: {', '.join(comparison.allowed)}. Numbers "
            "that depend on it do not compare."
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
