"""How a chart is drawn: one look for all, as data that plotly.js reads."""

import html
import math
import statistics
from dataclasses import dataclass

from pydantic import JsonValue

from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.report.statistics import Paired
from alignlab.experiments.report.summary import SummaryRow

# After Okabe and Ito, told apart with any kind of colour vision; the baseline is grey. Some are
# shifted so that each stands out from white and from the dark page's #14171c by 3:1 or more.
PAPERS = ("#ffffff", "#14171c")
BASELINE_COLOUR = "#7b828f"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b87d00", "#3397d1", "#8a6d00", "#8c63c4")
_DASHES = ("solid", "dash", "dot", "dashdot")
_INK = "#374151"
_FEW_POINTS = 15

# Place on the horizontal axis: one number per seed.
Series = dict[float, list[float]]
Json = dict[str, JsonValue]


@dataclass(frozen=True)
class Style:
    """How one variant is drawn in every chart."""

    variant: str
    colour: str
    dash: str


def styles(comparison: Comparison) -> dict[str, Style]:
    """A colour for every variant, with other dashes once the colours are used up."""
    found, taken = {}, 0
    for variant in comparison.variants:
        if variant == comparison.baseline:
            found[variant] = Style(variant, BASELINE_COLOUR, "solid")
            continue
        dash = _DASHES[taken // len(COLOURS) % len(_DASHES)]
        found[variant] = Style(variant, COLOURS[taken % len(COLOURS)], dash)
        taken += 1
    return found


def lines(
    comparison: Comparison,
    series: dict[str, Series],
    axis: str,
    *,
    markers: bool,
    zero: bool = False,
) -> JsonValue:
    """One line per variant with a band over seeds; `zero` draws the zero line.

    A line of few points has markers in any case: one point alone would not be seen.
    """
    traces: list[JsonValue] = []
    for variant, style in styles(comparison).items():
        points = [
            (place, finite)
            for place, values in sorted(series.get(variant, {}).items())
            if (finite := [value for value in values if math.isfinite(value)])
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
                "y": [statistics.fmean(values) for _, values in points],
                "name": html.escape(variant),
                "legendgroup": variant,
                "line": {"color": style.colour, "width": 1.8, "dash": style.dash},
                "marker": {"size": 5, "color": style.colour},
                "hovertemplate": "%{y:.4g}",
            }
        )
    return {"data": traces, "layout": _layout(axis, zero)}


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


def dots(comparison: Comparison, shown: list[SummaryRow]) -> JsonValue:
    """Paired differences of one metric, a row per variant: dots of seeds, mean and 95% interval."""
    traces: list[JsonValue] = []
    for row in shown:
        style = styles(comparison)[row.variant]
        name = html.escape(row.variant)
        finite = {s: v for s, v in row.differences.items() if math.isfinite(v)}
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
                "marker": {"size": 9, "color": _faint(style.colour), "line": _ring(style)},
            }
        )
        if row.paired is not None and row.paired.low is not None:
            traces.append(_mean_bar(style, row.paired, row.diff_text))
    return {
        "data": traces,
        "layout": _layout("", False)
        | {
            "hovermode": "closest",
            "height": 62 + 30 * len(shown),
            "xaxis": _axis("")
            | {"zeroline": True, "zerolinecolor": "#374151", "rangemode": "tozero"},
            "yaxis": _axis("") | {"autorange": "reversed", "showgrid": False, "type": "category"},
        },
    }


def _mean_bar(style: Style, found: Paired, text: str) -> JsonValue:
    assert found.low is not None and found.high is not None
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [found.mean],
        "y": [html.escape(style.variant)],
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
            "array": [found.high - found.mean],
            "arrayminus": [found.mean - found.low],
            "color": style.colour,
            "thickness": 1.5,
            "width": 4,
        },
    }


def _layout(axis: str, zero: bool) -> Json:
    return {
        "height": 260,
        "margin": {"l": 52, "r": 12, "t": 8, "b": 40},
        "showlegend": False,
        "hovermode": "x unified",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": _INK},
        "xaxis": _axis(axis),
        "yaxis": _axis("")
        | {"zeroline": zero, "zerolinecolor": _INK, "rangemode": "tozero" if zero else "normal"},
    }


def _axis(title: str) -> Json:
    return {
        "title": {"text": title, "standoff": 8},
        "gridcolor": "#eceff3",
        "linecolor": "#d1d5db",
        "zeroline": False,
        "automargin": True,
        "exponentformat": "power",
    }


def _ring(style: Style) -> JsonValue:
    return {"width": 1.5, "color": style.colour}


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.14)"
