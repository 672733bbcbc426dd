"""`alignlab tune`: every variant's sweep, one after another, then the comparison of the best.

The same command resumes at whatever was killed: a finished sweep and finished runs are taken as
they are, a trial and a run go on from their last checkpoint.
"""

import csv
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from alignlab import interruption
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.compare.config import CompareConfig, compare_config
from alignlab.experiments.compare.run import compare
from alignlab.experiments.launchers import Launcher, RunKey, make_launcher
from alignlab.experiments.launchers.local import check_machine
from alignlab.experiments.sweep.config import SweepConfig
from alignlab.experiments.sweep.launch import RunTrials, SweepLauncher, make_sweep_launcher
from alignlab.experiments.sweep.run import sweep
from alignlab.experiments.sweep.study import SweepStudy, read_study, sweep_folder
from alignlab.experiments.sweep.tracking import SweepTracker
from alignlab.experiments.tune.plan import TunePlan, check, tuned_recipe
from alignlab.experiments.tune.progress import TuneProgress
from alignlab.recipe import to_yaml
from alignlab.runs.atomic_files import write_text
from alignlab.runs.checksums import damaged_files, read_checksums
from alignlab.runs.out_paths import make_output_folder
from alignlab.runs.run_folder import RunFolder

log = logging.getLogger(__name__)

COMPARED = "compare.yaml"
"""The recipe of the comparison of what was found, in its folder."""


def tune(plan: TunePlan, *, workers: int | None = None) -> Path:
    """Tunes every variant, compares the best of each, and returns the report's path.

    Args:
        plan: see `load_tune`.
        workers: how many runs are trained at a time on this machine; None: one.

    Raises:
        UserError: a sweep or the comparison cannot run, no trial of a variant finished, or the
            sweeps would be longer than those that were compared already.
    """
    check(plan)
    check_machine(plan.config.launch, runs=workers or 1)
    _refuse_more_trials(plan)
    folder = make_output_folder(plan.folder.parent, plan.folder.name)
    log.info("%s", plan.sentence)
    progress = TuneProgress(plan)
    for number, (variant, config) in enumerate(plan.sweeps.items(), start=1):
        if _is_swept(config):
            log.info("%s is tuned already (%d of %d)", variant, number, len(plan.sweeps))
            continue
        log.info("tuning %s (%d of %d variants)", variant, number, len(plan.sweeps))
        with interruption.telling(partial(_of_tuning, variant)):
            sweep(config, launcher=_sweep_launcher(config, workers, progress, variant))
        if not (sweep_folder(config) / "best.yaml").is_file():
            raise UserError(
                f"{variant}: no trial of its sweep finished (see {sweep_folder(config)}/trials.csv)"
                ": mend what they failed of, or search elsewhere (tune.spaces) under another name"
            )
    recipe = tuned_recipe(plan)
    write_text(folder / COMPARED, to_yaml(recipe))
    best = compare_config(recipe)
    return compare(best, launcher=_compare_launcher(best, folder, workers, progress))


def _is_swept(config: SweepConfig) -> bool:
    """Whether all trials are finished and what was written of them is whole.

    What it has read is compared with what is there today when the runs of the best begin.
    """
    folder = sweep_folder(config)
    written = read_checksums(folder) or {}
    if "best.yaml" not in written or damaged_files(folder, written):
        return False
    return read_study(config, "give the command again").is_finished()


def _of_tuning(variant: str) -> str:
    return f"of the tuning of {variant}"


def _sweep_launcher(
    config: SweepConfig, workers: int | None, progress: TuneProgress, variant: str
) -> SweepLauncher:
    """Runs the trials of a variant within the line over all."""
    recipe = str(sweep_folder(config) / "recipe.yaml")  # is written before the first trial
    launcher = make_sweep_launcher("local", workers=workers, command=[recipe])

    @contextmanager
    def ready(config: SweepConfig) -> Iterator[RunTrials]:
        with launcher(config) as run_trials:

            def run(study: SweepStudy, tracker: SweepTracker) -> None:
                if not study.is_finished():  # workers would be started for nothing
                    with progress.sweeping(variant):
                        run_trials(study, tracker)

            yield run

    return ready


def _compare_launcher(
    config: CompareConfig, folder: Path, workers: int | None, progress: TuneProgress
) -> Launcher:
    """Trains the runs of the comparison within the line over all."""
    command = [str(folder / COMPARED)]
    launcher = make_launcher("local", config.launch, workers=workers, command=command)

    def launch(runs: Mapping[RunKey, RunConfig], finished: Callable[[RunKey], None]) -> None:
        with progress.comparing(runs):
            launcher(runs, finished)

    return launch


def _refuse_more_trials(plan: TunePlan) -> None:
    """Refuses to tune on what is compared: the best of more trials may be another.

    Raises:
        UserError: it says how many trials there were.
    """
    runs = plan.folder.glob("*/seed-*/recipe.yaml")
    if not any(RunFolder(recipe.parent).has_begun for recipe in runs):
        return
    for config in plan.sweeps.values():
        table = sweep_folder(config) / "trials.csv"
        if not table.is_file():
            continue
        with table.open(newline="") as file:
            count = sum(1 for _ in csv.DictReader(file))
        if count < (config.trials or 0):
            raise UserError(
                f"tune.trials: the best of {count} trials of each variant are compared in "
                f"{plan.folder} already: give --trials {count}, or choose another name=..."
            )
