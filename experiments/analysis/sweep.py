"""A sweep as data: its trials, their numbers by seed, and the best."""

import os
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from alignlab.config.paths import sqlite_url, user_path
from alignlab.errors import UserError
from alignlab.experiments.analysis.tidy import PARTS, check_folder, frame, parts_of, with_floats
from alignlab.experiments.sweep.config import SweepConfig
from alignlab.experiments.sweep.config import load_sweep as load_recipe
from alignlab.experiments.sweep.results import (
    best_trial,
    measured_metrics,
    pareto,
    trial_cells,
    trial_columns,
    trial_values,
)
from alignlab.experiments.sweep.study import METRICS, SweepStudy, read_study
from alignlab.runs.run_folder import output_of

COLUMNS = ("trial", "seed", "metric", *PARTS, "value")


def load_sweep(path: str | os.PathLike[str]) -> "SweepData":
    """The trials of a sweep, finished or not, as its storage holds them.

    `alignlab.experiments.sweep.config.load_sweep` is another function: it reads a recipe.

    Args:
        path: the sweep's folder, such as `runs/sweep_refalign`.

    Raises:
        UserError: there is no sweep, its recipe or its storage is damaged, or the storage cannot
            be reached.
    """
    folder = user_path(str(path))
    check_folder(folder, "load_sweep")
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        raise UserError(f"{folder}: no sweep there (its folder has a recipe.yaml)")
    config = load_recipe(recipe, stored=True)
    # the folder may lie elsewhere now
    moved: dict[str, Any] = {
        "base": config.base.model_copy(update={"output": str(output_of(folder, config.name))})
    }
    if config.storage is None:
        moved["storage"] = sqlite_url((folder / "study.db").resolve())
    config = config.model_copy(update=moved)
    fix = "its trials are in that storage, and a table of them may be in trials.csv"
    return SweepData(folder, config, read_study(config, fix))


@dataclass(frozen=True)
class BestTrial:
    """A trial that is best.

    Args:
        number: of the trial.
        values: of the settings that were searched, by dotted key.
        metrics: means over its seeds, by name.
    """

    number: int
    values: dict[str, Any]
    metrics: dict[str, float]


@dataclass(frozen=True)
class SweepData:
    """The trials of a sweep. Every method reads the storage anew: a sweep may still run.

    Args:
        folder: where it lies; `best.yaml` in it is the best trial's recipe.
        config: its recipe, resolved.
        study: what Optuna knows of it; `study.study` is Optuna's own object.
    """

    folder: Path
    config: SweepConfig
    study: SweepStudy

    def to_frame(self) -> pd.DataFrame:
        """One row per trial: the columns of trials.csv, and `num_seeds`, the seeds it trained.

        These are `trial`, `state` ("complete", "pruned", "fail", "running", "waiting"),
        `feasible`, one column per searched setting, one per metric with its mean over the seeds,
        `same_as`, `folder`, `pruned_at` and `error`. What a trial does not have is missing (NaN,
        None, <NA>).
        """
        names = measured_metrics(self.study)
        columns = trial_columns(self.study, names)
        trials = self.study.trials()
        made = frame((trial_cells(self.study, trial, names) for trial in trials), columns)
        seeds = [max(map(len, t.user_attrs.get(METRICS, {}).values()), default=0) for t in trials]
        return with_floats(made, names).assign(num_seeds=pd.array(seeds, dtype="Int64"))

    def seeds_frame(self) -> pd.DataFrame:
        """Every number of every trial, one a row.

        Returns:
            A frame with the columns `trial`, `seed`, `metric`, `quantity`, `block`, `noise_bin`
            (as `ComparisonData.to_frame` has them) and `value`.
        """
        rows = (
            (trial.number, seed, metric, *parts_of(metric), value)
            for trial in self.study.trials()
            for metric, values in trial.user_attrs.get(METRICS, {}).items()
            for seed, value in zip(self.config.seeds, values, strict=False)
        )
        return frame(rows, COLUMNS)

    @property
    def best(self) -> BestTrial | None:
        """The best finished trial within all constraints by the first metric, if there is one."""
        trial = best_trial(self.study)
        if trial is None:
            return None
        metrics = {name: fmean(values) for name, values in trial.user_attrs[METRICS].items()}
        return BestTrial(trial.number, trial_values(self.study, trial), metrics)

    @property
    def pareto(self) -> list[int]:
        """Numbers of the trials that no other trial beats in every metric."""
        return sorted(pareto(self.study))
