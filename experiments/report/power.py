"""How many seeds a comparison needs to find a difference, from what it has measured so far.

A true difference of that size is then found with 80% power by a paired t-test at the level that
one of all variants must pass (5% / variants): `statistics.detectable_difference` the other way
round. From ten seeds a report tests by sign flips and a bootstrap, which need about as many.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy import stats

from alignlab.config.data import unknown_name
from alignlab.errors import UserError
from alignlab.experiments.report.escaping import one_visible_line
from alignlab.experiments.report.formatting import DASH, format_number
from alignlab.experiments.report.metric_table import STEPS_TO_TARGET
from alignlab.experiments.report.statistics import (
    ALPHA,
    MOST_PAIRS,
    POWER,
    Paired,
    detectable_difference,
    pairs_needed,
)
from alignlab.experiments.report.summary import SummaryRow


@dataclass(frozen=True)
class SeedsNeeded:
    """How many seeds one variant needs, in all.

    Args:
        variant: its name.
        seeds: those that variant and baseline share so far.
        std: of their differences; of steps to target, of the natural logarithms of the ratios.
        detectable: the smallest difference that so many find; None where `std` is not known.
        needed: how many find the difference; None where that is not known, or more than
            `MOST_PAIRS`.
        low, high: the same at the ends of the 95% interval of the true standard deviation, for
            normal differences; None likewise.
        unknown: why nothing can be told; empty if it can.
    """

    variant: str
    seeds: int
    std: float | None = None
    detectable: float | None = None
    needed: int | None = None
    low: int | None = None
    high: int | None = None
    unknown: str = ""

    @property
    def more(self) -> int | None:
        """How many are still to be trained; None where `needed` is."""
        return None if self.needed is None else max(self.needed - self.seeds, 0)


def seeds_needed(rows: Sequence[SummaryRow], metric: str, difference: float) -> list[SeedsNeeded]:
    """How many seeds each variant needs, in the order of the variants.

    Args:
        rows: of the report.
        metric: as table.csv names it.
        difference: true difference to find, in the metric's unit; of `steps_to_target` the share
            of the baseline's steps that is saved.

    Raises:
        UserError: no such metric, one without differences between runs, or no such difference.
    """
    own = [row for row in rows if row.metric == metric]
    others = [row for row in own if not row.is_baseline]
    known = list(dict.fromkeys(row.metric for row in rows if row.ratio is None))
    if not own or any(row.ratio is not None for row in own):
        raise UserError(f"--metric: {unknown_name('metric', metric, known)}")
    if not (math.isfinite(difference) and difference > 0.0):
        raise UserError(f"--power: expected a difference above 0, got {difference:g}")
    if metric == STEPS_TO_TARGET:
        if difference >= 1.0:
            raise UserError(
                f"--power: of {metric} expected the share of steps that is saved, between 0 and 1, "
                f"got {difference:g}"
            )
        difference = -math.log1p(-difference)
    num_tests = _num_tests(own)
    return [_needed(row, difference, num_tests) for row in others]


def print_seeds_needed(
    rows: Sequence[SummaryRow],
    metric: str,
    difference: float,
    found: Sequence[SeedsNeeded],
    console: Console,
) -> None:
    """Prints a table of what every variant needs, and what it rests on.

    Args:
        rows, metric, difference: as `seeds_needed` was given them.
        found: what it gave.
        console: the terminal.
    """
    num_tests = _num_tests([row for row in rows if row.metric == metric])
    unit = " of the baseline's steps" if metric == STEPS_TO_TARGET else ""
    level = f"{ALPHA:.0%}" + (f" / {num_tests} variants" if num_tests > 1 else "")
    console.print(
        Text(
            f"Seeds that find a true difference of {format_number(difference)}{unit} in "
            f"{one_visible_line(metric)} with {POWER:.0%} power, at the report's level ({level}):"
        )
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for header in ("variant", "seeds", "std of differences", "finds now"):
        table.add_column(header, justify="left" if header == "variant" else "right")
    for header in ("needed", "95% interval", "still to train"):
        table.add_column(header, justify="right")
    for one in found:
        spread = [DASH if v is None else format_number(v) for v in (one.std, one.detectable)]
        counts = [DASH] * 3
        if one.unknown:
            counts = [one.unknown, "", ""]
        else:
            ends = f"{_count(one.low)} to {_count(one.high)}"
            more = DASH if one.more is None else f"{one.more:,}"
            counts = [_count(one.needed), ends, more]
        cells = [one.variant, str(one.seeds), *spread, *counts]
        table.add_row(*(Text(one_visible_line(cell)) for cell in cells))
    console.print(table)
    note = (
        "The interval says how little so few differences tell of their own spread. A comparison "
        "that gets seeds until something is claimed claims too much: decide on their number first."
    )
    if metric == STEPS_TO_TARGET:
        note += " Spread and what is found now are of natural logarithms of the ratios."
    console.print(Text(note, "dim"))


def _num_tests(own: Sequence[SummaryRow]) -> int:
    """How many variants of a metric are tested, once each has enough seeds."""
    return max(1, sum(row.paired is not None for row in own if not row.is_baseline))


def _needed(row: SummaryRow, difference: float, num_tests: int) -> SeedsNeeded:
    paired = row.paired
    unknown = _why_unknown(row, paired)
    if unknown or paired is None or paired.std is None:
        return SeedsNeeded(row.variant, len(row.differences), unknown=unknown)
    degrees = paired.num_pairs - 1
    ends = (stats.chi2.isf(tail, degrees) for tail in (ALPHA / 2, 1 - ALPHA / 2))
    low, high = (paired.std * math.sqrt(degrees / float(end)) for end in ends)
    return SeedsNeeded(
        row.variant,
        paired.num_pairs,
        paired.std,
        detectable=detectable_difference(paired.std, paired.num_pairs, num_tests),
        needed=pairs_needed(paired.std, difference, num_tests),
        low=pairs_needed(low, difference, num_tests),
        high=pairs_needed(high, difference, num_tests),
    )


def _why_unknown(row: SummaryRow, paired: Paired | None) -> str:
    if row.diverged:
        return "diverged"
    if not row.is_claimable:
        return "the baseline diverged"
    if paired is None or paired.std is None:
        return "no spread is known"
    return "the same difference with every seed" if paired.std == 0.0 else ""


def _count(value: int | None) -> str:
    return f"more than {MOST_PAIRS:,}" if value is None else f"{value:,}"
