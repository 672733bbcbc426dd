"""A heat map: values of rows by columns as colour and as number."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap

from alignlab.experiments.charts.chart import WIDTH, Chart, Readout, look, new_figure

WHITE = "#fefefe"  # on a colour, also on a dark page, where "#ffffff" stands for its paper
_ROW, _AROUND = 24.0, 62.0  # points, of a row, of axis and margins


def heat_map(
    title: str,
    values: Sequence[Sequence[float | None]],
    names: tuple[Sequence[str], Sequence[str]],
    *,
    axes_titles: tuple[str, str],
    ends: tuple[float, float],
    colours: str | Colormap = "viridis",
    sign: str = "",
    caption: str = "",
) -> Chart:
    """Draws it; a value that is not there leaves its place empty.

    Args:
        title: of the chart.
        values: a list for each row.
        names: of rows, top to bottom, and of columns.
        axes_titles: what the rows are, and the columns.
        ends: values with the first and the last colour.
        colours: matplotlib's, or its name.
        sign: as in a format, such as "+".
        caption: of the chart.
    """
    array = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)
    with look():
        figure = new_figure(WIDTH, _AROUND + _ROW * len(values))
        axes = figure.subplots()
        image = axes.pcolormesh(
            array, vmin=ends[0], vmax=ends[1], cmap=colours, edgecolors=WHITE, linewidth=1.0
        )
        figure.colorbar(image, ax=axes, pad=0.02, aspect=30).outline.set_visible(False)
        readouts = []
        for row, texts in enumerate(values):
            for column, value in enumerate(texts):
                if value is None:
                    continue
                x, y = column + 0.5, row + 0.5
                red, green, blue, _ = image.to_rgba(np.array([value]))[0]
                axes.text(
                    x, y, minus(f"{value:{sign}.2f}"), ha="center", va="center", fontsize=8.5,
                    color=WHITE if _is_dark(red, green, blue) else "#111827",
                )  # fmt: skip
                where = f"{axes_titles[0]} {names[0][row]}, {axes_titles[1]} {names[1][column]}"
                readouts.append(Readout(axes, x, y, where, ((-1, minus(f"{value:{sign}.4f}")),)))
        axes.set_yticks([i + 0.5 for i in range(len(names[0]))], names[0])
        axes.set_xticks([i + 0.5 for i in range(len(names[1]))], names[1])
        axes.set_ylabel(axes_titles[0])
        axes.set_xlabel(axes_titles[1])
        bare(axes)
        axes.invert_yaxis()
    return Chart(title, caption, figure, tuple(readouts))


def bare(axes: Axes) -> None:
    """Without grid, ticks and frame."""
    axes.grid(visible=False)
    axes.tick_params(length=0.0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def minus(text: str) -> str:
    """With true minus signs."""
    return text.replace("-", "\N{MINUS SIGN}")


def _is_dark(red: float, green: float, blue: float) -> bool:
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
