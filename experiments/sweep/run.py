"""A sweep: a search over settings of one run, by one worker or several, on one machine or several.

The same command resumes a killed sweep; a killed worker's trial resumes from its checkpoint.
"""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from alignlab.experiments.sweep.config import SweepConfig, dump_sweep
from alignlab.experiments.sweep.launch import SweepLauncher, make_sweep_launcher
from alignlab.experiments.sweep.results import best_metrics, print_trials, write_results
from alignlab.experiments.sweep.study import (
    SweepStudy,
    create_study,
    join_study,
    shown_url,
    sweep_folder,
)
from alignlab.experiments.sweep.tracking import SweepTracker
from alignlab.experiments.sweep.trial import refuse_other_inputs
from alignlab.experiments.sweep.worker import check
from alignlab.runs.atomic_files import write_text
from alignlab.runs.checksums import CHECKSUMS
from alignlab.runs.input_record import InputRecord

log = logging.getLogger(__name__)


def sweep(config: SweepConfig, *, launcher: SweepLauncher | None = None) -> Path:
    """Runs what is not finished of a sweep, prints its best trials and writes the results.

    Args:
        config: the recipe.
        launcher: gets the trials run; None: one after another in this process.

    Returns:
        The page with the results; `best.yaml` and `trials.csv` lie beside it.

    Raises:
        UserError: the recipe cannot run here, the storage cannot be used, or the trials so far
            have read other files.
    """
    check(config)
    with (launcher or make_sweep_launcher("local"))(config) as run_trials:
        record = refuse_other_inputs(config, config.base)  # before anything is written
        study = create_study(config)
        (sweep_folder(config) / CHECKSUMS).unlink(missing_ok=True)  # of what is written anew
        write_text(sweep_folder(config) / "recipe.yaml", dump_sweep(config))
        _tell_unknown_inputs(study, record)
        log.info("sweep %s: %s", config.name, sweep_folder(config))
        log.info("watch it with: optuna-dashboard %s", shown_url(config))
        tracker = SweepTracker(study)
        tracker.begin_study()
        if study.is_finished():
            log.info("all %d trials are finished already", study.size)
        with sigterm_interrupts():
            run_trials(study, tracker)
    tracker.end_study(best_metrics(study))
    print_trials(study, Console())
    return write_results(study)


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
        with sigterm_interrupts():
            run_trials(study, SweepTracker(study))


def _tell_unknown_inputs(study: SweepStudy, record: InputRecord) -> None:
    """Warns where finished trials are older than `record`, which says what all trials read."""
    if not record.exists and study.num_finished():
        log.warning(
            "%s: its trials so far are from before inputs were recorded: whether they read the "
            "files of today is not known",
            record.folder,
        )


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """A scheduler's SIGTERM is a Ctrl-C: the running trial is put back."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
