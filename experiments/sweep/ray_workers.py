"""A sweep's workers as tasks of a Ray cluster; each takes trial after trial.

A trial whose worker or node dies waits again and resumes from its checkpoint in another worker.
"""

import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from optuna.trial import TrialState

from alignlab.errors import UserError
from alignlab.experiments.launchers.node import RECIPE, Order, arrive, order_for, seen, working
from alignlab.experiments.launchers.ray_cluster import (
    MOST_DEATHS,
    STOP_S,
    Deaths,
    RayTasks,
    connected,
)
from alignlab.experiments.sweep.config import SweepConfig, load_sweep
from alignlab.experiments.sweep.lease import machine
from alignlab.experiments.sweep.study import (
    SweepStudy,
    join_study,
    shown_url,
    storage_url,
    sweep_folder,
)
from alignlab.experiments.sweep.tracking import SweepTracker
from alignlab.experiments.sweep.worker import check, work
from alignlab.progress import step_progress
from alignlab.runs.checkpoint_folders import newest_step

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
SHARED_STORAGE = (
    "a sweep on several machines needs storage=journal:///PATH on a filesystem that all of them "
    "share, or a database server that all of them reach"
)


class TrialsOrder(Order):
    """A sweep whose trials are to be run.

    Args:
        worker: which of the sweep's workers this is, counted from 1.
        machine: the only one that may take part; None where any may.
    """

    worker: int
    machine: str | None


def run_trials(order: TrialsOrder) -> None:
    """On a node: takes one waiting trial of a sweep after another, until none waits.

    Its log lines go to `worker-<number>.log` in the sweep's folder. Trials that other workers hold
    are theirs: whoever has sent the order starts another worker if one of these dies.

    Raises:
        UserError: as `train_run`, and when this node does not reach the sweep's storage.
    """
    folder = arrive(order)
    config = load_sweep(folder / RECIPE, stored=True)
    url = storage_url(config)
    journal = Path(url) if "://" not in url else None
    if order["machine"] not in (None, machine()) or (journal and not seen(journal.exists)):
        raise UserError(f"node {platform.node()} cannot use {shown_url(config)}: {SHARED_STORAGE}")
    with working(folder / f"worker-{order['worker']}.log", order["threads"]):
        check(config)
        try:
            study = join_study(config)
        except UserError as error:
            raise UserError(f"node {platform.node()}: {error}") from None
        work(study, SweepTracker(study), stay=False)


@contextmanager
def trials_on_ray(
    config: SweepConfig, *, workers: int | None, address: str | None
) -> Iterator[Callable[[SweepStudy, SweepTracker], None]]:
    """Connects to a cluster and gives what runs a study's trials on its nodes.

    Args:
        config: the recipe; its `launch` is what Ray reserves for each worker.
        workers: how many trials run at a time; None: as many as the nodes hold.
        address: `HOST:PORT` or `auto`; None: `RAY_ADDRESS`, else a new cluster on this machine.

    Raises:
        UserError: there is no such cluster, or its nodes cannot share the storage.
    """
    with connected(address) as cluster:
        machines = cluster.machines()
        if is_file_of_one_machine(config) and len(machines) > 1:
            raise UserError(
                f"storage: {shown_url(config)} is for one machine, the cluster has "
                f"{len(machines)}: {SHARED_STORAGE}"
            )

        def run(study: SweepStudy, tracker: SweepTracker) -> None:
            tasks: RayTasks[int] = RayTasks(cluster, config.launch, run_trials)
            log.info(
                "Ray: trials to run: %d, nodes: %d; each takes %s",
                *(study.size - study.num_finished(), len(cluster.nodes()), tasks.shown_needs()),
            )
            RaySweep(study, tasks, workers).watch()

        yield run


def is_file_of_one_machine(config: SweepConfig) -> bool:
    """Whether the storage is SQLite, whose locks do not hold between machines."""
    return storage_url(config).startswith("sqlite")


class RaySweep:
    """The workers of one sweep, numbered from 1.

    Args:
        study: created already.
        tasks: of the cluster; nothing else starts any.
        workers: most that run at a time; None: as many as the nodes hold, also those that come.
    """

    def __init__(self, study: SweepStudy, tasks: RayTasks[int], workers: int | None) -> None:
        self._study = study
        self._tasks = tasks
        self._workers = workers
        self._folder = sweep_folder(study.config)
        self._deaths = Deaths[int]()

    def watch(self) -> None:
        """Keeps workers running until all trials are finished; whatever ends it, none is left."""
        log.info("each worker writes %s", self._log("N"))
        try:
            self._run_trials()
            self._let_end()
        finally:
            self._tasks.cancel()

    def _run_trials(self) -> None:
        study, done = self._study, self._study.num_finished()
        with step_progress(study.config.name, total=study.size, done=done) as advance:
            while not study.is_finished():
                if study.is_settled():
                    self._start_missing()
                self._tasks.warn_without_room()
                self._see_ended()
                running = len(study.trials(TrialState.RUNNING))
                advance(study.num_finished(), f"{running} running")

    def _let_end(self) -> None:
        """A worker that has finished the last trial still tells MLflow so."""
        end = time.monotonic() + STOP_S
        while self._tasks.running and time.monotonic() < end:
            self._see_ended()

    def _start_missing(self) -> None:
        """Workers for the trials that wait; one that finds none waiting has ended by itself."""
        waiting = len(self._study.trials(TrialState.WAITING))
        unfinished = waiting + len(self._study.trials(TrialState.RUNNING))
        if not waiting:
            return
        limit = min(self._workers or max(1, self._tasks.room()), unfinished)
        running = self._tasks.running
        free = [n for n in range(1, limit + len(running) + 1) if n not in running]
        for worker in free[: max(0, limit - len(running))]:
            self._tasks.start(worker, self._order(worker))

    def _order(self, worker: int) -> TrialsOrder:
        return TrialsOrder(
            **order_for(self._folder, self._tasks.threads),
            worker=worker,
            machine=machine() if is_file_of_one_machine(self._study.config) else None,
        )

    def _see_ended(self) -> None:
        for worker, error, loss, _ in self._tasks.ended(LOOK_EVERY_S):
            if error is not None:
                raise UserError(f"worker {worker}: {error}")
            if loss is not None:
                self._count_death(worker, loss)

    def _count_death(self, worker: int, loss: str) -> None:
        # finished trials, and steps with a checkpoint of all trials together
        checkpoints = self._folder.glob("trial-*/seed-*/checkpoints")
        progress = (self._study.num_finished(), sum(map(newest_step, checkpoints)))
        deaths = self._deaths.count(worker, progress)
        if deaths == MOST_DEATHS:
            numbers = [str(trial.number) for trial in self._study.trials(TrialState.RUNNING)]
            raise ChildProcessError(
                f"worker {worker} died {deaths} times while no trial got further ({loss}; "
                f"unfinished: {', '.join(numbers) or 'none begun'}): see {self._log(worker)}, "
                "or lower checkpoint.every"
            )
        log.info("worker %d died (%s); another takes its place", worker, loss)

    def _log(self, worker: int | str) -> str:
        return str(self._folder / f"worker-{worker}.log")
