"""A forest plot of a comparison: what each variant changes, and what could not have been seen."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from alignlab.config.data import unknown_name
from alignlab.errors import UserError
from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.report.charts import Style, in_percent, styles
from alignlab.experiments.report.escaping import one_visible_line
from alignlab.experiments.report.metric_table import ARROWS
from alignlab.experiments.report.summary import SummaryRow, by_metric

_COLUMNS = 3  # as wide as a page
_HEIGHT, _WIDTH = 0.34, 4.2  # inches, of a variant and of a plot
_BAND = 0.36  # half the height of what could not have been seen
_SHADE, _ZERO = "#e3e6eb", "#7b828f"


def plot_forest(
    comparison: Comparison,
    rows: Sequence[SummaryRow],
    ax: Axes | Sequence[Axes] | None = None,
    metrics: Sequence[str] | None = None,
) -> list[Axes]:
    """See `ComparisonData.plot_forest`."""
    groups = {
        group[0].metric: [row for row in group if not row.is_baseline]
        for group in by_metric(rows)
        if any(row.paired is not None for row in group)
    }
    if metrics is None:
        shown = [m for m, group in groups.items() if group[0].headline and not _is_cost(group)]
    else:
        shown = list(metrics)
    for metric in shown:
        if metric not in groups:
            raise UserError(f"plot_forest: {unknown_name('metric', metric, groups)}")
    if not shown:
        raise UserError("plot_forest: no metric has differences to the baseline")
    axes = _axes(ax, len(shown), len(comparison.variants) - 1)
    by_variant = styles(comparison)
    for one, metric in zip(axes, shown, strict=True):
        _draw(one, groups[metric], by_variant, comparison.baseline)
    return axes


def _axes(ax: Axes | Sequence[Axes] | None, num_plots: int, num_variants: int) -> list[Axes]:
    if ax is None:
        from matplotlib import pyplot as plt  # it chooses a backend

        columns = min(num_plots, _COLUMNS)
        rows = math.ceil(num_plots / columns)
        size = (_WIDTH * columns, (1.2 + _HEIGHT * num_variants) * rows)
        _, made = plt.subplots(rows, columns, squeeze=False, figsize=size, layout="constrained")
        places = list(made.flat)
        for place in places[num_plots:]:
            place.remove()
        return places[:num_plots]
    axes = [ax] if isinstance(ax, Axes) else list(ax)
    if len(axes) != num_plots:
        raise UserError(
            f"plot_forest: {len(axes)} axes for {num_plots} metrics: give one for each, and name "
            "the metrics"
        )
    return axes


def _draw(ax: Axes, group: list[SummaryRow], by_variant: dict[str, Style], baseline: str) -> None:
    ax.axvline(0.0, color=_ZERO, linewidth=1.0, zorder=1)
    for place, given in enumerate(group):
        row = given if given.target is None else in_percent(given)
        paired = row.paired
        if paired is None:
            continue
        if paired.detectable is not None:
            sides = [-paired.detectable, paired.detectable]
            ax.fill_between(
                sides, place - _BAND, place + _BAND, color=_SHADE, linewidth=0.0, zorder=0
            )
        if given.target is not None and given.target.is_bound:
            continue  # its mean is no more than a bound
        colour = by_variant[row.variant].colour
        if paired.low is not None and paired.high is not None:
            ax.plot([paired.low, paired.high], [place, place], color=colour, zorder=2)
        face = colour if given.change else "white"
        ax.plot([paired.mean], [place], "o", color=colour, markerfacecolor=face, zorder=3)
    ax.set_yticks(range(len(group)), [_text(row.variant) for row in group])
    ax.set_ylim(len(group) - 0.5, -0.5)
    unit = ", in %" if group[0].target is not None else ""
    quantity = group[0].quantity
    ax.set_title(_text(f"{quantity.label} {ARROWS[quantity.better]}".rstrip()))
    ax.set_xlabel(_text(f"difference to {baseline}{unit}"))
    labels: list[Any] = [*ax.get_yticklabels(), ax.title, ax.xaxis.label]
    for label in labels:
        label.set_parse_math(False)  # a dollar sign is one
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _is_cost(group: Sequence[SummaryRow]) -> bool:
    return group[0].quantity.cost


def _text(text: str) -> str:
    return one_visible_line(text)
