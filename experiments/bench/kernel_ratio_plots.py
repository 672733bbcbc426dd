"""Plots of `alignlab bench compare`: a file per operation and dtype, a line per case."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Plot
from matplotlib.ticker import NullLocator

from alignlab.experiments.bench.kernel_plots import styles_of
from alignlab.experiments.bench.kernel_ratios import Ratio
from alignlab.experiments.report.escaping import one_visible_line
from alignlab.runs.atomic_files import whole_file

_COLUMNS = (
    ("forward", "speed", "forward, time"),
    ("full", "speed", "forward + backward, time"),
    ("full", "memory", "forward + backward, peak memory"),
)
_TICKS = (
    *(0.001, 0.01, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9),
    *(1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 100.0, 1000.0),
)
_SPREAD = 0.7  # of the height of a case, for its implementations


def draw_ratios(ratios: Sequence[Ratio], limit: float | None, out: Path) -> list[Path]:
    """Draws new over old with intervals: a column per quantity, cases from top to bottom.

    Args:
        ratios: what to draw.
        limit: of `--fail-above`, drawn as a dashed line.
        out: folder to write to.

    Returns:
        The files, one per operation and dtype.
    """
    plots: dict[tuple[str, str], list[Ratio]] = defaultdict(list)
    for one in ratios:
        plots[one.figure.op, one.figure.dtype].append(one)
    paths = []
    for (op, dtype), drawn in plots.items():
        path = out / f"ratios_{_slug(op)}_{_slug(dtype)}.svg"
        figure = _figure(f"{op}, {dtype}: new / old", drawn, limit)
        # Text stays text, and the same figures give the same file.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "alignlab"}):
            with whole_file(path) as partial:
                figure.savefig(partial, metadata={"Date": None})
        paths.append(path)
    return paths


def _slug(text: str) -> str:
    return "".join(char if char.isalnum() else "-" for char in text)


def _figure(title: str, ratios: Sequence[Ratio], limit: float | None) -> Plot:
    several = len({one.device for one in ratios}) > 1
    cases = list(dict.fromkeys(_case(one, several) for one in ratios))
    styles = styles_of(one.figure.impl for one in ratios)
    height = 1.8 + len(cases) * max(0.3, 0.16 * len(styles))
    plot = Plot(figsize=(13, height), layout="constrained")
    grid = plot.subplots(1, len(_COLUMNS), sharey=True, squeeze=False)[0]
    for axes, (mode, metric, name) in zip(grid, _COLUMNS, strict=True):
        shown = [r for r in ratios if (r.figure.mode, r.figure.metric) == (mode, metric)]
        axes.set_title(name, fontsize=10)
        axes.axvline(1.0, color="#6b7280", linewidth=1)
        if limit is not None:
            axes.axvline(limit, color="#b91c1c", linewidth=1, linestyle="--")
        for place, (impl, style) in enumerate(styles.items()):
            offset = _SPREAD * ((place + 0.5) / len(styles) - 0.5)
            points = [one for one in shown if one.figure.impl == impl]
            y = [cases.index(_case(one, several)) + offset for one in points]
            _draw(axes, points, y, style)
        _scale(axes)
    grid[0].set_yticks(range(len(cases)), cases, fontsize=8)
    grid[0].set_ylim(len(cases) - 0.5, -0.5)
    handles = [
        grid[0].plot([], [], label=_text(impl), **style)[0] for impl, style in styles.items()
    ]
    plot.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    plot.suptitle(_text(title))
    return plot


def _draw(axes: Axes, points: Sequence[Ratio], y: Sequence[float], style: dict[str, str]) -> None:
    colour, marker = style["color"], style["marker"]
    axes.hlines(y, [one.low for one in points], [one.high for one in points], color=colour)
    middles = [one.middle for one in points]
    axes.plot(middles, y, linestyle="none", marker=marker, color=colour, markersize=4)


def _scale(axes: Axes) -> None:
    """Logarithmic, so that twice and half are equally far from 1; never less than 0.9 to 1.1."""
    low, high = axes.get_xlim()
    axes.set_xscale("log")
    axes.set_xlim(min(max(low, 1e-6), 0.9), max(high, 1.1))
    low, high = axes.get_xlim()
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    if len(ticks) > 7:
        ticks = [tick for tick in ticks if f"{tick:e}".startswith("1.0000")]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("new / old (below 1 is better)", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(True, axis="x", color="#eceff3")
    axes.set_axisbelow(True)


def _case(one: Ratio, with_device: bool) -> str:
    """A case without operation and dtype, which the title has."""
    words = one.figure.case.split(" ")
    return _text(" ".join([*words[1:-1], *([one.device] if with_device else [])]))


def _text(text: str) -> str:
    """Text that matplotlib shows as it is: `$` would begin a formula."""
    return one_visible_line(text).replace("$", r"\$")
