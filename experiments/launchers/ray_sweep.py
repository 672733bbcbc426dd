"""A sweep's workers as tasks of a Ray cluster; each takes trial after trial.

A trial whose worker or node dies waits again and goes on from its checkpoint in another worker.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from optuna.trial import TrialState

from alignlab.errors import UserError
from alignlab.experiments.launchers.on_node import SHARED_STORAGE, TrialsOrder, machine
from alignlab.experiments.launchers.ray import MOST_DEATHS, reached_step
from alignlab.experiments.launchers.ray_cluster import STOP_S, RayTasks, connected
from alignlab.experiments.launchers.same_code import code_facts
from alignlab.experiments.sweep.config import SweepConfig
from alignlab.experiments.sweep.study import SweepStudy, shown_url, storage_url, sweep_folder
from alignlab.experiments.sweep.tracking import SweepTracker
from alignlab.experiments.sweep.worker import finished_count, put_back_dead
from alignlab.progress import step_progress

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


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
            tasks: RayTasks[int] = RayTasks(cluster, config.launch, "trials")
            log.info(
                "Ray: trials to run: %d, nodes: %d; each takes %s",
                *(study.size - finished_count(study), len(cluster.nodes()), tasks.shown_needs()),
            )
            RaySweep(study, tasks, workers).watch()

        yield run


def is_file_of_one_machine(config: SweepConfig) -> bool:
    """Whether the storage is SQLite, whose locks do not hold between machines."""
    return storage_url(config).startswith("sqlite")


class RaySweep:
    """The workers of one sweep, numbered from 1.

    Args:
        study: made already.
        tasks: of the cluster; nothing else starts any.
        workers: most that run at a time; None: as many as the nodes hold, also those that come.
    """

    def __init__(self, study: SweepStudy, tasks: RayTasks[int], workers: int | None) -> None:
        self._study = study
        self._tasks = tasks
        self._workers = workers
        self._folder = sweep_folder(study.config)
        self._deaths: dict[int, tuple[tuple[int, int], int]] = {}

    def watch(self) -> None:
        """Keeps workers running until all trials are finished; whatever ends it, none is left."""
        log.info("each worker writes %s", self._log("N"))
        try:
            self._run_trials()
            self._let_end()
        finally:
            self._tasks.cancel()

    def _run_trials(self) -> None:
        study, done = self._study, finished_count(self._study)
        with step_progress(study.config.name, total=study.size, done=done) as advance:
            while not study.is_finished():
                put_back_dead(study)
                self._start_missing()
                self._tasks.tell_of_room()
                self._see_ended(LOOK_EVERY_S)
                note = f"{len(study.trials(TrialState.RUNNING))} running"
                advance(finished_count(study), note)

    def _let_end(self) -> None:
        """A worker that has finished the last trial still tells MLflow so."""
        end = time.monotonic() + STOP_S
        while self._tasks.running and time.monotonic() < end:
            self._see_ended(LOOK_EVERY_S)

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
            directory=os.getcwd(),
            folder=str(self._folder),
            threads=self._tasks.threads,
            code=code_facts(),
            worker=worker,
            machine=machine() if is_file_of_one_machine(self._study.config) else None,
        )

    def _see_ended(self, seconds: float) -> None:
        for worker, error, loss in self._tasks.ended(seconds):
            if error is not None:
                raise UserError(f"worker {worker}: {error}")
            if loss is not None:
                self._count_death(worker, loss)

    def _count_death(self, worker: int, kind: str) -> None:
        now = self._progress()
        before, deaths = self._deaths.get(worker, (now, 0))
        deaths = deaths + 1 if now == before else 1
        if deaths == MOST_DEATHS:
            numbers = [str(trial.number) for trial in self._study.trials(TrialState.RUNNING)]
            raise UserError(
                f"worker {worker} died {deaths} times while no trial got further ({kind}; "
                f"unfinished: {', '.join(numbers) or 'none begun'}): see {self._log(worker)}, "
                "or lower checkpoint.every"
            )
        self._deaths[worker] = (now, deaths)
        log.info("worker %d died (%s); another takes its place", worker, kind)

    def _progress(self) -> tuple[int, int]:
        """Finished trials, and steps with a checkpoint of all trials together."""
        checkpoints = self._folder.glob("trial-*/seed-*/checkpoints")
        return finished_count(self._study), sum(map(reached_step, checkpoints))

    def _log(self, worker: int | str) -> str:
        return str(self._folder / f"worker-{worker}.log")
