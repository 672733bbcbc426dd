"""Who runs the trials of a sweep: this process, several on this machine, or nodes of a cluster."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from alignlab.errors import UserError
from alignlab.experiments.launchers import LauncherName, refuse_unread_address
from alignlab.experiments.launchers.local import check_machine, threads
from alignlab.experiments.launchers.ray_sweep import trials_on_ray
from alignlab.experiments.sweep.config import SweepConfig
from alignlab.experiments.sweep.local_workers import run_workers
from alignlab.experiments.sweep.study import SweepStudy
from alignlab.experiments.sweep.tracking import SweepTracker
from alignlab.experiments.sweep.worker import work

RunTrials = Callable[[SweepStudy, SweepTracker], None]
"""Runs what is not finished of a study, which exists."""

SweepLauncher = Callable[[SweepConfig], AbstractContextManager[RunTrials]]
"""Makes ready to run trials, before there is a study; refuses what it cannot run."""


def make_sweep_launcher(
    name: LauncherName,
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
    return partial(_trials_here, workers=workers or 1, command=command)


@contextmanager
def _trials_here(
    config: SweepConfig, *, workers: int, command: Sequence[str]
) -> Iterator[RunTrials]:
    check_machine(config.launch, runs=workers)

    def run(study: SweepStudy, tracker: SweepTracker) -> None:
        if workers > 1:
            run_workers(study, workers, command)
            return
        with threads(config.launch.cpus):
            work(study, tracker)

    yield run
