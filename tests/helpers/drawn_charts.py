"""What a chart's figure holds, read back from matplotlib."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.lines import Line2D

from alignlab.experiments.charts.chart import Chart, group_name


def drawn_lines(chart: Chart, variants: Sequence[str]) -> dict[str, list[Line2D]]:
    """What is drawn at places of the axes for each variant that has something there."""
    (axes,) = _axes(chart)
    return {
        variant: lines
        for place, variant in enumerate(variants)
        if (
            lines := [
                line
                for line in axes.lines
                if line.get_gid() == group_name(place) and line.get_transform() == axes.transData
            ]
        )
    }


def drawn_bands(chart: Chart, variants: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Lowest and highest place of each variant's band."""
    (axes,) = _axes(chart)
    found = {}
    for place, variant in enumerate(variants):
        for band in axes.collections:
            if isinstance(band, PolyCollection) and band.get_gid() == group_name(place):
                box = band.get_paths()[0].get_extents()
                found[variant] = (float(box.y0), float(box.y1))
    return found


def points(line: Line2D) -> tuple[list[float], list[float]]:
    """Where a line goes: across, and up."""
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def _axes(chart: Chart) -> list[Axes]:
    return list(chart.figure.axes)
