"""Quality against cost: what a variant gains in a metric, and how much longer its steps take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from alignlab.experiments.charts.chart import HEIGHT, Chart, Readout, group_name, look, new_figure
from alignlab.experiments.charts.lines import is_drawn, short_names
from alignlab.experiments.charts.look import BASELINE_COLOUR, PAPER, RULE
from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.report.charts import variant_numbers, variant_styles
from alignlab.experiments.report.forest import forest_groups, in_percent
from alignlab.experiments.report.metric_table import ARROWS
from alignlab.experiments.report.summary import SummaryRow, by_metric

Ends = tuple[float | None, float | None]

MARK = 9.0
"""Width of a mark in pixels, with its edge."""
NAME_PLACES: tuple[tuple[tuple[int, int], Literal["left", "right"]], ...] = (
    ((6, 5), "left"), ((6, -12), "left"), ((-6, 5), "right"), ((-6, -12), "right"),
)  # fmt: skip
"""Where a name may stand, in points from its mark, and which of its ends is there."""


@dataclass(frozen=True)
class Point:
    """A variant by cost and gain, both against the baseline.

    Args:
        variant: its name.
        cost, cost_ends: change of the step time in percent, and its interval.
        gain, gain_ends: mean difference in the metric, and its interval.
        is_claimed: whether the report claims the difference in the metric.
    """

    variant: str
    cost: float
    cost_ends: Ends
    gain: float
    gain_ends: Ends
    is_claimed: bool


def cost_charts(comparison: Comparison, rows: Sequence[SummaryRow]) -> list[Chart]:
    """A chart for each metric of the forest plot with a better side; none without step times."""
    costs = _step_costs(rows)
    charts = []
    for group in forest_groups(rows):
        points = [one for row in group if (one := _point(row, costs)) is not None]
        if points and group[0].quantity.better != "none":
            charts.append(_chart(comparison, group[0], points))
    return charts


def pareto_front(
    points: Sequence[tuple[float, float]], *, higher: bool
) -> list[tuple[float, float]]:
    """The (cost, gain) than which no other is better in one and as good in the other, by cost.

    >>> pareto_front([(0, 0), (5, 2), (3, -1), (9, 2)], higher=True)
    [(0, 0), (5, 2)]
    """
    front: list[tuple[float, float]] = []
    sign = 1.0 if higher else -1.0
    for cost, gain in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * gain > sign * front[-1][1]:
            front.append((cost, gain))
    return front


def _step_costs(rows: Sequence[SummaryRow]) -> dict[str, tuple[float, Ends]]:
    """Change of the step time in percent and its interval, by variant.

    Of the interleaved steps where they were measured, else of the runs' own, in percent of the
    baseline's mean.
    """
    for group in by_metric(rows):
        if not (group[0].headline and group[0].quantity.slower):
            continue
        base = next((row.mean for row in group if row.is_baseline), None)
        found: dict[str, tuple[float, Ends]] = {}
        for row in group:
            if row.is_baseline:
                continue
            if row.ratio is not None and is_drawn(row.ratio.value):
                low, high = row.ratio.interval
                ends: Ends = (100.0 * (low - 1.0), 100.0 * (high - 1.0))
                found[row.variant] = (100.0 * (row.ratio.value - 1.0), ends)
            elif row.paired is not None and base:
                paired, share = row.paired, 100.0 / base
                ends = (None, None)
                if paired.low is not None and paired.high is not None:
                    ends = (share * paired.low, share * paired.high)
                found[row.variant] = (share * paired.mean, ends)
        return found
    return {}


def _point(given: SummaryRow, costs: dict[str, tuple[float, Ends]]) -> Point | None:
    row = given if given.target is None else in_percent(given)
    is_bound = given.target is not None and given.target.is_bound
    if row.paired is None or is_bound or not row.is_claimable or row.variant not in costs:
        return None
    cost, (low, high) = costs[row.variant]
    if not (is_drawn(cost) and is_drawn(row.paired.mean)):
        return None
    ends = (row.paired.low, row.paired.high)
    return Point(row.variant, cost, (low, high), row.paired.mean, ends, bool(given.change))


def _chart(comparison: Comparison, first: SummaryRow, points: Sequence[Point]) -> Chart:
    by_variant = variant_styles(comparison)
    numbers = variant_numbers(comparison)
    higher = first.quantity.better == "higher"
    with look():
        figure = new_figure(height=HEIGHT)
        axes = figure.subplots()
        axes.axhline(0.0, color=BASELINE_COLOUR, linewidth=1.0, zorder=1)
        front = pareto_front([(0.0, 0.0), *((p.cost, p.gain) for p in points)], higher=higher)
        axes.step(*zip(*front, strict=True), where="post", color=RULE, linewidth=1.0, zorder=1)
        base = by_variant[comparison.baseline]
        axes.plot([0.0], [0.0], "o", color=base.colour, markerfacecolor=PAPER, markersize=8.0)
        readouts = [Readout(axes, 0.0, 0.0, "", ((numbers[base.name], "the baseline"),))]
        for point in sorted(points, key=lambda one: one.cost):
            style, gid = by_variant[point.variant], group_name(numbers[point.variant])
            for ends, across in ((point.cost_ends, True), (point.gain_ends, False)):
                low, high = ends
                if low is not None and high is not None and is_drawn(low) and is_drawn(high):
                    flat = [point.gain] * 2 if across else [point.cost] * 2
                    x, y = ([low, high], flat) if across else (flat, [low, high])
                    axes.plot(x, y, color=style.colour, linewidth=1.2)[0].set_gid(gid)
            face = style.colour if point.is_claimed else PAPER
            axes.plot(
                [point.cost], [point.gain], style.marker, color=style.colour, markersize=7.5,
                markerfacecolor=face, markeredgewidth=1.4, zorder=4,
            )[0].set_gid(gid)  # fmt: skip
            text = f"{point.gain:+.3g} at {point.cost:+.1f}% step time"
            readouts.append(
                Readout(axes, point.cost, point.gain, "", ((numbers[point.variant], text),))
            )
        axes.set_xlabel("step time against the baseline, %")
        axes.margins(x=0.16, y=0.12)
        if not higher:
            axes.invert_yaxis()  # better is up in each of them
        _name_points(axes, points, numbers)
    unit = ", in %" if first.target is not None else ""
    title = f"{first.quantity.heading} {ARROWS[first.quantity.better]}".rstrip()
    return Chart(
        title, f"difference to {comparison.baseline}{unit}; better is up", figure, tuple(readouts)
    )


def _name_points(axes: Axes, points: Sequence[Point], numbers: Mapping[str, int]) -> None:
    """Writes the variants' names beside their marks, those of claimed changes first.

    A name for which no side is free of other names and marks is left out: the mark and the legend
    say it, and so does the readout.
    """
    names = short_names([point.variant for point in points])
    axes.autoscale_view()  # or the marks are not yet where they will be drawn
    places = [(0.0, 0.0), *((point.cost, point.gain) for point in points)]  # the baseline first
    marks = axes.transData.transform(places)
    taken = [Bbox.from_bounds(x - MARK / 2, y - MARK / 2, MARK, MARK) for x, y in marks]
    named = zip(points, names, strict=True)
    for point, name in sorted(named, key=lambda one: (not one[0].is_claimed, one[0].cost)):
        for offset, side in NAME_PLACES:
            text = axes.annotate(
                name, (point.cost, point.gain), offset,
                textcoords="offset points", fontsize=9.0, ha=side,
            )  # fmt: skip
            box = text.get_window_extent()
            if axes.bbox.fully_containsx(box.x0) and not box.count_overlaps(taken):
                text.set_gid(group_name(numbers[point.variant]))
                taken.append(box)
                break
            text.remove()
