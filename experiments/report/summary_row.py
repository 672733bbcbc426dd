"""One metric of one variant, as every table shows it."""

import math
from dataclasses import dataclass

from alignlab.experiments.compare.result import Ratio
from alignlab.experiments.report.formatting import (
    DASH,
    format_interval,
    format_number,
    format_p,
    format_spread,
)
from alignlab.experiments.report.metric_table import Quantity
from alignlab.experiments.report.statistics import Paired, without_rounding


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
        ratio: over the baseline, of a cost that is measured once for all seeds and has no values
            per seed.
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
    ratio: Ratio | None = None

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
        if self.ratio is not None:
            return ratio_text(self.ratio, sign=True)
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
        if self.ratio is not None:
            return ("worse" if self.ratio.value > 1.0 else "better") if self.ratio.is_found else ""
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
        if self.ratio is not None:
            return ""
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
        if self.ratio is not None:
            return False
        finite = [value for value in self.values.values() if math.isfinite(value)]
        return len(finite) < max(self.num_runs, 1)


def joined(texts: tuple[str, str]) -> str:
    """Mean and spread in one text: "0.412 ± 0.004"."""
    return " ± ".join(text for text in texts if text)


def ratio_text(ratio: Ratio, *, sign: bool = False) -> str:
    """A ratio as a change in percent: "+3.1% [2.0%, 4.2%]", or "+12.34%" of an exact count."""
    change = 100.0 * (ratio.value - 1.0)
    if ratio.low is None or ratio.high is None:
        return f"{format_number(without_rounding(change, 100.0), sign=sign)}%"
    low, high = (100.0 * (end - 1.0) for end in (ratio.low, ratio.high))
    return format_interval(change, low, high, sign=sign, unit="%")
