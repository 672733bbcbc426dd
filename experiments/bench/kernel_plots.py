"""Plots of the kernel benchmark: time, memory and roofline share against tokens, as SVG."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from alignlab.kernels.bench.csv_file import Row
from alignlab.runs.atomic_files import whole_file

# Okabe and Ito's colours, told apart with any kind of colour vision; the floor is grey.
_STYLES: dict[str, dict[str, Any]] = {
    "floor": {"color": "#6b7280", "linestyle": "--", "marker": "s"},
    "eager": {"color": "#d55e00", "linestyle": "-", "marker": "o"},
    "compile": {"color": "#cc79a7", "linestyle": "-", "marker": "^"},
    "chunked": {"color": "#0072b2", "linestyle": "-", "marker": "D"},
    "triton": {"color": "#009e73", "linestyle": "-", "marker": "v"},
}
# Of what is not alignlab's, in the order of their names.
_OTHERS = ("#56b4e9", "#e69f00", "#8a6d00", "#8c63c4", "#000000")
_TITLES = (
    "forward, ms",
    "forward + backward, ms",
    "peak extra memory, MiB",
    "roofline share",
)


class Point(NamedTuple):
    """One figure of one provider, with its 20th and 80th percentile."""

    tokens: int
    middle: float
    low: float
    high: float


# By provider.
Lines = dict[str, list[Point]]


def draw_plots(rows: list[Row], out: Path) -> list[Path]:
    """Draws one file per operation and dtype: a row per width and blocks, a column per quantity.

    Args:
        rows: measurements on one device, of one commit.
        out: folder to write to.
    """
    plots: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        plots[row["kernel_name"], _config(row)["dtype"]].append(row)
    return [_draw(op, dtype, drawn, out) for (op, dtype), drawn in plots.items()]


def roofline_share(rows: list[Row], mode: str) -> Lines:
    """Computes minimum FLOPs per second of each provider over what the floor does per second.

    Without a floor at the same number of tokens, there is no point.
    """
    speeds = [r for r in rows if (r["metric_name"], r["kernel_operation_mode"]) == ("speed", mode)]
    floor = {r["x_value"]: _rate(r) for r in speeds if r["kernel_provider"] == "floor"}
    shares: Lines = {}
    for row in speeds:
        if row["kernel_provider"] == "floor" or row["x_value"] not in floor:
            continue
        share = _rate(row) / floor[row["x_value"]]
        point = Point(int(row["x_value"]), share, share, share)
        shares.setdefault(row["kernel_provider"], []).append(point)
    return shares


def _rate(row: Row) -> float:
    return float(_config(row)["flops"]) / float(row["y_value_50"])


def styles_of(providers: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each of the providers is drawn, alignlab's own ones first."""
    present = set(providers)
    styles = {name: style for name, style in _STYLES.items() if name in present}
    for index, name in enumerate(sorted(present - set(_STYLES))):
        colour = _OTHERS[index % len(_OTHERS)]
        styles[name] = {"color": colour, "linestyle": "-.", "marker": "P"}
    return styles


def _config(row: Row) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(row["extra_benchmark_config_str"])
    return config


def _lines(rows: list[Row], metric: str, mode: str) -> Lines:
    lines: Lines = {}
    for row in rows:
        if (row["metric_name"], row["kernel_operation_mode"]) == (metric, mode):
            values = (float(row[f"y_value_{quantile}"]) for quantile in (50, 20, 80))
            lines.setdefault(row["kernel_provider"], []).append(Point(int(row["x_value"]), *values))
    return lines


def _draw(op: str, dtype: str, rows: list[Row], out: Path) -> Path:
    panels: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for row in rows:
        panels[_config(row)["width"], _config(row)["blocks"]].append(row)
    figure = _figure(
        f"{op}, {dtype}, {rows[0]['gpu_name']}",
        {_panel_title(op, *key): shown for key, shown in sorted(panels.items())},
    )
    slug = re.sub(r"[^a-z0-9]+", "-", rows[0]["gpu_name"].lower()).strip("-")
    path = out / f"{op}_{dtype}_{slug}.svg"
    # Text stays text, and the same figures give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "alignlab"}):
        with whole_file(path) as partial:
            figure.savefig(partial, metadata={"Date": None})
    return path


def draw_overview(rows: list[Row], path: Path) -> None:
    """Draws all operations, dtypes, widths and blocks into one PNG."""
    panels: dict[tuple[str, str, int, int], list[Row]] = defaultdict(list)
    for row in rows:
        config = _config(row)
        key = (row["kernel_name"], config["dtype"], config["width"], config["blocks"])
        panels[key].append(row)
    named = {
        f"{op} {dtype}, {_panel_title(op, width, blocks)}": shown
        for (op, dtype, width, blocks), shown in sorted(panels.items())
    }
    with whole_file(path) as partial:
        _figure(rows[0]["gpu_name"], named).savefig(partial, dpi=80)


def _panel_title(op: str, width: int, blocks: int) -> str:
    return f"C={width}, L={blocks}" if op == "pull_push" else f"D={width}"


def _figure(title: str, panels: Mapping[str, list[Row]]) -> Figure:
    """A row for each of the panels, a column for each quantity."""
    figure = Figure(figsize=(13, 2.6 * len(panels) + 1.2), layout="constrained")
    grid = figure.subplots(len(panels), len(_TITLES), squeeze=False)
    styles = styles_of(row["kernel_provider"] for shown in panels.values() for row in shown)
    for axes, (name, shown) in zip(grid, panels.items(), strict=True):
        columns = (
            _lines(shown, "speed", "forward"),
            _lines(shown, "speed", "full"),
            _lines(shown, "memory", "full"),
            roofline_share(shown, "full"),
        )
        for place, quantity, lines in zip(axes, _TITLES, columns, strict=True):
            _panel(place, f"{quantity} ({name})", lines, styles)
        axes[-1].set_yscale("linear")
        axes[-1].set_ylim(bottom=0)
    handles = [grid[0][0].plot([], [], label=p, **style)[0] for p, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(title)
    return figure


def _panel(axes: Axes, title: str, lines: Lines, styles: Mapping[str, dict[str, Any]]) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xscale("log")
    axes.set_yscale("log")
    tokens = sorted({point.tokens for points in lines.values() for point in points})
    for provider, style in styles.items():
        points = sorted(lines.get(provider, ()))
        x = [point.tokens for point in points]
        axes.plot(x, [point.middle for point in points], markersize=4, linewidth=1.6, **style)
        low, high = [point.low for point in points], [point.high for point in points]
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens], fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens per sample, N", fontsize=8)
    axes.tick_params(axis="y", which="both", labelsize=8)
    axes.grid(True, which="major", color="#eceff3")
