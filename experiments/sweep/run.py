"""A sweep: a search over settings of one run, by one worker or several, on one machine or several.

The same command resumes a killed sweep; a killed worker's trial resumes from its checkpoint.
"""

import logging
from functools import partial
from pathlib import Path

from rich.console import Console

from alignlab import interruption
from alignlab.experiments.sweep.config import SweepConfig, dump_sweep
from alignlab.experiments.sweep.launch import SweepLauncher, make_sweep_launcher
from alignlab.experiments.sweep.results import best_metrics, print_trials, write_results
from alignlab.experiments.sweep.study import (
    SweepStudy,
    create_study,
    join_study,
    named_storage,
    shown_url,
    sweep_folder,
)
from alignlab.experiments.sweep.tracking import SweepTracker
from alignlab.experiments.sweep.trial import refuse_other_inputs
from alignlab.experiments.sweep.worker import check
from alignlab.runs.atomic_files import write_text
from alignlab.runs.checksums import forget_checksums
from alignlab.runs.input_record import InputRecord
from alignlab.runs.out_paths import check_out_folder
from alignlab.tracking.other_trackers import check_packages

log = logging.getLogger(__name__)


def sweep(config: SweepConfig, *, launcher: SweepLauncher | None = None) -> Path:
    """Runs what is not finished of a sweep, prints its best trials and writes the results.

    Args:
        config: the recipe.
        launcher: gets the trials run; None: one after another in this process.

    Returns:
        The page with the results; `best.yaml` and `trials.csv` lie beside it.

    Raises:
        UserError: the recipe cannot run here, a tracker's package is not installed, the storage
            cannot be used, or the trials so far have read other files.
    """
    check(config)
    check_packages(config.base)
    check_out_folder(sweep_folder(config), "output")
    with (launcher or make_sweep_launcher("local"))(config) as run_trials:
        record = refuse_other_inputs(config, config.base)  # before anything is written
        with named_storage(config):
            study = create_study(config)
        forget_checksums(sweep_folder(config))
        write_text(sweep_folder(config) / "recipe.yaml", dump_sweep(config))
        _tell_unknown_inputs(study, record)
        log.info("sweep %s: %s", config.name, sweep_folder(config))
        log.info("watch it with: optuna-dashboard %s", shown_url(config))
        tracker = SweepTracker(study)
        if study.is_finished():
            log.info("all %d trials are finished already", study.size)
        telling = interruption.telling(partial(_shown_progress, study))
        with tracker.studied(), telling, named_storage(config):
            run_trials(study, tracker)
    print_trials(study, Console())
    results = write_results(study)
    tracker.end_study(best_metrics(study))
    return results


def join(config: SweepConfig, *, launcher: SweepLauncher | None = None) -> None:
    """Helps with a sweep that another process began, until all its trials are finished.

    Raises:
        UserError: there is no such sweep, it is of another recipe, or its trials so far have read
            other files.
    """
    check(config)
    with (launcher or make_sweep_launcher("local"))(config) as run_trials:
        study = join_study(config)
        _tell_unknown_inputs(study, refuse_other_inputs(config, config.base))
        with interruption.telling(partial(_shown_progress, study)), named_storage(config):
            run_trials(study, SweepTracker(study))


def _tell_unknown_inputs(study: SweepStudy, record: InputRecord) -> None:
    """Warns where finished trials are older than `record`, which says what all trials read."""
    if not record.exists and study.num_finished():
        log.warning(
            "%s: its trials so far are from before inputs were recorded: whether they read the "
            "files of today is not known",
            record.folder,
        )


def _shown_progress(study: SweepStudy) -> str:
    """How far it came, for the line of an interruption."""
    return f"with {study.num_finished()} of {study.size} trials finished"
