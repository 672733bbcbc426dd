"""The numbers of a report, computed once for every form of it.

Every table (HTML, Markdown, CSV, LaTeX, terminal) is made of `SummaryRow`, text included, so they
cannot disagree. Differences are paired: variant minus baseline with the same seed, hence with the
same initial weights, samples, noise and timesteps.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from alignlab.experiments.compare.own_metrics import own_quantities
from alignlab.experiments.compare.result import Comparison, Ratio
from alignlab.experiments.report.formatting import (
    DASH,
    format_interval,
    format_number,
    format_p,
    format_spread,
)
from alignlab.experiments.report.metric_table import (
    QUANTITIES,
    REPLACED_BY,
    STEPS_TO_TARGET,
    Quantity,
    block_of,
    split_name,
)
from alignlab.experiments.report.run_warnings import aligned_footnotes, diverged_seeds
from alignlab.experiments.report.statistics import (
    Paired,
    mean_and_std,
    paired_statistics,
    without_rounding,
)
from alignlab.experiments.report.steps_to_target import (
    TARGET,
    StepsToTarget,
    steps_footnotes,
    steps_to_target,
)

# Metrics of the finished runs, by variant and seed.
RunMetrics = dict[tuple[str, int], dict[str, float]]


@dataclass(frozen=True)
class SummaryRow:
    """One metric of one variant.

    Args:
        metric: flat name.
        quantity: meaning of the metric.
        headline: in the summary table.
        variant, is_baseline: the variant, and whether differences are taken to it.
        num_seeds, num_runs: seeds of the recipe, and how many of them finished.
        values: number per seed, for the seeds that have one.
        mean, std: over seeds; the sample standard deviation (n - 1), None with fewer than two
            seeds; both None when there is no number, NaN and None when one is not finite. Of steps
            to target, the geometric mean, None where it is only a bound, and no std.
        differences: variant minus baseline per seed, for the seeds that both have.
        paired: statistics of `differences`; None for the baseline, and when no seed is shared or a
            difference is not finite.
        num_better: of `differences`, how many lie on the better side; None without a better side.
        ratio: over the baseline, of a cost that is measured once for all seeds and has no values
            per seed.
        target: of the steps to target, whose `values` are ratios, `differences` those less 1, and
            `paired` of their logarithms.
        diverged: seeds of the variant whose run did.
        is_claimable: neither the variant's runs nor the baseline's diverged.
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
    ratio: Ratio | None = None
    target: StepsToTarget | None = None
    diverged: tuple[int, ...] = ()
    is_claimable: bool = True

    @property
    def text(self) -> tuple[str, str]:
        """Mean and spread as shown; an em dash for no number, no spread with one seed."""
        if self.target is not None:
            return self.target.text, ""
        return (DASH, "") if self.mean is None else format_spread(self.mean, self.std)

    @property
    def value_text(self) -> str:
        """Mean and spread in one text, with a dagger when seeds are missing or not finite.

        Behind steps to target stands with how many seeds it was never reached.
        """
        text = joined(self.text) + ("†" if self.flag else "")
        never = "" if self.target is None else self.target.never_text
        return f"{text} ({never})" if never else text

    @property
    def diff_text(self) -> str:
        """Paired difference and its interval as shown; empty for the baseline."""
        if self.is_baseline:
            return ""
        if self.ratio is not None:
            return ratio_text(self.ratio, sign=True)
        if self.target is not None:
            return self.target.change_text
        return DASH if self.paired is None else difference_text(self.paired)

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
        if self.ratio is not None:
            if not self.ratio.is_claimed:
                return ""
            return "worse" if self.ratio.value > 1.0 else "better"
        if self.paired is None or not self.paired.is_claimed or not self.is_claimable:
            return ""
        if self.quantity.better == "none":
            return "changed"
        is_better = (self.paired.mean > 0.0) == (self.quantity.better == "higher")
        return "better" if is_better else "worse"

    @property
    def is_bold(self) -> bool:
        """Whether the number is set in bold: it is claimed to be better than the baseline's.

        The best mean is not: nothing tells the variants apart from each other.
        """
        return self.change == "better"

    @property
    def p_text(self) -> str:
        """Holm-corrected p-value as shown; empty where there is none, or no spread behind it."""
        if self.paired is None or self.paired.holm_p is None or self.paired.low is None:
            return ""
        return format_p(self.paired.holm_p)

    @property
    def flag(self) -> str:
        """Why this number is not what it should be, or empty."""
        if self.ratio is not None:
            return ""
        if not self.values:
            return "not measured"
        parts = []
        if len(self.values) < self.num_seeds:
            parts.append(f"{len(self.values)} of {self.num_seeds} seeds")
        infinite = [str(seed) for seed, value in self.values.items() if not math.isfinite(value)]
        if infinite:
            parts.append(f"not finite with seed {', '.join(infinite)}")
        if self.diverged:
            parts.append(f"diverged with seed {', '.join(map(str, self.diverged))}")
        return "; ".join(parts)

    @property
    def is_incomplete(self) -> bool:
        """Whether a finished run lacks this number, or has one that is not finite."""
        if self.ratio is not None:
            return False
        finite = [value for value in self.values.values() if math.isfinite(value)]
        return len(finite) < max(self.num_runs, 1)


def summary_rows(comparison: Comparison) -> list[SummaryRow]:
    """All metrics of all variants, metric by metric: headline first, costs last.

    Costs that were measured once for all seeds stand before those that the runs logged, and take
    the place of what `REPLACED_BY` names in the summary table.
    """
    runs = {(run.variant, run.seed): run.metrics for run in comparison.results}
    costs = _cost_groups(comparison)
    groups: list[list[SummaryRow]] = []
    names = {name for metrics in runs.values() for name in metrics}
    for metric in sorted(names, key=partial(place_of, comparison)):
        headline = comparison.quantity(metric).headline and REPLACED_BY.get(metric) not in costs
        group = [_row(comparison, runs, metric, v, headline) for v in comparison.variants]
        groups.append(_with_statistics(group))
        if metric == TARGET:
            groups += _target_groups(comparison)
    place = next((i for i, g in enumerate(groups) if g[0].quantity.cost), len(groups))
    groups[place:place] = costs.values()
    return [row for group in groups for row in group]


def by_metric(rows: Iterable[SummaryRow]) -> list[list[SummaryRow]]:
    """Group rows by metric, both in their order."""
    groups: dict[str, list[SummaryRow]] = {}
    for row in rows:
        groups.setdefault(row.metric, []).append(row)
    return list(groups.values())


def footnotes(comparison: Comparison, rows: list[SummaryRow]) -> list[str]:
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
    diverged = {v: seeds for v in comparison.variants if (seeds := diverged_seeds(comparison, v))}
    if diverged:
        listed = "; ".join(f"{v} (seed {', '.join(map(str, s))})" for v, s in diverged.items())
        notes.append(
            f"Runs that diverged: {listed}. Their variants' numbers are marked †, and no change is "
            "claimed of them."
        )
    if len(comparison.seeds) == 1:
        notes.append(
            f"One seed ({comparison.seeds[0]}) only: no spread is known, and a difference may be "
            "that seed's alone."
        )
    notes.extend(steps_footnotes(comparison, {r.variant: r.target for r in rows if r.target}))
    notes.extend(_cost_footnotes(comparison, rows))
    notes.extend(aligned_footnotes(comparison))
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


def joined(texts: tuple[str, str]) -> str:
    """Mean and spread in one text: "0.412 ± 0.004"."""
    return " ± ".join(text for text in texts if text)


def difference_text(paired: Paired) -> str:
    """A mean difference and its interval, where it has one: "+0.12 [0.07, 0.16]"."""
    if paired.low is None or paired.high is None or paired.low == paired.high:
        return format_number(paired.mean, sign=True)
    return format_interval(paired.mean, paired.low, paired.high, sign=True)


def ratio_text(ratio: Ratio, *, sign: bool = False) -> str:
    """A ratio as a change in percent: "+3.1% [2.0%, 4.2%]", or "+12.34%" of an exact count."""
    if not math.isfinite(ratio.value):
        return DASH  # of a baseline that took no time, say
    change = 100.0 * (ratio.value - 1.0)
    if ratio.low is None or ratio.high is None:
        return f"{format_number(without_rounding(change, 100.0), sign=sign)}%"
    low, high = (100.0 * (end - 1.0) for end in ratio.interval)
    return format_interval(change, low, high, sign=sign, unit="%")


def place_of(comparison: Comparison, metric: str) -> tuple[bool, bool, int, str, int, str]:
    """Sort key of a metric: headline first, costs last, then the order of `QUANTITIES`, and behind
    these of `comparison.own_metrics`."""
    base, part = split_name(metric)
    meaning, block = comparison.quantity(metric), block_of(metric)
    bases = [*QUANTITIES, *own_quantities(comparison.own_metrics)]
    rank = bases.index(base) if base in bases else len(bases)
    return meaning.cost, not meaning.headline, rank, base, -1 if block is None else block, part


def _row(
    comparison: Comparison, runs: RunMetrics, metric: str, variant: str, headline: bool
) -> SummaryRow:
    meaning, is_baseline = comparison.quantity(metric), variant == comparison.baseline
    values = _by_seed(comparison, runs, metric, variant)
    base = _by_seed(comparison, runs, metric, comparison.baseline)
    shared = [] if is_baseline else [seed for seed in values if seed in base]
    differences = {seed: _difference(values[seed], base[seed]) for seed in shared}
    mean, std = spread_of(list(values.values()))
    diverged = diverged_seeds(comparison, variant)
    num_better = None
    if meaning.better != "none" and not is_baseline:
        sign = -1.0 if meaning.better == "lower" else 1.0
        num_better = sum(sign * difference > 0.0 for difference in differences.values())
    return SummaryRow(
        metric=metric,
        quantity=meaning,
        headline=headline,
        variant=variant,
        is_baseline=is_baseline,
        num_seeds=len(comparison.seeds),
        num_runs=sum(name == variant for name, _ in runs),
        values=values,
        mean=mean,
        std=std,
        differences=differences,
        paired=None,
        num_better=num_better,
        diverged=tuple(diverged),
        is_claimable=not (diverged or diverged_seeds(comparison, comparison.baseline)),
    )


def _target_groups(comparison: Comparison) -> list[list[SummaryRow]]:
    """The rows of the steps to target; none where runs were not evaluated while they trained."""
    found = steps_to_target(comparison)
    return [[_target_row(comparison, v, steps) for v, steps in found.items()]] if found else []


def _target_row(comparison: Comparison, variant: str, steps: StepsToTarget) -> SummaryRow:
    is_baseline = variant == comparison.baseline
    meaning = comparison.quantity(STEPS_TO_TARGET)
    diverged = diverged_seeds(comparison, variant)
    return SummaryRow(
        metric=STEPS_TO_TARGET,
        quantity=meaning,
        headline=meaning.headline,
        variant=variant,
        is_baseline=is_baseline,
        num_seeds=len(comparison.seeds),
        num_runs=sum(run.variant == variant for run in comparison.results),
        values=steps.ratios,
        mean=None if steps.is_bound else steps.mean,
        std=None,
        differences={} if is_baseline else {s: ratio - 1.0 for s, ratio in steps.ratios.items()},
        paired=steps.paired,
        num_better=None if is_baseline else steps.num_sooner,
        target=steps,
        diverged=tuple(diverged),
        is_claimable=not (diverged or diverged_seeds(comparison, comparison.baseline)),
    )


def _by_seed(
    comparison: Comparison, runs: RunMetrics, metric: str, variant: str
) -> dict[int, float]:
    """The variant's numbers of a metric, of the seeds that have one."""
    values = {seed: runs.get((variant, seed), {}).get(metric) for seed in comparison.seeds}
    return {seed: value for seed, value in values.items() if value is not None}


def _difference(value: float, base: float) -> float:
    return without_rounding(value - base, max(abs(value), abs(base)))


def spread_of(values: list[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation, as `SummaryRow` has them."""
    if not values:
        return None, None
    if not all(math.isfinite(value) for value in values):
        return math.nan, None
    mean, std = mean_and_std(values)
    scale = max(abs(value) for value in values)
    return mean, None if std is None else without_rounding(std, scale)


def _size(values: list[float]) -> float:
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


def _with_statistics(group: list[SummaryRow]) -> list[SummaryRow]:
    """The rows of one metric with their paired statistics, corrected over its variants."""
    base = next((list(row.values.values()) for row in group if row.is_baseline), [])
    # each variant's own: rounding of one that diverged must not hide differences of the others
    scales = {row.variant: _size([*row.values.values(), *base]) for row in group}
    differences = {row.variant: list(row.differences.values()) for row in group}
    paired = paired_statistics(differences, scales)
    return [dataclasses.replace(row, paired=paired.get(row.variant)) for row in group]


def _cost_groups(comparison: Comparison) -> dict[str, list[SummaryRow]]:
    """Rows of the measured cost of a step of each variant, by metric."""
    if comparison.cost is None:
        return {}
    costs = comparison.cost.variants
    measured: dict[str, dict[str, tuple[float, Ratio]]] = {
        "cost/step": {v: (cost.seconds, cost.slower) for v, cost in costs.items()}
    }
    base = costs.get(comparison.baseline)  # a file from elsewhere may lack it
    if base is not None:
        measured["cost/gflop"] = {
            v: (_quotient(cost.flops, 10**9), Ratio(_quotient(cost.flops, base.flops)))
            for v, cost in costs.items()
        }
    if base is not None and base.memory_mib is not None:
        measured["cost/memory_mib"] = {
            v: (cost.memory_mib, Ratio(_quotient(cost.memory_mib, base.memory_mib)))
            for v, cost in costs.items()
            if cost.memory_mib is not None
        }
    return {
        metric: [_cost_row(comparison, metric, v, values.get(v)) for v in comparison.variants]
        for metric, values in measured.items()
    }


def _quotient(value: float, base: float) -> float:
    """NaN where there is none: by zero, or of whole numbers that no float holds."""
    try:
        return value / base
    except (ZeroDivisionError, OverflowError):
        return math.nan


def _cost_row(
    comparison: Comparison, metric: str, variant: str, measured: tuple[float, Ratio] | None
) -> SummaryRow:
    mean, ratio = (None, None) if measured is None else measured
    return SummaryRow(
        metric=metric,
        quantity=comparison.quantity(metric),
        headline=comparison.quantity(metric).headline,
        variant=variant,
        is_baseline=variant == comparison.baseline,
        num_seeds=len(comparison.seeds),
        num_runs=sum(run.variant == variant for run in comparison.results),
        values={},
        mean=mean,
        std=None,
        differences={},
        paired=None,
        num_better=None,
        ratio=ratio,
    )


def _cost_footnotes(comparison: Comparison, rows: list[SummaryRow]) -> list[str]:
    """How the cost of a step was measured, or that step times depend on the order of the runs."""
    cost = comparison.cost
    if cost is None:
        if any(row.metric == "time/step" and row.headline and row.values for row in rows):
            return [
                "Step times are of runs made one after another: they depend on their order and on "
                "what else the machine did. `cost: {rounds: 10}` measures them interleaved."
            ]
        return []
    text = (
        f"Cost of a step: variant and baseline took turns in one process, {cost.rounds} rounds on "
        f"{cost.device}, with every objective on. Change of step time: median of the ratios of a "
        "round; brackets: interval of that median from order statistics, at least 95% for each "
        "variant by itself, and on both sides wider by the "
        f"{100.0 * cost.beyond:.2g}% by which two copies of the baseline differed: a change is "
        "claimed where it excludes 0. Seconds: the baseline's median times that ratio. FLOPs: "
        "matrix products, convolutions and attention, teachers included."
    )
    if cost.unknown:
        text += f" Not in the FLOPs, for want of a formula: {', '.join(cost.unknown)}."
    return [text]
