"""Metrics of runs that were evaluated while they trained, by step: what is shown, and as text."""

import csv
import io
from functools import partial

from alignlab.experiments.compare.result import Comparison, Curve
from alignlab.experiments.report.escaping import csv_cell
from alignlab.experiments.report.formatting import DASH, format_spread
from alignlab.experiments.report.metric_table import split_name
from alignlab.experiments.report.summary import joined, place_of, spread_of

MOST_STEPS = 8  # columns of the Markdown table

# Real clips, and what guessing would reach: no trained weight moves them.
_UNMOVED = ("gen_real/", "teacher_retrieval_chance")

Curves = dict[tuple[str, int], Curve]
"""By variant and seed, each as (step, value)."""


def shown_by_step(comparison: Comparison) -> dict[str, Curves]:
    """Curves by metric, in the order of the summary table.

    Of metrics with parts (blocks, bins of the timestep) the whole is shown. Left out is what no
    trained weight moves.
    """
    names = {name for run in comparison.results for name in run.measured if _is_shown(name)}
    ordered = sorted(names, key=partial(place_of, comparison))
    return {name: curves_of(comparison, name) for name in ordered}


def curves_of(comparison: Comparison, name: str) -> Curves:
    """The curves of one metric, of the runs that measured it while they trained."""
    runs = [run for run in comparison.results if name in run.measured]
    return {(run.variant, run.seed): run.measured[name] for run in runs}


def steps_csv(comparison: Comparison) -> str:
    """Every number that was measured at a step, one line each, in full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("metric", "variant", "seed", "step", "value"))
    names = {name for run in comparison.results for name in run.measured}
    for name in sorted(names, key=partial(place_of, comparison)):
        for run in comparison.results:
            for step, value in run.measured.get(name, ()):
                writer.writerow(map(csv_cell, (name, run.variant, run.seed, step, value)))
    return text.getvalue()


def step_table(comparison: Comparison) -> tuple[list[int], list[tuple[str, str, list[str]]]]:
    """Steps, at most eight, and label, variant and numbers at these steps of headline metrics."""
    curves_by_name = shown_by_step(comparison).items()
    shown = {name: c for name, c in curves_by_name if comparison.quantity(name).headline}
    steps = sorted({step for curves in shown.values() for c in curves.values() for step, _ in c})
    steps = _thinned(steps)
    rows = []
    for name, curves in shown.items():
        for variant in comparison.variants:
            own = [dict(curve) for (v, _), curve in curves.items() if v == variant]
            texts = [_text([by_step[s] for by_step in own if s in by_step]) for s in steps]
            rows.append((comparison.quantity(name).label, variant, texts))
    return steps, rows


def _is_shown(name: str) -> bool:
    return split_name(name)[1] in ("", "mean") and not name.startswith(_UNMOVED)


def _thinned(steps: list[int]) -> list[int]:
    """Evenly chosen among all evaluations, the last one included."""
    if len(steps) <= MOST_STEPS:
        return steps
    places = {round((i + 1) * len(steps) / MOST_STEPS) - 1 for i in range(MOST_STEPS)}
    return [steps[place] for place in sorted(places)]


def _text(values: list[float]) -> str:
    mean, std = spread_of(values)
    return DASH if mean is None else joined(format_spread(mean, std))
