"""Line charts: a line for each of what is compared, with a band, and its name at the line's end."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from alignlab.experiments.charts.chart import HEIGHT, WIDTH, Readout, group_name, look, new_figure
from alignlab.experiments.charts.look import BASELINE_COLOUR, Style
from alignlab.experiments.report.escaping import one_visible_line
from alignlab.experiments.report.formatting import format_number

FEW_POINTS = 15
_FEW_TICKS = 6
_BAND_ALPHA = 0.14
_NAME_SIZE = 9.0
_NAME_GAP = 11.0  # points from one name to the next
_LONGEST_NAME = 16
_BEGINNING = 3  # letters of a name that is told by what differs
_INSIDE = 0.76  # of a figure's height that its axes take, about
MOST_DRAWN = 1e290  # axes overflow before floats do


@dataclass(frozen=True)
class Line:
    """One line.

    Args:
        style: how it is drawn.
        x, y: points, in order.
        low, high: ends of the band at each point; equal to `y` where there is none.
    """

    style: Style
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def is_drawn(value: float) -> bool:
    """Whether an axis can place it: finite, and not so large that the axis overflows."""
    return abs(value) < MOST_DRAWN  # not of NaN


def line_figure(
    lines: Sequence[Line],
    numbers: Mapping[str, int],
    axis_title: str,
    *,
    markers: bool,
    zero: bool = False,
    target: float | None = None,
) -> tuple[Figure, tuple[Readout, ...]]:
    """A figure with these lines, and what it says at each place of its horizontal axis.

    Args:
        lines: at least one, each with at least one point.
        numbers: of the style of each name, from 0.
        axis_title: of the horizontal axis.
        markers: a mark at every point; else only on lines of few points, which would not be seen
            otherwise, and a few on the others.
        zero: with a line at zero, which is then in sight.
        target: with a dotted line at this height.
    """
    with look():
        height = max(HEIGHT, len(lines) * _NAME_GAP / _INSIDE)
        figure = new_figure(height=height, layout=None)
        axes = figure.subplots()
        if zero:
            axes.axhline(0.0, color=BASELINE_COLOUR, linewidth=1.0, zorder=1)
        if target is not None:
            axes.axhline(target, color=BASELINE_COLOUR, linewidth=1.3, linestyle=":", zorder=1)
        for place, line in enumerate(lines):
            _draw(axes, line, group_name(numbers[line.style.name]), markers, place, len(lines))
        axes.set_xlabel(axis_title)
        places = sorted({x for line in lines for x in line.x})
        is_whole = all(float(x).is_integer() for x in places)
        if is_whole and len(places) <= _FEW_TICKS:
            axes.set_xticks(places, [f"{x:,.0f}" for x in places])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=is_whole))
        axes.margins(x=0.02)
        _write_names(axes, lines, numbers, height)
        _set_margins(figure, axes, lines, height)
    return figure, _readouts(axes, lines, numbers, axis_title)


def _draw(axes: Axes, line: Line, gid: str, markers: bool, place: int, count: int) -> None:
    style = line.style
    if any(low != high for low, high in zip(line.low, line.high, strict=True)):
        band = axes.fill_between(
            line.x, line.low, line.high, color=style.colour, alpha=_BAND_ALPHA, linewidth=0.0
        )
        band.set_gid(gid)
    every: int | tuple[int, int] = 1
    if not markers and len(line.x) > FEW_POINTS:
        step = max(1, len(line.x) // 5)
        every = (place * step // max(count, 1), step)  # not all at one place
    (drawn,) = axes.plot(
        line.x, line.y, color=style.colour, linestyle=style.line, marker=style.marker,
        markersize=4.5, markerfacecolor=style.face, markevery=every,
    )  # fmt: skip
    drawn.set_gid(gid)


def _set_margins(figure: Figure, axes: Axes, lines: Sequence[Line], height: float) -> None:
    """Room for ticks and names by the number of their letters: measuring takes longer than drawing.

    Digits of the font are 0.64 of its size wide, letters 0.6 on average.
    """
    ticks = [text.get_text() for text in axes.get_yticklabels()]
    left = 10.0 + 0.64 * 9.0 * max(map(len, ticks), default=0)
    names = short_names([line.style.name for line in lines])
    right = 12.0 + 0.62 * _NAME_SIZE * max(map(len, names), default=0)
    figure.subplots_adjust(
        left=left / WIDTH, right=1.0 - right / WIDTH, bottom=36.0 / height, top=1.0 - 14.0 / height
    )


def _write_names(
    axes: Axes, lines: Sequence[Line], numbers: Mapping[str, int], height: float
) -> None:
    """Each name beside the end of its line, moved up or down where they would overlap."""
    low, high = axes.get_ylim()
    span = high - low
    if not (math.isfinite(span) and span > 0.0):
        return
    ends = [(line.y[-1] - low) / span for line in lines]
    gap = _NAME_GAP / (height * _INSIDE)
    names = short_names([line.style.name for line in lines])
    for line, text, end, at in zip(lines, names, ends, spread(ends, gap), strict=True):
        gid = group_name(numbers[line.style.name])
        (tie,) = axes.plot(
            [1.0, 1.025], [end, at], transform=axes.transAxes, color=line.style.colour,
            linewidth=1.4, clip_on=False,
        )  # fmt: skip
        tie.set_gid(gid)
        name = axes.text(
            1.035, at, text, transform=axes.transAxes, fontsize=_NAME_SIZE, va="center",
        )  # fmt: skip
        name.set_gid(gid)


def short_names(names: Sequence[str]) -> list[str]:
    """The names as they fit beside a line, told apart as they are.

    Of a long one the middle is left out. Where that leaves the same of two, they keep their
    beginning and what differs; the rest is left out.

    >>> short_names(["layersync-detach-block-3", "layersync-whole-block-3", "none"])
    ['lay…detach-bloc…', 'lay…whole-block…', 'none']
    """
    texts = [one_visible_line(name) for name in names]
    whole = list(dict.fromkeys(texts))
    shown = _told_apart(whole, {text: _without_middle(text) for text in whole})
    return [shown[text] for text in texts]


def _without_middle(text: str) -> str:
    if len(text) <= _LONGEST_NAME:
        return text
    half = _LONGEST_NAME // 2
    return f"{text[:half]}…{text[-(half - 1) :]}"


def _told_apart(texts: Sequence[str], shown: Mapping[str, str]) -> dict[str, str]:
    """The shown forms of these texts, changed where two have the same."""
    told = dict(shown)
    for form in {shown[text] for text in texts}:
        alike = [text for text in texts if shown[text] == form]
        if len(alike) > 1:
            columns = enumerate(zip(*alike, strict=False))
            ends = (place for place, letters in columns if len(set(letters)) > 1)
            start = next(ends, min(map(len, alike)))  # the place where they differ first
            told |= _told_apart(alike, {text: _from(text, start) for text in alike})
    return told


def _from(text: str, start: int) -> str:
    """Its beginning, and what it has from a place on."""
    kept = _LONGEST_NAME - _BEGINNING - 2  # of the two signs for what is left out
    end = "…" if len(text) > start + kept else ""
    return f"{text[:_BEGINNING]}…{text[start : start + kept]}{end}"


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The places moved as little as it takes for each to be `gap` from the next.

    >>> spread([0.5, 0.5, 0.9], 0.2)
    [0.4, 0.6, 0.9]
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    # Groups of neighbours that touch: sum of wanted lowest places, and how many.
    groups: list[tuple[float, int]] = []
    for index in order:
        total, count = places[index], 1
        while groups:
            before, number = groups[-1]
            if total / count - before / number >= number * gap:
                break
            groups.pop()
            total = before + total - count * number * gap
            count += number
        groups.append((total, count))
    moved = [0.0] * len(places)
    remaining = iter(order)
    for total, count in groups:
        for number in range(count):
            moved[next(remaining)] = round(total / count + number * gap, 12)
    return moved


def _readouts(
    axes: Axes, lines: Sequence[Line], numbers: Mapping[str, int], axis_title: str
) -> tuple[Readout, ...]:
    rows: dict[float, list[tuple[int, str]]] = {}
    for line in lines:
        for x, y, low, high in zip(line.x, line.y, line.low, line.high, strict=True):
            text = format_number(y)
            if low != high:
                text += f" ({format_number(low)} to {format_number(high)})"
            rows.setdefault(float(x), []).append((numbers[line.style.name], text))
    name = axis_title.split(" (")[0]
    return tuple(
        Readout(axes, x, None, f"{name} {format_number(x)}", tuple(found))
        for x, found in sorted(rows.items())
    )
