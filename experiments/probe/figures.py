"""Charts of a probe's page as plotly.js figures: plain data, drawn by the script inside the page.

Shape letters: N tokens, D width.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import JsonValue
from torch import Tensor

from alignlab.evaluation.feature_maps import tsne_points
from alignlab.evaluation.probe import MODELS, SIGMAS, Cell
from alignlab.evaluation.token_metrics import ReferenceTokens
from alignlab.experiments.report.charts import COLOURS, Chart, Json, axis, layout
from alignlab.experiments.report.escaping import plot_text
from alignlab.metrics.features import unit_rows

FEW_SUBJECTS = len(COLOURS)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")
_DIVERGING: list[JsonValue] = [
    [0.0, "#b35806"], [0.25, "#f1a340"], [0.5, "#e9e9ec"], [0.75, "#79a8d8"], [1.0, "#0b5394"],
]  # fmt: skip


@dataclass(frozen=True)
class MapTable:
    """A measure by block and noise level: values before and after, `values[model][block][sigma]`.

    Args:
        measure: name in `probe.csv`.
        label: what a reader calls it.
        hint: how to read it.
        blocks: 0-based.
        values: by model, a row per block, a column per noise level; None where unknown.
    """

    measure: str
    label: str
    hint: str
    blocks: tuple[int, ...]
    values: dict[str, list[list[float | None]]]

    def change(self, row: int, column: int) -> float | None:
        """After minus before."""
        before, after = (self.values[model][row][column] for model in MODELS)
        return None if before is None or after is None else after - before


def map_tables(cells: Sequence[Cell], measures: Mapping[str, tuple[str, str]]) -> list[MapTable]:
    """A table for each of `measures` (label, hint) that was taken, in their order."""
    values_of = {(c.measure, c.model, c.block, c.sigma): c.value for c in cells}
    tables = []
    for measure, (label, hint) in measures.items():
        blocks = tuple(sorted({c.block for c in cells if c.measure == measure}))
        if blocks:
            values = {
                model: [[values_of.get((measure, model, b, s)) for s in SIGMAS] for b in blocks]
                for model in MODELS
            }
            tables.append(MapTable(measure, label, hint, blocks, values))
    return tables


def map_charts(table: MapTable, aligned: Sequence[int]) -> list[Chart]:
    """Before, after and their difference; before and after share one colour scale."""
    names: list[JsonValue] = [f"{b} ●" if b in aligned else str(b) for b in table.blocks]
    every = [v for model in MODELS for row in table.values[model] for v in row if v is not None]
    scale: Json = {"zmin": min(every), "zmax": max(every), "colorscale": "Viridis"}
    places = range(len(table.blocks)), range(len(SIGMAS))
    change = [[table.change(row, column) for column in places[1]] for row in places[0]]
    largest = max((abs(v) for row in change for v in row if v is not None), default=0.0) or 1.0
    diverging: Json = {"zmin": -largest, "zmax": largest, "colorscale": _DIVERGING}
    charts = [
        Chart(f"{table.label}: {model}", "", _map(table.values[model], names, scale))
        for model in MODELS
    ]
    return [*charts, Chart(f"{table.label}: change", "", _map(change, names, diverging, sign="+"))]


def _map(
    values: list[list[float | None]], names: list[JsonValue], scale: Json, sign: str = ""
) -> JsonValue:
    rows: list[JsonValue] = [list(row) for row in values]
    trace: Json = {
        "type": "heatmap",
        "z": rows,
        "x": [f"{sigma:g}" for sigma in SIGMAS],
        "y": names,
        "texttemplate": f"%{{z:{sign}.2f}}",
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": f"block %{{y}}, noise level %{{x}}: %{{z:{sign}.4f}}<extra></extra>",
        "colorbar": _bar(),
        **scale,
    }
    height = 84 + 24 * len(names)
    axes: Json = {
        "xaxis": _axis("noise level (1 is pure noise)") | {"type": "category"},
        "yaxis": _axis("block") | {"type": "category", "autorange": "reversed"},
    }
    return {"data": [trace], "layout": _layout(height) | axes}


def similarity_charts(sets: Mapping[str, Tensor], subjects_N: Tensor) -> list[Chart]:
    """Cosines among the tokens of one clip, a chart for each set of features; tokens by subject.

    Args:
        sets: features (N, D) by title, of the same tokens.
        subjects_N: int, ascending: tokens of one subject lie together.
    """
    cosines = {
        title: unit_rows(features_ND.double()) @ unit_rows(features_ND.double()).T
        for title, features_ND in sets.items()
    }
    low = min(float(cosine_NN.min()) for cosine_NN in cosines.values())
    counts = torch.unique_consecutive(subjects_N, return_counts=True)[1]
    ends = counts.cumsum(0)
    middles: list[JsonValue] = [float(e - c / 2 - 0.5) for e, c in zip(ends, counts, strict=True)]
    ticks: Json = {
        "tickvals": middles,
        "ticktext": [chr(ord("A") + i) for i in range(len(counts))],
        "showgrid": False,
    }
    lines: list[JsonValue] = [
        {"type": "line", "line": {"color": "#ffffff", "width": 1.5}, **place}
        for end in ends[:-1].tolist()
        for place in (
            {"x0": end - 0.5, "x1": end - 0.5, "y0": -0.5, "y1": len(subjects_N) - 0.5},
            {"y0": end - 0.5, "y1": end - 0.5, "x0": -0.5, "x1": len(subjects_N) - 0.5},
        )
    ]
    charts = []
    for title, cosine_NN in cosines.items():
        rows: list[JsonValue] = [[round(v, 3) for v in row] for row in cosine_NN.tolist()]
        trace: Json = {
            "type": "heatmap", "z": rows, "zmin": low, "zmax": 1.0, "colorscale": "Viridis",
            "colorbar": _bar(), "hovertemplate": "cosine %{z:.3f}<extra></extra>",
        }  # fmt: skip
        square: Json = {"autorange": "reversed", "scaleanchor": "x", "constrain": "domain"}
        layout = _layout(340) | {
            "xaxis": _axis("") | ticks | {"constrain": "domain"},
            "yaxis": _axis("") | ticks | square,
            "shapes": lines,
        }
        charts.append(Chart(title, "", {"data": [trace], "layout": layout}))
    return charts


def shown_subjects(tokens: ReferenceTokens) -> list[int]:
    """Up to eight subjects with the most tokens, as many as there are colours."""
    return [number for number, _ in Counter(tokens.subjects_N.tolist()).most_common(FEW_SUBJECTS)]


def scatter_chart(
    title: str, features_ND: Tensor, subjects_N: Tensor, names: Mapping[int, str]
) -> Chart:
    """A t-SNE of the tokens, a colour and a symbol for each subject."""
    points_N2 = tsne_points(features_ND)
    traces: list[JsonValue] = []
    for place, (number, name) in enumerate(names.items()):
        mine_M2 = points_N2[subjects_N == number]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [round(v, 3) for v in mine_M2[:, 0].tolist()],
                "y": [round(v, 3) for v in mine_M2[:, 1].tolist()],
                "name": plot_text(name),
                "legendgroup": name,
                "hovertemplate": f"{plot_text(name)}<extra></extra>",
                "marker": {"size": 6, "color": COLOURS[place], "symbol": _SYMBOLS[place]},
            }
        )
    bare: Json = {"showticklabels": False, "showgrid": False, "showline": True, "mirror": True}
    layout = _layout(340) | {
        "xaxis": _axis("") | bare,
        "yaxis": _axis("") | bare,
        "hovermode": "closest",
        "showlegend": False,
    }
    return Chart(title, "", {"data": traces, "layout": layout})


def _axis(title: str) -> Json:
    return axis(title, standoff=6)


def _layout(height: int) -> Json:
    return layout(height, left=44, right=8, bottom=44)


def _bar() -> Json:
    return {"thickness": 10, "outlinewidth": 0, "len": 1.0, "tickfont": {"size": 11}}
