"""The look of every chart: colours, markers and dashes of what is compared, and the paper.

A chart is drawn in the colours of a white page. On a page, which may be dark, each is a variable of
the style sheet (`page_colours`), so that one drawing serves both.

The eight colours were found by a random search near eight hues: each has a contrast of 3:1 or more
to its paper (#ffffff, #14171c), and the nearest two, the baseline's grey among them, are 20 or more
apart (CIE76) to normal vision and to full protanopia, deuteranopia and tritanopia as Machado et al.
(2009) simulate them. In grey, and beyond eight, marker, dash and the label at a line's end tell
what colour does not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.markers import MarkerStyle
from matplotlib.path import Path

PAPERS = ("#ffffff", "#14171c")
INK, SOFT, GRID, RULE = "#374151", "#5f6876", "#e5e7eb", "#9ca3af"
SHADE, PAPER = "#e3e6eb", "#ffffff"
COLOURS = ("#3f77f3", "#cf821b", "#1ea55f", "#5b0543", "#625a05", "#3f1289", "#3e2312", "#5632f3")
DARK_COLOURS = (
    *("#73a3fa", "#eb550d", "#a2f9cf", "#ab465c"),
    *("#faf96d", "#4056e1", "#cea570", "#a042a1"),
)
BASELINE_COLOUR, DARK_BASELINE = "#6b7280", "#9aa2af"
MARKERS = ("o", "s", "D", "^", "X", "v", "P", "*")
# On and off in widths of the line.
DASHES: tuple[tuple[float, ...], ...] = ((), (4.0, 1.6), (1.2, 1.4), (6.0, 1.6, 1.2, 1.6))

RC: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "alignlab",  # the same figure gives the same file
    "pdf.fonttype": 42,
    "text.parse_math": False,  # a dollar sign is one
    "font.size": 10.0,
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "lines.linewidth": 1.7,
    "figure.dpi": 72.0,  # a unit of the figure is a point of the SVG
}


@dataclass(frozen=True)
class Style:
    """How one of several things is drawn in every chart.

    Args:
        name: of a variant, or of what else is told apart.
        place: among the others, from 0; None: the baseline.
    """

    name: str
    place: int | None

    @property
    def colour(self) -> str:
        """On white paper."""
        return BASELINE_COLOUR if self.place is None else COLOURS[self.place % len(COLOURS)]

    @property
    def variable(self) -> str:
        """The colour as a page's style sheet names it."""
        return "--base" if self.place is None else f"--c{self.place % len(COLOURS)}"

    @property
    def dash(self) -> tuple[float, ...]:
        """On and off in widths of the line; empty: solid."""
        if self.place is None:
            return ()
        return DASHES[(self.place + self.place // len(COLOURS)) % len(DASHES)]

    @property
    def line(self) -> Any:
        """The dash as matplotlib's `linestyle`."""
        return (0, self.dash) if self.dash else "solid"

    @property
    def marker(self) -> str:
        """Of matplotlib; the baseline's is drawn hollow."""
        return "o" if self.place is None else MARKERS[self.place % len(MARKERS)]

    @property
    def face(self) -> str:
        """Inside of the marker."""
        return PAPER if self.place is None else self.colour


def styles(names: Sequence[str], baseline: str | None = None) -> dict[str, Style]:
    """A style for each name, in their order; the baseline's is grey and takes no place."""
    others = [name for name in names if name != baseline]
    places = {name: place for place, name in enumerate(others)}
    return {name: Style(name, places.get(name)) for name in names}


def page_colours() -> dict[str, tuple[str, str]]:
    """Variables of the style sheet: each colour on white and on the dark paper."""
    pairs = zip(COLOURS, DARK_COLOURS, strict=True)
    named = {f"--c{place}": pair for place, pair in enumerate(pairs)}
    return named | {"--base": (BASELINE_COLOUR, DARK_BASELINE)}


def drawn_variables() -> Mapping[str, str]:
    """The variable that stands for each colour of a drawing, by colour."""
    own = {
        INK: "--ink",
        SOFT: "--soft",
        GRID: "--line",
        RULE: "--rule",
        SHADE: "--shade",
        PAPER: "--paper",
    }
    return own | {light: name for name, (light, _) in page_colours().items()}


def swatch(style: Style) -> str:
    """Line and marker of a style as a small SVG, for legends in HTML."""
    marker = MarkerStyle(style.marker)
    path = marker.get_path().transformed(marker.get_transform())
    fill = "--paper" if style.place is None else style.variable
    dash = " ".join(f"{2 * part:g}" for part in style.dash)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        '<svg class="swatch" viewBox="0 0 28 10" aria-hidden="true">'
        f'<path d="M0 5H28" stroke="var({style.variable})" stroke-width="2"{dashes}/>'
        f'<path transform="translate(14 5) scale(6.5 -6.5)" d="{_drawn(path)}" '
        f'fill="var({fill})" stroke="var({style.variable})" stroke-width=".22"/></svg>'
    )


def _drawn(path: Path) -> str:
    """The path as SVG writes it."""
    letters = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C"}
    parts = []
    for points, code in path.iter_segments(curves=True, simplify=False):
        if code == Path.CLOSEPOLY:
            parts.append("Z")
        else:
            numbers = " ".join(f"{value:.3g}" for value in points)
            parts.append(f"{letters[Path.code_type(code)]}{numbers}")
    return "".join(parts)
