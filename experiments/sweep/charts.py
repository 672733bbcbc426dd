"""Charts of a sweep's page: how the trials went, what matters, and each setting by itself.

They draw the finished trials and nothing between them.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from alignlab.experiments.charts.chart import HEIGHT, WIDTH, Chart, Readout, look, new_figure
from alignlab.experiments.charts.lines import is_drawn, short_names
from alignlab.experiments.charts.look import BASELINE_COLOUR, COLOURS, RULE
from alignlab.experiments.report.escaping import one_visible_line
from alignlab.experiments.report.formatting import format_number

_COLUMNS = 3  # of panels in one row
_COLOUR_MAP = "viridis"


@dataclass(frozen=True)
class Objective:
    """A metric of the sweep, of the trials that finished.

    Args:
        name: of the metric.
        maximized: whether more is better.
        trials: those with a number that can be drawn.
        values: of these trials.
    """

    name: str
    maximized: bool
    trials: Sequence[FrozenTrial]
    values: Sequence[float]

    @classmethod
    def of(
        cls, name: str, maximized: bool, trials: Sequence[FrozenTrial], index: int
    ) -> "Objective":
        """The metric number `index` of the trials."""
        drawn = [trial for trial in trials if is_drawn(trial.values[index])]
        return cls(name, maximized, drawn, [float(trial.values[index]) for trial in drawn])


def history_chart(objective: Objective) -> Chart:
    """Every trial in its order, and the best so far."""
    numbers = [trial.number for trial in objective.trials]
    best = list(itertools.accumulate(objective.values, max if objective.maximized else min))
    with look():
        figure = new_figure()
        axes = figure.subplots()
        axes.step(numbers, best, where="post", color=COLOURS[1], label="best so far")
        axes.plot(numbers, objective.values, "o", color=COLOURS[0], markersize=5, label="trial")
        axes.set_xlabel("trial")
        axes.set_ylabel(one_visible_line(objective.name))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.legend(frameon=False, fontsize=9.0)
    return Chart(
        f"{objective.name}: history", "every trial, and the best so far", figure,
        _trial_readouts(axes, objective, [float(number) for number in numbers], objective.values),
    )  # fmt: skip


def importance_chart(name: str, importances: Mapping[str, float]) -> Chart:
    """Share of each setting in what sets good trials apart."""
    with look():
        figure = new_figure(height=60.0 + 24.0 * len(importances))
        axes = figure.subplots()
        shares = list(importances.values())
        axes.hlines(range(len(shares)), 0.0, shares, color=COLOURS[0], linewidth=12.0)
        axes.set_xlim(left=0.0)
        axes.set_yticks(range(len(shares)), [_label(param) for param in importances])
        axes.set_ylim(len(shares) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("share")
        readouts = tuple(
            Readout(axes, None, float(place), param, ((-1, format_number(share)),))
            for place, (param, share) in enumerate(importances.items())
        )
    words = "share of each setting in what sets good trials apart (PED-ANOVA)"
    return Chart(f"{name}: importance", words, figure, readouts)


def slice_chart(objective: Objective, params: Sequence[str]) -> Chart:
    """The metric against each setting by itself; darker trials are later ones."""
    figure, places = _panels(len(params))
    readouts: list[Readout] = []
    with look():
        for axes, param in zip(places, params, strict=False):
            scale = Scale.of(objective.trials, param)
            shown = _having(objective, param)
            x = [scale.place(trial.params[param]) for trial in shown.trials]
            axes.scatter(
                x, shown.values, c=[trial.number for trial in shown.trials], cmap="Blues",
                vmin=-max(1, len(shown.trials)), s=26.0, edgecolors=RULE, linewidths=0.5,
            )  # fmt: skip
            scale.draw(axes, "x")
            axes.set_xlabel(_label(param))
            readouts += _trial_readouts(axes, shown, x, shown.values)
        places[0].set_ylabel(one_visible_line(objective.name))
    words = "each setting by itself; darker: later trials"
    return Chart(f"{objective.name}: slice", words, figure, tuple(readouts))


def pair_chart(objective: Objective, params: Sequence[str]) -> Chart:
    """Pairs of settings, a trial's colour its metric."""
    pairs = list(itertools.combinations(params, 2))
    figure, places = _panels(len(pairs))
    readouts: list[Readout] = []
    with look():
        norm = _norm(objective.values)
        for axes, (across, up) in zip(places, pairs, strict=False):
            shown = _having(objective, across, up)
            scales = [Scale.of(objective.trials, param) for param in (across, up)]
            x, y = (
                [scale.place(trial.params[param]) for trial in shown.trials]
                for scale, param in zip(scales, (across, up), strict=True)
            )
            axes.scatter(
                x, y, c=shown.values, cmap=_COLOUR_MAP, norm=norm, s=34.0, edgecolors=RULE,
                linewidths=0.5,
            )  # fmt: skip
            scales[0].draw(axes, "x")
            scales[1].draw(axes, "y")
            axes.set_xlabel(_label(across))
            axes.set_ylabel(_label(up))
            readouts += _trial_readouts(axes, shown, x, y)
        _colour_bar(figure, places, norm, objective.name)
    words = "pairs of the most important settings; colour: the metric"
    return Chart(f"{objective.name}: pairs", words, figure, tuple(readouts))


def parallel_chart(objective: Objective, params: Sequence[str]) -> Chart:
    """One line per trial through its metric and its settings, coloured by the metric."""
    shown = _having(objective, *params)
    with look():
        figure = new_figure(WIDTH * 2.0, HEIGHT)
        axes = figure.subplots()
        norm = _norm(objective.values)
        colours = matplotlib.colormaps[_COLOUR_MAP]
        scales = [Scale.of(shown.trials, param) for param in params]
        ends = [(min(shown.values), max(shown.values)), *(scale.ends() for scale in scales)]
        for trial, value in zip(shown.trials, shown.values, strict=True):
            own = [value, *(s.axis(trial.params[p]) for s, p in zip(scales, params, strict=True))]
            heights = [_share(v, low, high) for v, (low, high) in zip(own, ends, strict=True)]
            axes.plot(range(len(own)), heights, color=colours(norm(value)), linewidth=1.1)
        texts = [
            (format_number(ends[0][0]), format_number(ends[0][1])),
            *(scale.end_texts() for scale in scales),
        ]
        for place, (low, high) in enumerate(texts):
            axes.axvline(place, color=RULE, linewidth=0.8)
            axes.text(place, -0.04, low, ha="center", va="top", fontsize=8.5)
            axes.text(place, 1.04, high, ha="center", va="bottom", fontsize=8.5)
        names = [objective.name, *params]
        axes.set_xticks(range(len(names)), [f"\n{_label(name)}" for name in names])
        axes.set_yticks([])
        axes.set_ylim(-0.12, 1.12)
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0.0)
        _colour_bar(figure, [axes], norm, objective.name)
    return Chart(f"{objective.name}: parallel", "one line per trial", figure)


def pareto_chart(
    objectives: Sequence[Objective], trials: Sequence[FrozenTrial], best: Sequence[int]
) -> Chart:
    """Trials by two metrics, a panel for each pair; those that none beats stand out.

    Args:
        objectives: the metrics, two or three.
        trials: the finished ones.
        best: numbers of those that none beats.
    """
    pairs = list(itertools.combinations(range(len(objectives)), 2))
    figure, places = _panels(len(pairs))
    readouts: list[Readout] = []
    with look():
        for axes, (across, up) in zip(places, pairs, strict=False):
            for trial in trials:
                x, y = trial.values[across], trial.values[up]
                if not (is_drawn(x) and is_drawn(y)):
                    continue
                is_best = trial.number in best
                axes.plot(
                    [x], [y], "D" if is_best else "o", markersize=7.0 if is_best else 5.0,
                    color=COLOURS[1] if is_best else BASELINE_COLOUR,
                )  # fmt: skip
                texts = (
                    f"{objectives[i].name} {format_number(trial.values[i])}" for i in (across, up)
                )
                rows = tuple((-1, text) for text in texts)
                readouts.append(Readout(axes, x, y, f"trial {trial.number}", rows))
            axes.set_xlabel(_with_side(objectives[across]))
            axes.set_ylabel(_with_side(objectives[up]))
    words = "diamonds: no trial is better in every metric"
    return Chart("Pareto front", words, figure, tuple(readouts))


def block_chart(
    title: str, blocks: Sequence[int], cells: Mapping[tuple[int, int], Sequence[float]]
) -> Chart:
    """Mean metric of the trials that chose both blocks; the diagonal: of those with that block."""
    rows = [[cells.get((a, b), ()) for b in blocks] for a in blocks]
    array = np.array([[fmean(v) if v else math.nan for v in row] for row in rows], dtype=float)
    names = [str(block) for block in blocks]
    with look():
        side = max(WIDTH, 70.0 + 24.0 * len(blocks))
        figure = new_figure(side, side * 0.85)
        axes = figure.subplots()
        image = axes.pcolormesh(array, cmap=_COLOUR_MAP, edgecolors="#fefefe", linewidth=1.0)
        figure.colorbar(image, ax=axes, pad=0.02, aspect=30).outline.set_visible(False)
        middles = [place + 0.5 for place in range(len(blocks))]
        axes.set_xticks(middles, names)
        axes.set_yticks(middles, names)
        axes.set_xlabel("block (its output)")
        axes.set_ylabel("block (its output)")
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
        readouts = tuple(
            Readout(
                axes, middles[j], middles[i], f"blocks {names[i]} and {names[j]}",
                ((-1, f"{format_number(fmean(found))} ({_counted(len(found))})"),),
            )
            for i, row in enumerate(rows)
            for j, found in enumerate(row)
            if found
        )  # fmt: skip
    words = "mean over the trials that chose both blocks; the diagonal: that block"
    return Chart(title, words, figure, readouts)


@dataclass(frozen=True)
class Scale:
    """How the values of one setting lie on an axis.

    Args:
        choices: the values in their order where they are no numbers, else None.
        log: whether a number's logarithm is drawn.
        values: of the trials.
    """

    choices: tuple[Any, ...] | None
    log: bool
    values: tuple[Any, ...]

    @classmethod
    def of(cls, trials: Sequence[FrozenTrial], param: str) -> "Scale":
        """The scale of what these trials have."""
        having = [trial for trial in trials if param in trial.params]
        values = tuple(trial.params[param] for trial in having)
        distribution = having[0].distributions[param]
        if isinstance(distribution, FloatDistribution | IntDistribution):
            return cls(None, distribution.log, values)
        return cls(tuple(sorted(set(values), key=str)), False, values)

    def place(self, value: Any) -> float:
        """Where a value is drawn, in the axis's own units."""
        return float(value) if self.choices is None else float(self.choices.index(value))

    def axis(self, value: Any) -> float:
        """The same on a linear axis."""
        return math.log10(value) if self.log else self.place(value)

    @property
    def choice_names(self) -> list[str]:
        """The choices as an axis has room for them; none of numbers."""
        return short_names([str(choice) for choice in self.choices or ()])

    def ends(self) -> tuple[float, float]:
        """Lowest and highest place of the values on a linear axis."""
        places = [self.axis(value) for value in self.values]
        return min(places), max(places)

    def end_texts(self) -> tuple[str, str]:
        """Those values as text."""
        ordered = sorted(self.values, key=self.axis)
        low, high = (
            format_number(float(v))
            if self.choices is None
            else self.choice_names[self.choices.index(v)]
            for v in (ordered[0], ordered[-1])
        )
        return low, high

    def draw(self, axes: Axes, which: str) -> None:
        """Sets up one axis, "x" or "y"."""
        if self.choices is not None:
            ticks: Callable[..., Any] = getattr(axes, f"set_{which}ticks")
            ticks(range(len(self.choices)), self.choice_names)
            getattr(axes, f"set_{which}lim")(-0.5, len(self.choices) - 0.5)
            return
        axis = axes.xaxis if which == "x" else axes.yaxis
        is_whole = all(float(value).is_integer() for value in self.values)
        axis.set_major_locator(MaxNLocator(5, integer=is_whole))
        if self.log:
            getattr(axes, f"set_{which}scale")("log")
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, _COLUMNS)
    rows = math.ceil(count / columns)
    with look():
        wide = WIDTH * (1.0 if columns == 1 else 0.82 * columns)
        figure = new_figure(wide, HEIGHT * 0.95 * rows)
        places = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes in places[count:]:
            axes.remove()
    return figure, places[:count]


def _having(objective: Objective, *params: str) -> Objective:
    """The trials that have all of these settings."""
    kept = [
        (trial, value)
        for trial, value in zip(objective.trials, objective.values, strict=True)
        if all(param in trial.params for param in params)
    ]
    return Objective(
        objective.name, objective.maximized, [t for t, _ in kept], [v for _, v in kept]
    )


def _trial_readouts(
    axes: Axes, objective: Objective, x: Sequence[float], y: Sequence[float]
) -> tuple[Readout, ...]:
    readouts = []
    for trial, value, across, up in zip(objective.trials, objective.values, x, y, strict=True):
        settings = tuple((-1, f"{_label(name)} {_value(v)}") for name, v in trial.params.items())
        rows = ((-1, f"{objective.name} {format_number(value)}"), *settings)
        readouts.append(Readout(axes, across, up, f"trial {trial.number}", rows))
    return tuple(readouts)


def _value(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return format_number(float(value)) if is_number else str(value)


def _norm(values: Sequence[float]) -> Normalize:
    return Normalize(min(values), max(values))


def _colour_bar(figure: Figure, places: Sequence[Axes], norm: Normalize, name: str) -> None:
    bar = figure.colorbar(ScalarMappable(norm, _COLOUR_MAP), ax=list(places), pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.set_label(one_visible_line(name))


def _share(value: float, low: float, high: float) -> float:
    return 0.5 if high == low else (value - low) / (high - low)


def _with_side(objective: Objective) -> str:
    return one_visible_line(f"{objective.name} {'↑' if objective.maximized else '↓'}")


def _label(param: str) -> str:
    """The last two parts of a setting's name, which is what tells them apart."""
    return one_visible_line(".".join(param.split(".")[-2:]))


def _counted(count: int) -> str:
    return f"{count} trial{'s' if count != 1 else ''}"
