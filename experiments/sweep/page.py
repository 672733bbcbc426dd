"""The page of a sweep: Optuna's charts and the block choices, one file that needs no network."""

import itertools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna.visualization as charts
import plotly.graph_objects as go
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from pydantic import JsonValue

from alignlab.experiments.report.charts import Chart, figures_of
from alignlab.experiments.report.formatting import format_number
from alignlab.experiments.report.page import render
from alignlab.experiments.report.run_warnings import gather_warnings
from alignlab.experiments.sweep.config import BlocksSpace
from alignlab.experiments.sweep.pruning import PRUNED_AT
from alignlab.experiments.sweep.space import distributions, own_params, value_of
from alignlab.experiments.sweep.study import SweepStudy, sweep_folder
from alignlab.experiments.sweep.trial import repeated
from alignlab.runs.atomic_files import write_text
from alignlab.runs.run_folder import RunFolder

FEW = 2  # charts of one trial show nothing
CONTOUR_PX = 195  # of a row of panels: less and names run into each other, more and no page holds 3
MOST_CONTOURS = 3  # params of a contour chart: it has a panel for each pair


def write_page(study: SweepStudy, best: FrozenTrial | None) -> Path:
    """Writes `sweep.html` into the sweep's folder."""
    shown = sweep_charts(study)
    page = render(
        "sweep.html.j2",
        figures_of({"chart": shown}),
        name=study.config.name,
        verdict=_verdict(study, best),
        pruned=pruned_trials(study),
        warnings=trial_warnings(study),
        charts=shown,
    )
    path = sweep_folder(study.config) / "sweep.html"
    write_text(path, page)
    return path


def pruned_trials(study: SweepStudy) -> str:
    """Which trials were pruned, and after how many steps; empty for none."""
    texts = [
        f"{trial.number} at step {trial.user_attrs[PRUNED_AT]:,}"
        for trial in study.trials(TrialState.PRUNED)
        if PRUNED_AT in trial.user_attrs  # not those of older versions
    ]
    return f"Pruned, by steps over their seeds: trial {', '.join(texts)}." if texts else ""


def trial_warnings(study: SweepStudy) -> dict[int, list[str]]:
    """What the runs of a trial gave warning of, by number, of those that lie on this machine."""
    texts_by_trial = {}
    for trial in study.trials():
        notes = {}
        for seed in study.config.seeds:
            name = f"trial-{trial.number:04d}/seed-{seed}"
            result = RunFolder(sweep_folder(study.config) / name).read_result()
            if result is not None:
                notes[seed] = result.get("notes", [])
        texts = gather_warnings(notes, len(study.config.seeds))
        if texts:
            texts_by_trial[trial.number] = texts
    return texts_by_trial


def sweep_charts(study: SweepStudy) -> list[Chart]:
    """Every chart that the finished trials have something for."""
    if len(study.trials(TrialState.COMPLETE)) < FEW:
        return []
    drawn = []
    for index, metric in enumerate(study.config.metric):
        drawn += _metric_charts(study, index, metric.name)
    if len(study.config.metric) in (2, 3):
        figure = charts.plot_pareto_front(study.study)
        reading = "Red trials: none is better in every metric."
        drawn.append(_chart("Pareto front", reading, figure))
    return drawn


def _metric_charts(study: SweepStudy, index: int, name: str) -> list[Chart]:
    several = len(study.config.metric) > 1

    def target(trial: FrozenTrial) -> float:
        return float(trial.values[index])

    shown: dict[str, Any] = {"target_name": name} | ({"target": target} if several else {})
    history = charts.plot_optimization_history(study.study, **shown)
    drawn = [_chart(f"{name}: history", "Every trial, and the best so far.", history)]
    varied = _varied(study)
    if not varied:
        return drawn
    importances = _importances(study, index, varied)
    bars = go.Figure(go.Bar(x=list(importances.values()), y=list(importances), orientation="h"))
    bars.update_yaxes(autorange="reversed")
    reading = "Share of each setting in what sets good trials apart (PED-ANOVA)."
    drawn.append(_chart(f"{name}: importance", reading, bars))
    plots: list[tuple[str, str, Callable[..., go.Figure], list[str]]] = [
        ("slice", "Each setting by itself.", charts.plot_slice, varied),
        ("parallel", "One line per trial.", charts.plot_parallel_coordinate, varied),
    ]
    if len(varied) > 1:
        most = list(importances)[:MOST_CONTOURS]
        plots.append(("contour", "Pairs of settings.", charts.plot_contour, most))
    for kind, reading, draw, params in plots:
        figure = draw(study.study, params=params, **shown)
        if kind == "contour" and len(params) > 2:  # two make one panel, three a panel per pair
            figure.update_layout(height=CONTOUR_PX * len(params))
        drawn.append(_chart(f"{name}: {kind}", reading, figure))
    return drawn + _block_charts(study, index, name)


def _importances(study: SweepStudy, index: int, varied: list[str]) -> dict[str, float]:
    maximized = study.study.directions[index] == StudyDirection.MAXIMIZE
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="PedAnova.*to achieve low")  # as it is done here
        warnings.filterwarnings("ignore", message="Target and region quantiles")  # equal trials
        return get_param_importances(
            study.study,
            evaluator=PedAnovaImportanceEvaluator(),
            params=varied,
            target=lambda trial: -trial.values[index] if maximized else trial.values[index],
        )


def _varied(study: SweepStudy) -> list[str]:
    """Params with more than one value among the finished trials."""
    values: dict[str, set[Any]] = {}
    for trial in study.trials(TrialState.COMPLETE):
        for name, value in trial.params.items():
            values.setdefault(name, set()).add(value)
    return [name for name, seen in values.items() if len(seen) > 1]


def _block_charts(study: SweepStudy, index: int, name: str) -> list[Chart]:
    drawn = []
    for key, parameter in study.config.space.items():
        if isinstance(parameter, BlocksSpace):
            reading = "Mean over the trials that chose both blocks; the diagonal: that block."
            figure = _block_map(study, key, parameter, index)
            drawn.append(_chart(f"{name}: {key}", reading, figure))
    return drawn


def _block_map(study: SweepStudy, key: str, parameter: BlocksSpace, index: int) -> go.Figure:
    cells: dict[tuple[int, int], list[float]] = {}
    for trial in study.trials(TrialState.COMPLETE):
        if distributions(key, parameter).keys() <= trial.params.keys():
            blocks = value_of(key, parameter, trial.params)
            for pair in itertools.product(blocks, blocks):
                cells.setdefault(pair, []).append(trial.values[index])
    axis = range(parameter.first, parameter.last + 1)
    names = [f"block {b} (depth {b + 1})" for b in axis]
    rows = [[cells.get((a, b), []) for b in axis] for a in axis]
    figure = go.Figure(
        go.Heatmap(
            z=[[fmean(values) if values else None for values in row] for row in rows],
            text=[[f"{len(v)} trial{'s' * (len(v) != 1)}" for v in row] for row in rows],
            x=names,
            y=names,
            colorscale="Viridis",
            hovertemplate="%{y}, %{x}: %{z:.4g} (%{text})<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed")
    return figure


def _verdict(study: SweepStudy, best: FrozenTrial | None) -> str:
    if best is None:
        return "No trial finished within the constraints."
    parts = []
    first, own = study.trials()[0], own_params(study.config)
    for metric, value, own_value in zip(
        study.config.metric, best.values, first.values or [math.nan] * 9, strict=False
    ):
        has_own = first.state == TrialState.COMPLETE and first.params == own
        against = f" (the recipe's own settings: {format_number(own_value)})" if has_own else ""
        parts.append(f"{metric.name} {format_number(value)}{against}")
    return (
        f"Trial {best.number} is the best of {len(study.trials(TrialState.COMPLETE))} finished "
        f"ones: {', '.join(parts)}{repeated(study)}. The best of many trials looks better than "
        "it is: train best.yaml with other seeds before believing it."
    )


def _chart(title: str, reading: str, figure: go.Figure) -> Chart:
    """The figure as plotly.js reads it, as wide as the page; Optuna gives some a width."""
    figure.update_layout(template="plotly_white", title=None, margin={"t": 30}, width=None)
    drawn: JsonValue = json.loads(figure.to_json())
    return Chart(title, reading, drawn)
