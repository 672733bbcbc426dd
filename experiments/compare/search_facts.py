"""What the sweeps of a comparison's variants searched and found, for its report.

How much was spent on them, by which variants are refused that were not tuned alike, is in
`fairness.tuning_facts`.
"""

import csv
import math
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from alignlab.config.paths import user_path
from alignlab.errors import one_line
from alignlab.experiments.compare.config import CompareConfig
from alignlab.experiments.compare.result import (
    TUNED,
    TUNED_BEST,
    TUNED_BORDER,
    TUNED_DIRECTION,
    TUNED_HISTORY,
    TUNED_SPACE,
)
from alignlab.experiments.compare.tuned import SWEEP_AGAIN, sweep_recipe
from alignlab.experiments.sweep.borders import border, shown_range
from alignlab.experiments.sweep.config import SweepConfig, load_sweep
from alignlab.experiments.sweep.metrics import directions
from alignlab.experiments.sweep.space import setting_of
from alignlab.recipe import load_run
from alignlab.runs.checksums import DamagedError


def search_facts(config: CompareConfig) -> dict[str, dict[str, JsonValue]]:
    """The facts `TUNED` by variant, None for one without a sweep; empty if none has a sweep.

    Of several metrics the history is of the first, by which the best was chosen.

    Raises:
        UserError: a file of a sweep cannot be read.
    """
    found = {v: _found(v, tuning.sweep) for v, tuning in config.tuned.items()}
    if not found:
        return {}
    return {
        name: {v: found[v][name] if v in found else None for v in config.variants} for name in TUNED
    }


def _found(variant: str, source: str) -> dict[str, JsonValue]:
    sweep = load_sweep(sweep_recipe(variant, source), stored=True)
    run = load_run(source, stored=True)
    best = {key: setting_of(run, key) for key in sweep.space}
    ends = {key: border(sweep, key, value) for key, value in best.items()}
    return {
        TUNED_SPACE: {key: shown_range(parameter) for key, parameter in sweep.space.items()},
        TUNED_BEST: best,
        TUNED_BORDER: {key: end for key, end in ends.items() if end is not None},
        TUNED_HISTORY: _history(user_path(source).with_name("trials.csv"), sweep),
        TUNED_DIRECTION: directions(sweep)[0],
    }


def _history(trials: Path, sweep: SweepConfig) -> list[JsonValue]:
    metric, points = sweep.metric[0].name, list[JsonValue]()
    try:
        with trials.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["state"] == "complete" and row["feasible"] != "False":
                    points.append([int(row["trial"]), _finite(row[metric])])
    except (KeyError, ValueError, csv.Error) as error:
        raise DamagedError(trials, f"no table of trials: {one_line(error)}", SWEEP_AGAIN) from error
    return points


def _finite(text: Any) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number of a finished trial")
    return value
