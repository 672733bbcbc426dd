"""The page of a sweep: Optuna's charts and the block choices, one file that needs no network."""

import itertools
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from alignlab.experiments.charts.chart import Chart
from alignlab.experiments.report.formatting import format_number
from alignlab.experiments.report.page import render
from alignlab.experiments.report.run_warnings import gather_warnings
from alignlab.experiments.sweep.charts import (
    Objective,
    block_chart,
    history_chart,
    importance_chart,
    pair_chart,
    parallel_chart,
    pareto_chart,
    slice_chart,
)
from alignlab.experiments.sweep.config import BlocksSpace
from alignlab.experiments.sweep.pruning import PRUNED_AT
from alignlab.experiments.sweep.space import distributions, own_params, value_of
from alignlab.experiments.sweep.study import SweepStudy, sweep_folder
from alignlab.experiments.sweep.trial import repeated
from alignlab.runs.atomic_files import write_text
from alignlab.runs.run_folder import RunFolder

FEW = 2  # charts of one trial show nothing
MOST_PAIRED = 3  # settings whose pairs are drawn: a panel for each pair


def write_page(study: SweepStudy, best: FrozenTrial | None) -> Path:
    """Writes `sweep.html` into the sweep's folder."""
    page = render(
        "sweep.html.j2",
        {"charts": sweep_charts(study)},
        [],
        name=study.config.name,
        verdict=_verdict(study, best),
        pruned=pruned_trials(study),
        warnings=trial_warnings(study),
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
    trials = study.trials(TrialState.COMPLETE)
    objectives = [
        Objective.of(metric.name, direction == StudyDirection.MAXIMIZE, trials, index)
        for index, (metric, direction) in enumerate(
            zip(study.config.metric, study.study.directions, strict=True)
        )
    ]
    drawn = []
    for index, objective in enumerate(objectives):
        if len(objective.trials) >= FEW:
            drawn += _metric_charts(study, index, objective)
    if len(objectives) in (2, 3) and len(trials) >= FEW:
        best = [trial.number for trial in study.study.best_trials]
        drawn.append(pareto_chart(objectives, trials, best))
    return drawn


def _metric_charts(study: SweepStudy, index: int, objective: Objective) -> list[Chart]:
    drawn = [history_chart(objective)]
    varied = _varied(objective.trials)
    if not varied:
        return drawn
    importances = _importances(study, index, varied)
    drawn.append(importance_chart(objective.name, importances))
    drawn.append(slice_chart(objective, varied))
    drawn.append(parallel_chart(objective, varied))
    if len(varied) > 1:
        drawn.append(pair_chart(objective, list(importances)[:MOST_PAIRED]))
    return drawn + _block_charts(study, objective)


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


def _varied(trials: Sequence[FrozenTrial]) -> list[str]:
    """Params with more than one value among the trials."""
    values: dict[str, set[Any]] = {}
    for trial in trials:
        for name, value in trial.params.items():
            values.setdefault(name, set()).add(value)
    return [name for name, seen in values.items() if len(seen) > 1]


def _block_charts(study: SweepStudy, objective: Objective) -> list[Chart]:
    drawn = []
    for key, parameter in study.config.space.items():
        if isinstance(parameter, BlocksSpace):
            cells = _block_cells(objective, key, parameter)
            blocks = range(parameter.first, parameter.last + 1)
            drawn.append(block_chart(f"{objective.name}: {key}", blocks, cells))
    return drawn


def _block_cells(
    objective: Objective, key: str, parameter: BlocksSpace
) -> dict[tuple[int, int], list[float]]:
    """The metric of the trials that chose both blocks, by pair."""
    cells: dict[tuple[int, int], list[float]] = {}
    for trial, value in zip(objective.trials, objective.values, strict=True):
        if distributions(key, parameter).keys() <= trial.params.keys():
            blocks = value_of(key, parameter, trial.params)
            for pair in itertools.product(blocks, blocks):
                cells.setdefault(pair, []).append(value)
    return cells


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
