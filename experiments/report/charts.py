"""Line charts of a comparison: curves of the training, metrics by step, timestep and block.

Lines are means over seeds, and bands run from the lowest to the highest seed.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

from alignlab.experiments.charts.chart import Chart
from alignlab.experiments.charts.lines import Line, is_drawn, line_figure
from alignlab.experiments.charts.look import Style, styles
from alignlab.experiments.compare.result import Comparison, Curve
from alignlab.experiments.report.by_step import curves_of, shown_by_step
from alignlab.experiments.report.metric_table import block_of, split_name
from alignlab.experiments.report.statistics import mean_and_std
from alignlab.experiments.report.steps_to_target import TARGET, target_of
from alignlab.experiments.report.summary import SummaryRow

BETTER_WORDS = {"lower": "lower is better", "higher": "higher is better", "none": ""}
_MAX_POINTS = 100
_NUM_BINS = 10

# Place on the horizontal axis -> one number per seed.
Series = dict[float, list[float]]


def variant_styles(comparison: Comparison) -> dict[str, Style]:
    """A style for every variant, in order of the recipe."""
    return styles(comparison.variants, comparison.baseline)


def variant_numbers(comparison: Comparison) -> dict[str, int]:
    """The number of each variant's style, as the page's legend and readouts have it."""
    return {variant: place for place, variant in enumerate(comparison.variants)}


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
        charts.extend(_curve_chart(comparison, name, curves))
        if name == "loss/flow":
            paired = _minus_baseline(comparison, curves)
            charts.extend(_curve_chart(comparison, f"{name}, minus baseline", paired, zero=True))
    return charts


def step_charts(comparison: Comparison) -> list[Chart]:
    """What runs measured while they trained; the validation loss also minus the baseline's."""
    charts = []
    for name, curves in shown_by_step(comparison).items():
        meaning = comparison.quantity(name)
        words = BETTER_WORDS[meaning.better]
        if name == TARGET:
            words += "; dotted: the baseline's last, the target"
            target = _target(comparison)
            charts += _curve_chart(
                comparison, meaning.heading, curves, words, markers=True, target=target
            )
            paired = _minus_baseline(comparison, curves)
            title = f"{meaning.label}, minus baseline"
            words = "below zero is better"
            charts += _curve_chart(comparison, title, paired, words, zero=True, markers=True)
        else:
            charts += _curve_chart(comparison, meaning.heading, curves, words, markers=True)
    return charts


def level_charts(comparison: Comparison) -> list[Chart]:
    """The validation loss by step in each bin of the timestep, of runs that were evaluated."""
    charts = []
    for index in range(_NUM_BINS):
        name = f"{TARGET}/t{index}"
        charts += _curve_chart(
            comparison,
            comparison.quantity(name).label,
            curves_of(comparison, name),
            markers=True,
        )
    return charts


def _target(comparison: Comparison) -> float | None:
    """Mean over seeds of the baseline's last validation loss."""
    targets = [target_of(comparison, seed) for seed in comparison.seeds]
    known = [value for value in targets if value is not None and is_drawn(value)]
    return mean_and_std(known)[0] if known else None


def timestep_charts(comparison: Comparison, rows: list[SummaryRow]) -> list[Chart]:
    """Validation flow loss in ten bins of the timestep, absolute and minus the baseline."""
    places = {f"{TARGET}/t{index}": (index + 0.5) / _NUM_BINS for index in range(_NUM_BINS)}
    values, differences = _by_place(rows, places)
    name = "timestep t (1 is pure noise)"
    if comparison.expert is not None:
        name = f"share of the {comparison.expert}-noise expert's t (1 is its noisiest)"
    title, paired = "validation flow loss by timestep", "the same, minus baseline"
    charts = _chart(comparison, title, "", values, name, markers=True)
    words = "below zero is better"
    return charts + _chart(comparison, paired, words, differences, name, markers=True, zero=True)


def block_charts(comparison: Comparison, rows: list[SummaryRow]) -> list[Chart]:
    """Every metric that is measured per block, against the block index."""
    places: dict[str, dict[str, float]] = {}
    for row in rows:
        block = block_of(row.metric)
        if block is not None:
            places.setdefault(split_name(row.metric)[0], {})[row.metric] = float(block)
    charts = []
    for base, names in places.items():
        meaning, (values, _) = comparison.quantity(base), _by_place(rows, names)
        words, axis = BETTER_WORDS[meaning.better], "block (its output)"
        charts += _chart(comparison, meaning.heading, words, values, axis, markers=True)
    return charts


def _by_place(
    rows: list[SummaryRow], places: Mapping[str, float]
) -> tuple[dict[str, Series], dict[str, Series]]:
    """Numbers and differences to the baseline, by variant, of metrics that have a place."""
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
    comparison: Comparison, curves: Mapping[tuple[str, int], Curve]
) -> dict[tuple[str, int], Curve]:
    differences = {}
    for (variant, seed), curve in curves.items():
        base = dict(curves.get((comparison.baseline, seed), ()))
        if variant != comparison.baseline and base:
            differences[variant, seed] = tuple(
                (step, value - base[step]) for step, value in curve if step in base
            )
    return differences


def _curve_chart(
    comparison: Comparison,
    title: str,
    curves: Mapping[tuple[str, int], Curve],
    caption: str = "",
    *,
    zero: bool = False,
    markers: bool = False,
    target: float | None = None,
) -> list[Chart]:
    """The chart of `curves` by variant and seed; no chart when they hold no finite number.

    Without `markers` many steps are drawn as means of neighbours. `target` is a dotted line across.
    """
    steps = sorted({step for curve in curves.values() for step, _ in curve})
    size = 1 if markers else max(1, math.ceil(len(steps) / _MAX_POINTS))
    places = {
        step: statistics.fmean(steps[start : start + size])
        for start in range(0, len(steps), size)
        for step in steps[start : start + size]
    }
    series: dict[str, Series] = {}
    for (variant, _), curve in curves.items():
        binned: Series = {}
        for step, value in curve:
            if is_drawn(value):
                binned.setdefault(places[step], []).append(value)
        for place, values in binned.items():
            series.setdefault(variant, {}).setdefault(place, []).append(mean_and_std(values)[0])
    captions = [caption] if caption else []
    captions += [f"means of {size} logged steps"] if size > 1 else []
    words = ", ".join(captions)
    return _chart(
        comparison, title, words, series, "step", markers=markers, zero=zero, target=target
    )


def _chart(
    comparison: Comparison,
    title: str,
    caption: str,
    series: Mapping[str, Series],
    axis_title: str,
    *,
    markers: bool,
    zero: bool = False,
    target: float | None = None,
) -> list[Chart]:
    """One line per variant with a band over seeds; no chart without a number that can be drawn."""
    lines = []
    for variant, style in variant_styles(comparison).items():
        line = _line(style, series.get(variant, {}))
        lines += [line] if line is not None else []
    if not lines:
        return []
    figure, readouts = line_figure(
        lines, variant_numbers(comparison), axis_title, markers=markers, zero=zero, target=target
    )
    return [Chart(title, caption, figure, readouts)]


def _line(style: Style, series: Series) -> Line | None:
    points = [
        (place, finite)
        for place, values in sorted(series.items())
        if (finite := [value for value in values if is_drawn(value)])
    ]
    if not points:
        return None
    x: Sequence[float] = [place for place, _ in points]
    means = [mean_and_std(values)[0] for _, values in points]
    lows, highs = ([end(values) for _, values in points] for end in (min, max))
    return Line(style, x, means, lows, highs)
