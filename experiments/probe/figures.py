"""Charts of a probe's page: heat maps of blocks and noise levels and of cosines, and a t-SNE.

Shape letters: N tokens, D width.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from alignlab.evaluation.feature_maps import tsne_points
from alignlab.evaluation.probe import MODELS, SIGMAS, Cell
from alignlab.evaluation.token_metrics import ReferenceTokens
from alignlab.experiments.charts.chart import WIDTH, Chart, Readout, group_name, look, new_figure
from alignlab.experiments.charts.heat import WHITE, bare, heat_map, minus
from alignlab.experiments.charts.look import COLOURS, styles
from alignlab.metrics.features import unit_rows

FEW_SUBJECTS = len(COLOURS)
_DIVERGING = LinearSegmentedColormap.from_list(
    "change", ["#b35806", "#f1a340", "#e9e9ec", "#79a8d8", "#0b5394"]
)
_SQUARE = 330.0  # points, a side of the cosines among tokens


@dataclass(frozen=True)
class MapTable:
    """A measure by block and noise level: values before and after, `values[model][block][sigma]`.

    Args:
        measure: name in `probe.csv`.
        label: what a reader calls it.
        hint: how to read it.
        blocks: 0-based.
        values: by model, a row per block, a column per noise level; None where unknown.
        sigmas: the noise levels.
    """

    measure: str
    label: str
    hint: str
    blocks: tuple[int, ...]
    values: dict[str, list[list[float | None]]]
    sigmas: tuple[float, ...] = SIGMAS

    def change(self, row: int, column: int) -> float | None:
        """After minus before."""
        before, after = (self.values[model][row][column] for model in MODELS)
        return None if before is None or after is None else after - before


def map_tables(
    cells: Sequence[Cell],
    measures: Mapping[str, tuple[str, str]],
    sigmas: tuple[float, ...] = SIGMAS,
) -> list[MapTable]:
    """A table for each of `measures` (label, hint) that was taken, in their order."""
    values_of = {(c.measure, c.model, c.block, c.sigma): c.value for c in cells}
    tables = []
    for measure, (label, hint) in measures.items():
        blocks = tuple(sorted({c.block for c in cells if c.measure == measure}))
        if blocks:
            values = {
                model: [[values_of.get((measure, model, b, s)) for s in sigmas] for b in blocks]
                for model in MODELS
            }
            tables.append(MapTable(measure, label, hint, blocks, values, sigmas))
    return tables


def map_charts(table: MapTable, aligned: Sequence[int]) -> list[Chart]:
    """Before, after and their difference; before and after share one colour scale."""
    names = [f"{b} ●" if b in aligned else str(b) for b in table.blocks]
    every = [v for model in MODELS for row in table.values[model] for v in row if v is not None]
    ends = (min(every), max(every))
    places = range(len(table.blocks)), range(len(table.sigmas))
    change = [[table.change(row, column) for column in places[1]] for row in places[0]]
    largest = max((abs(v) for row in change for v in row if v is not None), default=0.0) or 1.0
    columns = [f"{sigma:g}" for sigma in table.sigmas]
    charts = [
        _map(f"{table.label}: {model}", table.values[model], (names, columns), ends, "viridis")
        for model in MODELS
    ]
    title = f"{table.label}: change"
    return [
        *charts,
        _map(title, change, (names, columns), (-largest, largest), _DIVERGING, sign="+"),
    ]


def _map(
    title: str,
    values: list[list[float | None]],
    names: tuple[list[str], list[str]],
    ends: tuple[float, float],
    colours: str | LinearSegmentedColormap,
    sign: str = "",
) -> Chart:
    return heat_map(
        title,
        values,
        names,
        axes_titles=("block", "noise level"),
        ends=ends,
        colours=colours,
        sign=sign,
        caption="noise level 1 is pure noise",
    )


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
    ends = counts.cumsum(0).tolist()
    middles = [end - count / 2 for end, count in zip(ends, counts.tolist(), strict=True)]
    letters = [chr(ord("A") + i) for i in range(len(counts))]
    return [
        _square(title, cosine_NN.numpy(), low, ends, middles, letters)
        for title, cosine_NN in cosines.items()
    ]


def _square(
    title: str,
    cosine_NN: npt.NDArray[np.float64],
    low: float,
    ends: list[int],
    middles: list[float],
    letters: list[str],
) -> Chart:
    with look():
        figure = new_figure(WIDTH, _SQUARE)
        axes = figure.subplots()
        count = len(cosine_NN)
        # one picture: thousands of squares would make a page of megabytes
        image = axes.imshow(
            cosine_NN, vmin=low, vmax=1.0, cmap="viridis", interpolation="nearest",
            extent=(0, count, count, 0),
        )  # fmt: skip
        figure.colorbar(image, ax=axes, pad=0.02, aspect=30).outline.set_visible(False)
        for end in ends[:-1]:
            axes.axvline(end, color=WHITE, linewidth=1.5)
            axes.axhline(end, color=WHITE, linewidth=1.5)
        axes.set_xticks(middles, letters)
        axes.set_yticks(middles, letters)
        bare(axes)
    starts = [0, *ends[:-1]]
    blocks = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
    readouts = tuple(
        Readout(
            axes, middles[j], middles[i], f"{letters[i]} with {letters[j]}",
            ((-1, f"mean cosine {minus(f'{cosine_NN[rows, columns].mean():.3f}')}"),),
        )
        for i, rows in enumerate(blocks)
        for j, columns in enumerate(blocks)
    )  # fmt: skip
    return Chart(title, "", figure, readouts)


def shown_subjects(tokens: ReferenceTokens) -> list[int]:
    """Up to eight subjects with the most tokens, as many as there are colours."""
    return [number for number, _ in Counter(tokens.subjects_N.tolist()).most_common(FEW_SUBJECTS)]


def scatter_chart(
    title: str, features_ND: Tensor, subjects_N: Tensor, names: Mapping[int, str]
) -> Chart:
    """A t-SNE of the tokens, a colour and a mark for each subject."""
    points_N2 = tsne_points(features_ND)
    with look():
        figure = new_figure(WIDTH, _SQUARE)
        axes = figure.subplots()
        readouts = []
        by_name = styles(list(names.values()))
        for place, (number, name) in enumerate(names.items()):
            mine_M2, style = points_N2[subjects_N == number], by_name[name]
            axes.plot(
                mine_M2[:, 0].tolist(), mine_M2[:, 1].tolist(), style.marker, color=style.colour,
                markersize=5.0, markeredgewidth=0.0, alpha=0.85,
            )[0].set_gid(group_name(place))  # fmt: skip
            middle = mine_M2.double().median(0).values.tolist() if len(mine_M2) else [0.0, 0.0]
            readouts.append(Readout(axes, middle[0], middle[1], "", ((place, "middle"),)))
        axes.set_xticks([])
        axes.set_yticks([])
    return Chart(title, "", figure, tuple(readouts))
