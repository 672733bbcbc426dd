"""Forest plots: what each variant changes against the baseline, and what could not have been seen.

A panel per metric, a line per variant: mean paired difference and its interval, a faint dot for
each seed. The mark is filled where a change is claimed and hollow where none is.
"""

import dataclasses
import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from alignlab.experiments.charts.chart import WIDTH, Chart, Readout, group_name, look, new_figure
from alignlab.experiments.charts.lines import is_drawn, short_names
from alignlab.experiments.charts.look import BASELINE_COLOUR, INK, PAPER, SHADE, SOFT, Style
from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.report.charts import variant_numbers, variant_styles
from alignlab.experiments.report.escaping import one_visible_line
from alignlab.experiments.report.matrix import kind_of
from alignlab.experiments.report.metric_table import ARROWS
from alignlab.experiments.report.summary import SummaryRow, by_metric

BAND = 0.36  # half the height of what could not have been seen
_ROW, _AROUND = 25.0, 52.0  # points, of a variant and of axis and margins
_COLUMNS = 3  # of panels in one figure, as wide as a page
_SIDES = {
    "lower": "\N{LEFTWARDS ARROW} better",
    "higher": "better \N{RIGHTWARDS ARROW}",
    "none": "",
}


def forest_groups(rows: Sequence[SummaryRow]) -> list[list[SummaryRow]]:
    """Rows without the baseline's, of each metric that a forest plot has a panel for.

    These are the metrics of the summary table that have differences, without costs. Steps to target
    that no variant reaches within its own steps are left out: they are bounds only.
    """
    groups = []
    for group in by_metric(rows):
        shown = [row for row in group if not row.is_baseline]
        first = group[0]
        if not first.headline or first.quantity.cost or not any(row.differences for row in shown):
            continue
        if first.target is not None and not any(
            row.target is not None and row.target.is_ever_reached for row in shown
        ):
            continue
        groups.append(shown)
    return groups


def forest_charts(comparison: Comparison, rows: Sequence[SummaryRow]) -> list[Chart]:
    """One chart per panel."""
    charts = []
    for group in forest_groups(rows):
        first = group[0]
        with look():
            figure = new_figure(WIDTH, _AROUND + _ROW * len(group))
            axes = figure.subplots()
            readouts = draw_panel(axes, group, comparison)
        title = f"{first.quantity.heading} {ARROWS[first.quantity.better]}".rstrip()
        charts.append(Chart(title, _caption(group), figure, readouts))
    return charts


def forest_figure(comparison: Comparison, rows: Sequence[SummaryRow]) -> Figure | None:
    """All panels in one figure, for a paper; None without any."""
    groups = forest_groups(rows)
    if not groups:
        return None
    columns = min(len(groups), _COLUMNS)
    num_rows = math.ceil(len(groups) / columns)
    with look():
        height = (_AROUND + 22.0 + _ROW * len(groups[0])) * num_rows
        figure = new_figure(WIDTH * columns, height)
        places = list(figure.subplots(num_rows, columns, squeeze=False).flat)
        for axes, group in zip(places, groups, strict=False):
            draw_panel(axes, group, comparison)
            words = f"{group[0].quantity.heading}, {_caption(group)}"
            axes.set_title(one_visible_line(words), loc="left")
        for axes in places[len(groups) :]:
            axes.remove()
    return figure


def draw_panel(
    axes: Axes, group: Sequence[SummaryRow], comparison: Comparison
) -> tuple[Readout, ...]:
    """Draws one metric into `axes`: a line for each row of the group, top to bottom."""
    by_variant = variant_styles(comparison)
    numbers = variant_numbers(comparison)
    axes.axvline(0.0, color=BASELINE_COLOUR, linewidth=1.0, zorder=1)
    readouts = []
    for place, given in enumerate(group):
        row = given if given.target is None else in_percent(given)
        gid = group_name(numbers[row.variant])
        _draw_row(axes, place, row, by_variant[row.variant], gid, is_claimed=bool(given.change))
        axes.text(
            1.02, place, given.diff_text, transform=axes.get_yaxis_transform(), va="center",
            fontsize=8.5, color=INK if given.change else SOFT,
        ).set_gid(gid)  # fmt: skip
        lines = [given.diff_text]
        if row.paired is not None and row.paired.detectable is not None:
            lines.append(f"could see {row.paired.detectable:.3g}")
        lines.append(kind_of(given))
        rows = tuple((numbers[row.variant] if not n else -1, t) for n, t in enumerate(lines))
        readouts.append(Readout(axes, None, float(place), "", rows))
    axes.set_yticks(range(len(group)), short_names([row.variant for row in group]))
    for label, row in zip(axes.get_yticklabels(), group, strict=True):
        label.set_gid(group_name(numbers[row.variant]))
    axes.set_ylim(len(group) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0.0)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.spines["left"].set_visible(False)
    return tuple(readouts)


def _draw_row(
    axes: Axes, place: int, row: SummaryRow, style: Style, gid: str, *, is_claimed: bool
) -> None:
    paired, target = row.paired, row.target
    if paired is not None and paired.detectable is not None and is_drawn(paired.detectable):
        band = axes.fill_between(
            [-paired.detectable, paired.detectable], place - BAND, place + BAND, color=SHADE,
            linewidth=0.0, zorder=0,
        )  # fmt: skip
        band.set_gid(gid)
    never = () if target is None else target.never
    for seed, value in row.differences.items():
        if is_drawn(value):
            (dot,) = axes.plot(
                [value], [place + 0.24], ">" if seed in never else ".", color=style.colour,
                markersize=5.5, alpha=0.6, markeredgewidth=0.0, zorder=2,
            )  # fmt: skip
            dot.set_gid(gid)
    if paired is None or not is_drawn(paired.mean) or (target is not None and target.is_bound):
        return  # nothing to draw, or no more than a bound
    if paired.low is not None and paired.high is not None:
        ends = [end if is_drawn(end) else paired.mean for end in (paired.low, paired.high)]
        (interval,) = axes.plot(ends, [place, place], color=style.colour, linewidth=2.0, zorder=3)
        interval.set_gid(gid)
    (mark,) = axes.plot(
        [paired.mean], [place], style.marker, color=style.colour, markersize=7.0, zorder=4,
        markerfacecolor=style.colour if is_claimed else PAPER, markeredgewidth=1.4,
    )  # fmt: skip
    mark.set_gid(gid)


def in_percent(row: SummaryRow) -> SummaryRow:
    """Steps to target as changes in percent, whose statistics are of logarithms."""
    target, paired = row.target, row.paired
    assert target is not None
    if paired is not None and target.mean is not None:
        low, high = target.interval or (None, None)
        paired = dataclasses.replace(
            paired,
            mean=100.0 * (target.mean - 1.0),
            low=None if low is None else 100.0 * (low - 1.0),
            high=None if high is None else 100.0 * (high - 1.0),
        )
    differences = {seed: 100.0 * change for seed, change in row.differences.items()}
    return dataclasses.replace(row, differences=differences, paired=paired)


def _caption(group: Sequence[SummaryRow]) -> str:
    parts = [_SIDES[group[0].quantity.better]]
    if group[0].target is not None:
        parts.append("in %")
        if any(row.target is not None and row.target.never for row in group):
            parts.append("\N{BLACK RIGHT-POINTING SMALL TRIANGLE} never reached")
    return ", ".join(part for part in parts if part)
