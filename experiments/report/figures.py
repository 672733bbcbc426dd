"""Charts of a report as plotly.js figures: plain data, drawn by the script inside the report.

Lines are means over seeds, bands run from the lowest to the highest seed.
"""

import math
import statistics
from dataclasses import dataclass

from pydantic import JsonValue

from alignlab.experiments.compare.result import Comparison, Curve
from alignlab.experiments.report.metric_table import block_of, quantity, split_name
from alignlab.experiments.report.plot import Series, dots, lines
from alignlab.experiments.report.summary import SummaryRow, by_metric

_MAX_POINTS = 100
_NUM_BINS = 10


@dataclass(frozen=True)
class Chart:
    """One chart: its title, what to read it by, and the plotly.js figure."""

    title: str
    caption: str
    figure: JsonValue


def seed_charts(comparison: Comparison, rows: list[SummaryRow]) -> list[Chart]:
    """Paired difference to the baseline, one dot per seed, one chart per headline metric."""
    charts = []
    for group in by_metric(rows):
        shown = [row for row in group if not row.is_baseline and row.differences]
        if not (shown and group[0].headline and not group[0].quantity.cost):
            continue
        known = group[0].quantity
        side = {
            "lower": "\N{LEFTWARDS ARROW}\N{NO-BREAK SPACE}better",
            "higher": "better\N{NO-BREAK SPACE}\N{RIGHTWARDS ARROW}",
        }
        charts.append(Chart(known.label, side.get(known.better, ""), dots(comparison, shown)))
    return charts


def curve_charts(comparison: Comparison) -> list[Chart]:
    """Training curves, flow loss first, followed by its difference to the baseline."""
    names = {name for run in comparison.results for name in run.curves}
    charts = []
    for name in sorted(names, key=_curve_place):
        curves = {
            (run.variant, run.seed): run.curves[name]
            for run in comparison.results
            if run.curves.get(name)
        }
        charts.extend(_curve_chart(comparison, name, curves, zero=False))
        if name == "loss/flow":
            paired = _minus_baseline(comparison, curves)
            charts.extend(_curve_chart(comparison, f"{name}, minus baseline", paired, zero=True))
    return charts


def timestep_charts(comparison: Comparison, rows: list[SummaryRow]) -> list[Chart]:
    """Validation flow loss in ten bins of the timestep, absolute and minus the baseline."""
    bins = [(index, f"val/flow/t{index}") for index in range(_NUM_BINS)]
    values, differences = _by_place(rows, {name: (index + 0.5) / 10 for index, name in bins})
    axis = "timestep t (1 is pure noise)"
    charts = []
    if values:
        charts.append(
            Chart(
                "validation flow loss by timestep",
                "",
                lines(comparison, values, axis, markers=True),
            )
        )
    if any(differences.values()):
        charts.append(
            Chart(
                "the same, minus baseline",
                "below zero is better",
                lines(comparison, differences, axis, markers=True, zero=True),
            )
        )
    return charts


def block_charts(comparison: Comparison, rows: list[SummaryRow]) -> list[Chart]:
    """Every metric that is measured per block, against the block index."""
    places: dict[str, dict[str, float]] = {}
    for row in rows:
        block = block_of(row.metric)
        if block is not None:
            places.setdefault(split_name(row.metric)[0], {})[row.metric] = float(block)
    side = {"lower": "lower is better", "higher": "higher is better"}
    charts = []
    for base, names in places.items():
        known, (values, _) = quantity(base), _by_place(rows, names)
        figure = lines(comparison, values, "block (its output)", markers=True)
        charts.append(Chart(known.label, side.get(known.better, ""), figure))
    return charts


def _by_place(
    rows: list[SummaryRow], places: dict[str, float]
) -> tuple[dict[str, Series], dict[str, Series]]:
    values: dict[str, Series] = {}
    differences: dict[str, Series] = {}
    for row in rows:
        if row.metric in places:
            place = places[row.metric]
            values.setdefault(row.variant, {})[place] = list(row.values.values())
            if row.differences:
                differences.setdefault(row.variant, {})[place] = list(row.differences.values())
    return values, differences


def _curve_place(name: str) -> tuple[int, str]:
    # Named groups in this order, each by name; whatever else a run logged comes last.
    groups = ("loss/flow", "loss/total", "loss/", "sim/", "grad/")
    ranks = [rank for rank, group in enumerate(groups) if name.startswith(group)]
    return (ranks[0] if ranks else len(groups), name)


def _minus_baseline(
    comparison: Comparison, curves: dict[tuple[str, int], Curve]
) -> dict[tuple[str, int], Curve]:
    found = {}
    for (variant, seed), curve in curves.items():
        base = dict(curves.get((comparison.baseline, seed), ()))
        if variant != comparison.baseline and base:
            found[variant, seed] = tuple(
                (step, value - base[step]) for step, value in curve if step in base
            )
    return found


def _curve_chart(
    comparison: Comparison, title: str, curves: dict[tuple[str, int], Curve], *, zero: bool
) -> list[Chart]:
    """The chart of `curves` by variant and seed; no chart when they hold no finite number."""
    steps = sorted({step for curve in curves.values() for step, _ in curve})
    size = max(1, math.ceil(len(steps) / _MAX_POINTS))
    places = {
        step: statistics.fmean(steps[start : start + size])
        for start in range(0, len(steps), size)
        for step in steps[start : start + size]
    }
    series: dict[str, Series] = {}
    for (variant, _), curve in curves.items():
        binned: Series = {}
        for step, value in curve:
            if math.isfinite(value):
                binned.setdefault(places[step], []).append(value)
        for place, values in binned.items():
            series.setdefault(variant, {}).setdefault(place, []).append(statistics.fmean(values))
    if not series:
        return []
    caption = f"means of {size} logged steps" if size > 1 else ""
    figure = lines(comparison, series, "step", markers=False, zero=zero)
    return [Chart(title, caption, figure)]
