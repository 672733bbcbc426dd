"""The forest plot of a comparison in a figure of one's own."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from alignlab.config.data import unknown_name
from alignlab.errors import UserError
from alignlab.experiments.charts.chart import look
from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.report.escaping import one_visible_line
from alignlab.experiments.report.forest import draw_panel, forest_groups
from alignlab.experiments.report.metric_table import ARROWS
from alignlab.experiments.report.summary import SummaryRow, by_metric

_COLUMNS = 3  # as wide as a page
_HEIGHT, _WIDTH = 0.34, 4.8  # inches, of a variant and of a plot


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
    shown = [group[0].metric for group in forest_groups(rows)] if metrics is None else list(metrics)
    for metric in shown:
        if metric not in groups:
            raise UserError(f"plot_forest: {unknown_name('metric', metric, groups)}")
    if not shown:
        raise UserError("plot_forest: no metric has differences to the baseline")
    with look():
        axes = _axes(ax, len(shown), len(comparison.variants) - 1)
        for one, metric in zip(axes, shown, strict=True):
            group = groups[metric]
            draw_panel(one, group, comparison)
            quantity, unit = group[0].quantity, ", in %" if group[0].target is not None else ""
            one.set_title(_text(f"{quantity.heading} {ARROWS[quantity.better]}".rstrip()))
            one.set_xlabel(_text(f"difference to {comparison.baseline}{unit}"))
            # a dollar sign is one, also where the Axes was made elsewhere
            labels: list[Any] = [*one.get_yticklabels(), one.title, one.xaxis.label]
            for label in labels:
                label.set_parse_math(False)
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


def _text(text: str) -> str:
    return one_visible_line(text)
