"""A chart: a matplotlib figure with its title and what it says at each place.

The figure is written as SVG into a page, and as SVG and PDF beside it.
"""

import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import FigureCanvasPdf, PdfPages
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from pydantic import JsonValue

from alignlab.experiments.charts.look import RC, drawn_variables
from alignlab.experiments.report.escaping import visible
from alignlab.runs.atomic_files import whole_file

WIDTH, HEIGHT = 380.0, 230.0
"""Of a chart in points: what a column of a page is wide, at 96 pixels an inch a little wider."""

log = logging.getLogger(__name__)
_NO_GLYPH = r"Glyph \d+ .*missing from font"
_PROLOGUE = re.compile(r"^.*?(?=<svg )", re.DOTALL)
_UNREAD = re.compile(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", re.DOTALL)
_TAG = re.compile("<[^>]*>")
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_GROUP = re.compile(r'id="(of-\d+)"')
_NAME = re.compile(r'(\bid="|href="#|url\(#)')
_SIZE = re.compile(r'(<svg [^>]*?)width="[^"]*"( [^>]*?)height="[^"]*"')


@dataclass(frozen=True)
class Readout:
    """What a chart says at one place.

    Args:
        axes: the place is in its data coordinates.
        x, y: the place; None: anywhere along that axis.
        heading: of the place, such as "step 100".
        rows: number of the style (-1: none) and text, one line each.
    """

    axes: Axes
    x: float | None
    y: float | None
    heading: str
    rows: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Chart:
    """One chart: its title, what to read it by, the figure, and its readouts."""

    title: str
    caption: str
    figure: Figure
    readouts: tuple[Readout, ...] = ()

    @property
    def width(self) -> float:
        """Of the figure, in points."""
        return float(72.0 * self.figure.get_figwidth())

    @cached_property
    def svg(self) -> str:
        """The chart as an SVG file, in the colours of white paper."""
        text = io.StringIO()
        with look():
            lay_out(self.figure)
            # `savefig` would draw everything twice
            canvas: Any = FigureCanvasSVG(self.figure)
            canvas.print_svg(text, metadata={"Date": None})
        return text.getvalue()


@contextmanager
def look() -> Iterator[None]:
    """Everything that matplotlib draws and writes in here has the look of the charts."""
    with matplotlib.rc_context(RC), warnings.catch_warnings():
        # in an SVG a letter is a letter, whichever fonts are here
        warnings.filterwarnings("ignore", message=_NO_GLYPH)
        yield


def new_figure(
    width: float = WIDTH,
    height: float = HEIGHT,
    layout: Literal["constrained"] | None = "constrained",
) -> Figure:
    """An empty figure, so many points wide and high; without a `layout` its margins are given."""
    size = (width / 72.0, height / 72.0)
    return Figure(figsize=size, layout=layout, facecolor="none", dpi=72.0)


def lay_out(figure: Figure) -> None:
    """Places what is in a figure, once: it is half of the time that a chart takes."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")


def group_name(place: int) -> str:
    """The `gid` of everything in a figure that belongs to one style, by its number."""
    return f"of-{place}"


def inline_svg(svg: str, name: str) -> str:
    """A chart for a page.

    Args:
        svg: of a `Chart`.
        name: of the chart among those of the page; no id in it is another's.

    Returns:
        An `<svg>` whose colours are the style sheet's variables and in which what belongs to a
        style has its `group_name` as class.
    """
    text = _UNREAD.sub("", _PROLOGUE.sub("", svg, count=1))
    text = _SIZE.sub(r"\1\2", text, count=1)
    variables = drawn_variables()

    def on_page(match: re.Match[str]) -> str:
        tag = _GROUP.sub(r'class="\1"', match[0])
        tag = _NAME.sub(rf"\g<1>{name}-", tag)
        return _COLOUR.sub(lambda m: f"var({variables[m[0]]})" if m[0] in variables else m[0], tag)

    return _TAG.sub(on_page, text)  # what stands between tags is somebody's text


def placed_readouts(chart: Chart) -> list[JsonValue]:
    """Readouts of a chart whose `svg` was made, as [x, y, heading, rows].

    x and y are shares of the drawing's width and height, None where any is meant.
    """
    return [_place(chart.figure, one) for one in chart.readouts]


def save_pdf(figures: Sequence[Figure], path: Path) -> None:
    """Writes a PDF with a page for each figure, whole or not at all.

    One file for all holds its fonts once, which takes most of the time of a file. Letters that the
    font lacks are boxes in it, which the log says.
    """
    metadata = {"CreationDate": None}
    with look(), whole_file(path) as partial, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with PdfPages(partial, metadata=metadata) as pages:
            for figure in figures:
                lay_out(figure)
                canvas: Any = FigureCanvasPdf(figure)
                canvas.print_pdf(pages)
    for one in caught:
        if not re.match(_NO_GLYPH, str(one.message)):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if any(re.match(_NO_GLYPH, str(one.message)) for one in caught):
        log.warning("%s: letters that its font lacks are boxes; the SVG files have them", path)


def _place(figure: Figure, readout: Readout) -> JsonValue:
    x, y = readout.axes.transData.transform((readout.x or 0.0, readout.y or 0.0))
    width, height = map(float, (figure.bbox.width, figure.bbox.height))
    return [
        None if readout.x is None else round(float(x) / width, 4),
        None if readout.y is None else round(1.0 - float(y) / height, 4),
        visible(readout.heading),
        [[place, visible(text)] for place, text in readout.rows],
    ]
