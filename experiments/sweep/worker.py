"""One worker of a sweep: it takes trial after trial, also those of workers that died."""

import logging
import time

import optuna
from optuna.trial import TrialState

from alignlab import interruption
from alignlab.distributed.launch_env import refuse_several_ranks
from alignlab.experiments.launchers.config import check_batch
from alignlab.experiments.report.formatting import format_duration
from alignlab.experiments.sweep.config import SweepConfig
from alignlab.experiments.sweep.metrics import check_metrics
from alignlab.experiments.sweep.samplers import check_sampler
from alignlab.experiments.sweep.space import check_space, own_params
from alignlab.experiments.sweep.study import SweepStudy
from alignlab.experiments.sweep.tracking import SweepTracker
from alignlab.experiments.sweep.trial import (
    LOOK_EVERY_S,
    LostTrialError,
    TrialRunner,
    WaitForDuplicateError,
)
from alignlab.training.build_optimizer import check_optimizer_package

log = logging.getLogger(__name__)


def check(config: SweepConfig) -> None:
    """Refuses, before any trial, what cannot work.

    Raises:
        UserError: space, sampler or metric do not fit the run.
    """
    refuse_several_ranks()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check_space(config)
    check_batch(config.base, config.launch)
    check_optimizer_package(config.base.optim)
    check_sampler(config)
    check_metrics(config)
    if own_params(config) is None:
        log.info("the recipe's own settings lie outside the space: they are not tried first")


def work(study: SweepStudy, tracker: SweepTracker, *, stay: bool = True) -> None:
    """Takes waiting trials, one after another.

    Args:
        study: of the sweep.
        tracker: of the study.
        stay: until all trials are finished, also those that other workers hold now and that wait
            again if these die; else until none waits.
    """
    runner = TrialRunner(study, tracker)
    while not study.is_settled():
        interruption.check()
        time.sleep(LOOK_EVERY_S)
    begin, done = time.monotonic(), 0
    while True:
        interruption.check()
        study.put_back_dead()  # first: later trials learn from theirs
        claimed = study.claim()
        if claimed is None:
            if not stay or study.is_finished():
                return
            time.sleep(LOOK_EVERY_S)
            continue
        trial, lease = claimed
        try:
            with lease.renewed():
                runner.run(trial, lease)
        except WaitForDuplicateError:
            study.put_back(trial.number, lease.claim)
            continue
        except BaseException as error:
            if lease.lost or isinstance(error, LostTrialError):
                log.info("trial %d: another worker has taken it over", trial.number)
                continue
            with interruption.held():
                study.put_back(trial.number, lease.claim)
            raise
        done += 1
        left = len(study.trials(TrialState.WAITING)) * (time.monotonic() - begin) / done
        log.info(
            "%d of %d trials finished, about %s left for one worker",
            *(study.num_finished(), study.size, format_duration(left)),
        )
