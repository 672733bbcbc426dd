"""Charts as plotly.js figures: plain data, drawn by the script inside a page.

The look is one for all pages (`COLOURS`, `layout`, `axis`). In the charts of a report, lines are
means over seeds and bands run from the lowest to the highest seed.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from alignlab.experiments.compare.result import Comparison, Curve
from alignlab.experiments.report.by_step import curves_of, shown_by_step
from alignlab.experiments.report.escaping import plot_text
from alignlab.experiments.report.metric_table import block_of, quantity, split_name
from alignlab.experiments.report.statistics import Paired, mean_and_std
from alignlab.experiments.report.steps_to_target import TARGET, target_of
from alignlab.experiments.report.summary import SummaryRow, by_metric

Json = dict[str, JsonValue]

# After Okabe and Ito, told apart with any kind of colour vision; the baseline is grey. Some are
# shifted so that each stands out from white and from the dark page's #14171c by 3:1 or more.
PAPERS = ("#ffffff", "#14171c")
BASELINE_COLOUR = "#7b828f"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b87d00", "#3397d1", "#8a6d00", "#8c63c4")
_DASHES = ("solid", "dash", "dot", "dashdot")
# The baseline's open circle is seen around another mark that lies on it.
_BASELINE_MARK: Json = {"symbol": "circle-open", "size": 10}
_MARKS = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "cross", "star")
_INK = "#374151"
_BETTER_SIDE = {
    "lower": "\N{LEFTWARDS ARROW}\N{NO-BREAK SPACE}better",
    "higher": "better\N{NO-BREAK SPACE}\N{RIGHTWARDS ARROW}",
    "none": "",
}
_BETTER_WORDS = {
    "lower": "lower is better",
    "higher": "higher is better",
    "none": "",
}
_FEW_POINTS = 15
_MOST_DRAWN = 1e290
_MAX_POINTS = 100
_NUM_BINS = 10

# Place on the horizontal axis -> one number per seed.
Series = dict[float, list[float]]


@dataclass(frozen=True)
class Chart:
    """One chart: its title, what to read it by, and the plotly.js figure."""

    title: str
    caption: str
    figure: JsonValue


@dataclass(frozen=True)
class Style:
    """How one variant is drawn in every chart."""

    variant: str
    colour: str
    dash: str
    mark: Json


def figures_of(sections: Mapping[str, Sequence[Chart]]) -> dict[str, JsonValue]:
    """The figures of a page's charts, by section and place: "curves-0", "curves-1"."""
    return {
        f"{section}-{index}": chart.figure
        for section, charts in sections.items()
        for index, chart in enumerate(charts)
    }


def layout(height: int, *, left: int, right: int, bottom: int) -> Json:
    """What all charts share: height, margins and font in pixels, no paper of their own."""
    return {
        "height": height,
        "margin": {"l": left, "r": right, "t": 8, "b": bottom},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": _INK},
    }


def axis(title: str, *, standoff: int) -> Json:
    """What all axes share; `standoff` is the distance of the title in pixels."""
    return {
        "title": {"text": title, "standoff": standoff},
        "gridcolor": "#eceff3",
        "linecolor": "#d1d5db",
        "zeroline": False,
        "automargin": True,
    }


def styles(comparison: Comparison) -> dict[str, Style]:
    """A colour for every variant, with other dashes once the colours are used up."""
    others = [variant for variant in comparison.variants if variant != comparison.baseline]
    by_variant = {
        variant: Style(
            variant,
            COLOURS[place % len(COLOURS)],
            _DASHES[place // len(COLOURS) % len(_DASHES)],
            {"symbol": _MARKS[place % len(_MARKS)], "size": 6},
        )
        for place, variant in enumerate(others)
    }
    by_variant[comparison.baseline] = Style(
        comparison.baseline, BASELINE_COLOUR, "solid", _BASELINE_MARK
    )
    return {variant: by_variant[variant] for variant in comparison.variants}


def seed_charts(comparison: Comparison, rows: list[SummaryRow]) -> list[Chart]:
    """Paired difference to the baseline, one dot per seed, one chart per headline metric."""
    charts = []
    for group in by_metric(rows):
        shown = [row for row in group if not row.is_baseline and row.differences]
        if not (shown and group[0].headline and not group[0].quantity.cost):
            continue
        meaning, caption = group[0].quantity, _BETTER_SIDE[group[0].quantity.better]
        if group[0].target is not None:
            if not any(row.target is not None and row.target.is_ever_reached for row in shown):
                continue  # bounds only
            shown = [in_percent(row) for row in shown]
            caption += ", in %"
            if any(row.target is not None and row.target.never for row in shown):
                caption += "; \N{BLACK RIGHT-POINTING SMALL TRIANGLE} never reached"
        figure = _dots(comparison, shown)
        charts.append(Chart(meaning.label, caption, figure))
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
        charts.extend(_curve_chart(comparison, name, curves))
        if name == "loss/flow":
            paired = _minus_baseline(comparison, curves)
            charts.extend(_curve_chart(comparison, f"{name}, minus baseline", paired, zero=True))
    return charts


def step_charts(comparison: Comparison) -> list[Chart]:
    """What runs measured while they trained; the validation loss also minus the baseline's."""
    charts = []
    for name, curves in shown_by_step(comparison).items():
        meaning = quantity(name)
        words = _BETTER_WORDS[meaning.better]
        if name == TARGET:
            words += "; dotted: the baseline's last, the target"
            target = _target(comparison)
            charts += _curve_chart(
                comparison, meaning.label, curves, words, markers=True, target=target
            )
            paired = _minus_baseline(comparison, curves)
            title = f"{meaning.label}, minus baseline"
            words = "below zero is better"
            charts += _curve_chart(comparison, title, paired, words, zero=True, markers=True)
        else:
            charts += _curve_chart(comparison, meaning.label, curves, words, markers=True)
    return charts


def level_charts(comparison: Comparison) -> list[Chart]:
    """The validation loss by step in each bin of the timestep, of runs that were evaluated."""
    charts = []
    for index in range(_NUM_BINS):
        name = f"{TARGET}/t{index}"
        charts += _curve_chart(
            comparison, quantity(name).label, curves_of(comparison, name), markers=True
        )
    return charts


def _target(comparison: Comparison) -> float | None:
    """Mean over seeds of the baseline's last validation loss."""
    targets = [target_of(comparison, seed) for seed in comparison.seeds]
    known = [value for value in targets if value is not None and _is_drawn(value)]
    return mean_and_std(known)[0] if known else None


def timestep_charts(comparison: Comparison, rows: list[SummaryRow]) -> list[Chart]:
    """Validation flow loss in ten bins of the timestep, absolute and minus the baseline."""
    places = {f"val/flow/t{index}": (index + 0.5) / _NUM_BINS for index in range(_NUM_BINS)}
    values, differences = _by_place(rows, places)
    name = "timestep t (1 is pure noise)"
    charts = []
    if values:
        figure = _lines(comparison, values, name, markers=True)
        charts.append(Chart("validation flow loss by timestep", "", figure))
    if any(differences.values()):
        figure = _lines(comparison, differences, name, markers=True, zero=True)
        charts.append(Chart("the same, minus baseline", "below zero is better", figure))
    return charts


def block_charts(comparison: Comparison, rows: list[SummaryRow]) -> list[Chart]:
    """Every metric that is measured per block, against the block index."""
    places: dict[str, dict[str, float]] = {}
    for row in rows:
        block = block_of(row.metric)
        if block is not None:
            places.setdefault(split_name(row.metric)[0], {})[row.metric] = float(block)
    charts = []
    for base, names in places.items():
        meaning, (values, _) = quantity(base), _by_place(rows, names)
        figure = _lines(comparison, values, "block (its output)", markers=True)
        charts.append(Chart(meaning.label, _BETTER_WORDS[meaning.better], figure))
    return charts


def _by_place(
    rows: list[SummaryRow], places: dict[str, float]
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
    comparison: Comparison, curves: dict[tuple[str, int], Curve]
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
    curves: dict[tuple[str, int], Curve],
    caption: str = "",
    *,
    zero: bool = False,
    markers: bool = False,
    target: float | None = None,
) -> list[Chart]:
    """The chart of `curves` by variant and seed; no chart when they hold no finite number.

    `target` is drawn as a dotted line across.
    """
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
            if _is_drawn(value):
                binned.setdefault(places[step], []).append(value)
        for place, values in binned.items():
            series.setdefault(variant, {}).setdefault(place, []).append(mean_and_std(values)[0])
    if not series:
        return []
    captions = [caption] if caption else []
    captions += [f"means of {size} logged steps"] if size > 1 else []
    figure = _lines(comparison, series, "step", markers=markers, zero=zero, target=target)
    return [Chart(title, ", ".join(captions), figure)]


def _lines(
    comparison: Comparison,
    series: dict[str, Series],
    axis_title: str,
    *,
    markers: bool,
    zero: bool = False,
    target: float | None = None,
) -> JsonValue:
    """One line per variant with a band over seeds, the zero line if asked, and a dotted `target`.

    A line of few points has markers in any case: one point alone would not be seen.
    """
    traces: list[JsonValue] = []
    for variant, style in styles(comparison).items():
        points = [
            (place, finite)
            for place, values in sorted(series.get(variant, {}).items())
            if (finite := [value for value in values if _is_drawn(value)])
        ]
        if not points:
            continue
        x: list[JsonValue] = [place for place, _ in points]
        has_markers = markers or len(points) <= _FEW_POINTS
        if any(len(values) > 1 for _, values in points):
            traces.append(_band(style, x, points))
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if has_markers else "lines",
                "x": x,
                "y": [mean_and_std(values)[0] for _, values in points],
                "name": plot_text(variant),
                "legendgroup": variant,
                "line": {"color": style.colour, "width": 1.8, "dash": style.dash},
                "marker": {"color": style.colour, **style.mark},
                "hovertemplate": "%{y:.4g}",
            }
        )
    if target is not None:
        places = [place for points in series.values() for place in points]
        traces.append(_across(min(places), max(places), target))
    return {"data": traces, "layout": _report_layout(axis_title, zero)}


def _band(style: Style, x: list[JsonValue], points: list[tuple[float, list[float]]]) -> JsonValue:
    highs = [max(values) for _, values in points]
    lows = [min(values) for _, values in points]
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [*x, *reversed(x)],
        "y": [*highs, *reversed(lows)],
        "fill": "toself",
        "fillcolor": _faint(style.colour),
        "line": {"width": 0},
        "legendgroup": style.variant,
        "hoverinfo": "skip",
    }


def _across(left: float, right: float, height: float) -> JsonValue:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [left, right],
        "y": [height, height],
        "line": {"color": BASELINE_COLOUR, "width": 1.4, "dash": "dot"},
        "hoverinfo": "skip",
    }


def _dots(comparison: Comparison, shown: list[SummaryRow]) -> JsonValue:
    """Paired differences of one metric, a row per variant: dots of seeds, mean and interval."""
    traces: list[JsonValue] = []
    for row in shown:
        style = styles(comparison)[row.variant]
        name = plot_text(row.variant)
        finite = {s: v for s, v in row.differences.items() if _is_drawn(v)}
        never = () if row.target is None else row.target.never
        symbols: list[JsonValue] = ["triangle-right" if s in never else "circle" for s in finite]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": list(finite.values()),
                "y": [name] * len(finite),
                "text": [f"seed {seed}" for seed in finite],
                "hovertemplate": "%{text}: %{x:+.4g}<extra></extra>",
                "legendgroup": row.variant,
                "cliponaxis": False,
                "marker": {
                    "size": 9,
                    "symbol": symbols,
                    "color": _faint(style.colour),
                    "line": {"width": 1.5, "color": style.colour},
                },
            }
        )
        if row.paired is not None and row.paired.low is not None and _is_drawn(row.paired.mean):
            traces.append(_mean_bar(style, row.paired, row.diff_text))
    across: Json = {"zeroline": True, "zerolinecolor": _INK, "rangemode": "tozero"}
    down: Json = {"autorange": "reversed", "showgrid": False, "type": "category"}
    changes: Json = {
        "hovermode": "closest",
        "height": 62 + 30 * len(shown),
        "xaxis": _report_axis("") | across,
        "yaxis": _report_axis("") | down,
    }
    return {"data": traces, "layout": _report_layout("", False) | changes}


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


def _is_drawn(value: float) -> bool:
    """Whether plotly.js can place it: its own axes overflow before floats do."""
    return abs(value) < _MOST_DRAWN  # not of NaN


def _mean_bar(style: Style, paired: Paired, text: str) -> JsonValue:
    assert paired.low is not None and paired.high is not None
    up, down = paired.high - paired.mean, paired.mean - paired.low
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [paired.mean],
        "y": [plot_text(style.variant)],
        "hovertemplate": f"mean {text}<extra></extra>",
        "legendgroup": style.variant,
        "marker": {
            "symbol": "line-ns",
            "size": 20,
            "line": {"width": 2.5, "color": style.colour},
        },
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [up if _is_drawn(up) else None],
            "arrayminus": [down if _is_drawn(down) else None],
            "color": style.colour,
            "thickness": 1.5,
            "width": 4,
        },
    }


def _report_layout(axis_title: str, zero: bool) -> Json:
    vertical: Json = {
        "zeroline": zero,
        "zerolinecolor": _INK,
        "rangemode": "tozero" if zero else "normal",
    }
    return layout(260, left=52, right=12, bottom=40) | {
        "showlegend": False,
        "hovermode": "x unified",
        "xaxis": _report_axis(axis_title),
        "yaxis": _report_axis("") | vertical,
    }


def _report_axis(title: str) -> Json:
    return axis(title, standoff=8) | {"exponentformat": "power"}


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.14)"
