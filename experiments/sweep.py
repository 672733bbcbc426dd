"""A sweep: a search over settings of one run, by one worker or several, on one machine or several.

A killed sweep goes on with the same command; a killed worker's trial goes on from its checkpoint.
"""

import logging
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import optuna
from optuna.trial import TrialState
from rich.console import Console

from alignlab.config_sweep import SweepConfig
from alignlab.experiments.numbers import format_duration
from alignlab.experiments.sweep_results import best_metrics, print_trials, write_results
from alignlab.experiments.sweep_samplers import check_sampler
from alignlab.experiments.sweep_space import check_space, own_params
from alignlab.experiments.sweep_study import (
    SweepStudy,
    create_study,
    directions,
    join_study,
    shown_url,
    sweep_folder,
)
from alignlab.experiments.sweep_tracking import SweepTracker
from alignlab.experiments.sweep_trial import LostTrialError, TrialRunner
from alignlab.experiments.sweep_workers import run_workers
from alignlab.recipe import dump
from alignlab.run_folder import write_text

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0


def sweep(config: SweepConfig, *, workers: int = 1, command: Sequence[str] = ()) -> Path:
    """Runs what is not finished of a sweep, prints its best trials and writes the results.

    Args:
        config: the recipe.
        workers: processes that run trials; 1 runs them in this one.
        command: recipe and overrides, as workers are started with them; read if there are several.

    Returns:
        The page with the results; `best.yaml` and `trials.csv` lie beside it.

    Raises:
        UserError: the recipe cannot run here, or the storage cannot be used.
    """
    check(config)
    study = create_study(config)
    write_text(sweep_folder(config) / "recipe.yaml", dump(config))
    log.info("sweep %s: %s", config.name, sweep_folder(config))
    log.info("watch it with: optuna-dashboard %s", shown_url(config))
    tracker = SweepTracker(study)
    tracker.begin_study()
    with sigterm_interrupts():
        if workers == 1:
            work(study, tracker)
        else:
            run_workers(study, workers, command)
    tracker.end_study(best_metrics(study))
    print_trials(study, Console())
    return write_results(study)


def join(config: SweepConfig, *, workers: int = 1, command: Sequence[str] = ()) -> None:
    """Helps with a sweep that another process began, until all its trials are finished.

    Raises:
        UserError: there is no such sweep, or it is of another recipe.
    """
    check(config)
    study = join_study(config)
    with sigterm_interrupts():
        if workers == 1:
            work(study, SweepTracker(study))
        else:
            run_workers(study, workers, command)


def check(config: SweepConfig) -> None:
    """Refuses, before any trial, what cannot work.

    Raises:
        UserError: space, sampler or metric do not fit the run.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check_space(config)
    check_sampler(config)
    directions(config)
    if own_params(config) is None:
        log.info("the recipe's own settings lie outside the space: they are not tried first")


def work(study: SweepStudy, tracker: SweepTracker) -> None:
    """Takes trial after trial until all are finished, also those of workers that died."""
    runner = TrialRunner(study.config, tracker)
    begin, done = time.monotonic(), 0
    while True:
        claimed = study.claim()
        if claimed is None:
            if study.is_finished():
                return
            dead = study.put_back_dead()
            for number in dead:
                log.info("trial %d: its worker died, it goes on from its checkpoint", number)
            if not dead:
                time.sleep(LOOK_EVERY_S)
            continue
        trial, lease = claimed
        try:
            with lease:
                runner.run(trial, lease)
        except BaseException as error:
            if lease.lost or isinstance(error, LostTrialError):
                log.info("trial %d: another worker has taken it over", trial.number)
                continue
            with deaf():
                study.put_back(trial.number, lease.claim)
            raise
        done += 1
        announce(study, (time.monotonic() - begin) / done)


def announce(study: SweepStudy, seconds_per_trial: float) -> None:
    """One line on how far the sweep is."""
    left = len(study.trials(TrialState.WAITING))
    log.info(
        "%d of %d trials finished, about %s left for one worker",
        sum(trial.state.is_finished() for trial in study.trials()),
        study.size,
        format_duration(left * seconds_per_trial),
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


@contextmanager
def deaf() -> Iterator[None]:
    """Ctrl-C reaches a worker twice, from the terminal and from the process that started it."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
