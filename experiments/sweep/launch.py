"""Who runs the trials of a sweep: this process, several on this machine, or nodes of a cluster."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Literal

from optuna.trial import TrialState

from alignlab.errors import UserError
from alignlab.experiments.launchers import refuse_unread_address
from alignlab.experiments.launchers.local import check_machine, threads
from alignlab.experiments.launchers.local_workers import all_died, local_workers
from alignlab.experiments.sweep.config import SweepConfig
from alignlab.experiments.sweep.ray_workers import trials_on_ray
from alignlab.experiments.sweep.study import SweepStudy, sweep_folder
from alignlab.experiments.sweep.tracking import SweepTracker
from alignlab.experiments.sweep.worker import work
from alignlab.progress import step_progress

RunTrials = Callable[[SweepStudy, SweepTracker], None]
"""Runs what is not finished of a study, which exists."""

SweepLauncher = Callable[[SweepConfig], AbstractContextManager[RunTrials]]
"""Makes ready to run trials, before there is a study; refuses what it cannot run."""


def make_sweep_launcher(
    name: Literal["local", "ray"],
    *,
    workers: int | None = None,
    command: Sequence[str] = (),
    join: bool = False,
    ray_address: str | None = None,
) -> SweepLauncher:
    """The launcher of this name.

    Args:
        name: `local` or `ray`.
        workers: how many trials run at a time; None: one, on Ray as many as the nodes hold.
        command: recipe and overrides, as local workers are started with them; read if there are
            several.
        join: whether the sweep is one that another process began.
        ray_address: `HOST:PORT` or `auto`; None: `RAY_ADDRESS`, else a new cluster here.

    Raises:
        UserError: options that do not go together.
    """
    if name == "ray":
        if join:
            raise UserError(
                "--join: the same command with --launcher ray and without --join adds workers on "
                "Ray to a sweep that already runs"
            )
        return partial(trials_on_ray, workers=workers, address=ray_address)
    refuse_unread_address(ray_address)
    return partial(_trials_on_this_machine, workers=workers or 1, command=command)


@contextmanager
def _trials_on_this_machine(
    config: SweepConfig, *, workers: int, command: Sequence[str]
) -> Iterator[RunTrials]:
    check_machine(config.launch, runs=workers)

    def run(study: SweepStudy, tracker: SweepTracker) -> None:
        if workers > 1:
            _run_workers(study, workers, command)
            return
        with threads(config.launch.cpus):
            work(study, tracker)

    yield run


def _run_workers(study: SweepStudy, count: int, command: Sequence[str]) -> None:
    """Runs processes that join the sweep until all trials are finished.

    Args:
        study: created already.
        count: how many processes.
        command: recipe and overrides.

    Raises:
        UserError: a worker met an error that is the user's to mend.
        ChildProcessError: the machine ended a worker, or none is left.
    """
    folder = sweep_folder(study.config)
    shown = study.num_finished()
    with local_workers(
        ["sweep", *command, "--join"], count, folder, gpus=study.config.launch.num_ranks
    ) as watch:
        with step_progress(study.config.name, total=study.size, done=shown) as advance:
            is_any_left = True
            while is_any_left:
                is_any_left = watch()
                done = study.num_finished()
                if done != shown or done < study.size:  # the last line is written once
                    advance(done, f"{len(study.trials(TrialState.RUNNING))} running")
                shown = done
    if not study.is_finished():
        raise all_died(folder)
