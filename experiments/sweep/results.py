"""The results of a sweep: `best.yaml`, `trials.csv`, a table on the terminal, and the charts."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignlab.config.paths import user_path
from alignlab.config.run import RunConfig
from alignlab.environment import read_environment
from alignlab.experiments.report.escaping import csv_cell, one_visible_line
from alignlab.experiments.report.formatting import format_number
from alignlab.experiments.sweep.pruning import PRUNED_AT
from alignlab.experiments.sweep.space import distributions, value_of
from alignlab.experiments.sweep.study import METRICS, SAME_AS, SweepStudy, sweep_folder
from alignlab.experiments.sweep.trial import (
    ERROR,
    repeated,
    trained_as,
    trial_run,
)
from alignlab.recipe import dump
from alignlab.runs.atomic_files import write_text
from alignlab.runs.checksums import forget_checksums, write_checksums
from alignlab.runs.file_lock import file_lock

OUTPUTS = ("recipe.yaml", "inputs.json", "study.db", "trials.csv", "best.yaml", "sweep.html")
SHOWN_TRIALS = 10


def write_results(study: SweepStudy) -> Path:
    """Writes `best.yaml`, `trials.csv` and `sweep.html` into the sweep's folder; returns the last.

    A sweep without any finished, feasible trial has no `best.yaml`; one of an earlier, shorter
    sweep is removed.
    """
    folder = sweep_folder(study.config)
    waiting = f"waiting for the process that writes {folder}"
    with file_lock(folder / ".report.lock", waiting=lambda: waiting):  # workers may end at once
        return _written(study, folder)


def _written(study: SweepStudy, folder: Path) -> Path:
    # Here: charts take seconds to import, and a worker that joins writes none.
    from alignlab.experiments.sweep.page import write_page

    forget_checksums(folder)
    write_text(folder / "trials.csv", trials_csv(study))
    best = best_trial(study)
    if best is None:
        (folder / "best.yaml").unlink(missing_ok=True)
    else:
        write_text(folder / "best.yaml", best_recipe(study, best))
    page = write_page(study, best)
    write_checksums(folder, [name for name in OUTPUTS if (folder / name).is_file()])
    return page


def ranked(study: SweepStudy) -> list[FrozenTrial]:
    """Finished trials within all constraints, the best by the first metric first."""
    sign = -1.0 if study.study.directions[0] == StudyDirection.MAXIMIZE else 1.0
    kept = [
        trial
        for trial in study.trials(TrialState.COMPLETE)
        if all(excess <= 0 for excess in trial.constraints.values())
    ]
    return sorted(kept, key=lambda trial: (sign * trial.values[0], trial.number))


def best_trial(study: SweepStudy) -> FrozenTrial | None:
    """The best by the first metric; with several metrics, one end of the Pareto front."""
    return next(iter(ranked(study)), None)


def best_metrics(study: SweepStudy) -> dict[str, float]:
    """The best trial's metrics, means over its seeds."""
    best = best_trial(study)
    metrics: dict[str, list[float]] = {} if best is None else best.user_attrs[METRICS]
    return {name: fmean(values) for name, values in metrics.items()}


def trial_values(study: SweepStudy, trial: FrozenTrial) -> dict[str, Any]:
    """A trial's recipe values by dotted key; those that it has not drawn are left out."""
    return {
        key: value_of(key, parameter, trial.params)
        for key, parameter in study.config.space.items()
        if distributions(key, parameter).keys() <= trial.params.keys()
    }


def best_recipe(study: SweepStudy, trial: FrozenTrial) -> str:
    """The run of the trial's first seed as YAML under a name of its own.

    Every setting is the trial's, so that training it again gives the trial's numbers.
    """
    config, seed = study.config, study.config.seeds[0]
    number = trained_as(study, trial)
    run: RunConfig = trial_run(config, trial_values(study, trial), number, seed)
    environment = read_environment(user_path(run.output) / run.name / "environment.json")
    metrics = trial.user_attrs[METRICS]
    numbers = ", ".join(f"{m.name} {metrics[m.name][0]!r}" for m in config.metric)
    lines = [
        f"# Trial {trial.number} of the sweep {config.name}, seed {seed}: {numbers}",
        f"# on {environment['device']}, {environment['threads']} threads, torch "
        f"{environment['torch']}, commit {environment['commit']}",
    ]
    return "\n".join([*lines, dump(run.model_copy(update={"name": f"{config.name}-best"}))])


def trials_csv(study: SweepStudy) -> str:
    """One row per trial: number, state, values, metrics (means over seeds), folder, error.

    `same_as` is the trial whose result was taken because it has the same settings; the folder is
    then that one's. `pruned_at`: optimizer steps over its seeds after which it was pruned.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = measured_metrics(study)
    writer.writerow(trial_columns(study, names))
    for trial in study.trials():
        writer.writerow(csv_cell("" if v is None else v) for v in trial_cells(study, trial, names))
    return text.getvalue()


def trial_columns(study: SweepStudy, names: Sequence[str]) -> list[str]:
    """The header of trials.csv; `names` are its metrics."""
    keys = list(study.config.space)
    return ["trial", "state", "feasible", *keys, *names, "same_as", "folder", "pruned_at", "error"]


def measured_metrics(study: SweepStudy) -> list[str]:
    """What any trial has measured, first what is optimised."""
    names = sorted({name for t in study.trials() for name in t.user_attrs.get(METRICS, {})})
    optimized = [metric.name for metric in study.config.metric]
    return [*optimized, *(name for name in names if name not in optimized)]


def trial_cells(study: SweepStudy, trial: FrozenTrial, names: Sequence[str]) -> list[Any]:
    """A trial's line of trials.csv, of unescaped cells; None where there is nothing."""
    values, metrics = trial_values(study, trial), trial.user_attrs.get(METRICS, {})
    feasible = all(excess <= 0 for excess in trial.constraints.values())
    return [
        trial.number,
        trial.state.name.lower(),
        feasible if trial.state == TrialState.COMPLETE else None,
        *(values.get(key) for key in study.config.space),
        *(fmean(metrics[n]) if n in metrics else None for n in names),
        trial.user_attrs.get(SAME_AS),
        f"trial-{trained_as(study, trial):04d}",
        trial.user_attrs.get(PRUNED_AT),
        trial.user_attrs.get(ERROR),
    ]


def print_trials(study: SweepStudy, console: Console) -> None:
    """A table of the best trials, and a line on all the others."""
    config, front = study.config, ranked(study)
    starred = pareto(study) if len(config.metric) > 1 else set()
    table = Table(title=f"{config.name}: best of {study.size} trials")
    for header in ("trial", *(metric.name for metric in config.metric), *config.space):
        table.add_column(Text(one_visible_line(header)), overflow="fold")
    for trial in front[:SHOWN_TRIALS]:
        number = f"{trial.number}{' *' if trial.number in starred else ''}"
        if SAME_AS in trial.user_attrs:
            number += f" (= {trial.user_attrs[SAME_AS]})"
        cells = [number, *map(format_number, trial.values)]
        cells += [_cell(value) for value in trial_values(study, trial).values()]
        table.add_row(*(Text(one_visible_line(cell)) for cell in cells))
    console.print(table)
    if starred:
        console.print("* on the Pareto front")
    console.print(_rest(study, len(front)))


def pareto(study: SweepStudy) -> set[int]:
    """Numbers of the trials that no other trial beats in every metric."""
    return {trial.number for trial in study.study.best_trials}


def _rest(study: SweepStudy, feasible: int) -> str:
    count = {state: len(study.trials(state)) for state in TrialState}
    text = f"{count[TrialState.COMPLETE]} complete, {count[TrialState.PRUNED]} pruned, "
    text += f"{count[TrialState.FAIL]} failed"
    broken = count[TrialState.COMPLETE] - feasible
    text += f"; {broken} break a constraint" if broken else ""
    return text + repeated(study)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return format_number(value)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
