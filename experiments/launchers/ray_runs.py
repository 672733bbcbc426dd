"""Runs as tasks of a Ray cluster; one whose node dies resumes elsewhere from its checkpoint."""

import logging
from collections.abc import Callable, Mapping

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.launchers.config import LaunchConfig
from alignlab.experiments.launchers.local import shown
from alignlab.experiments.launchers.node import LOG, order_for, seen, train_run
from alignlab.experiments.launchers.ray_cluster import MOST_DEATHS, Deaths, RayTasks, connected
from alignlab.experiments.launchers.run_progress import RunKey, RunsProgress
from alignlab.experiments.launchers.sources import waits
from alignlab.runs.checkpoint_folders import newest_step

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


def launch_ray(
    runs: Mapping[RunKey, RunConfig],
    finished: Callable[[RunKey], None],
    *,
    needs: LaunchConfig,
    address: str | None,
) -> None:
    """Trains the runs on the nodes of a cluster and calls `finished` as each ends.

    Their folders must lie on a filesystem that all nodes share.

    Args:
        runs: by variant and seed; their folders exist.
        finished: called in this process.
        needs: what Ray reserves for each run.
        address: `HOST:PORT` or `auto`; None: `RAY_ADDRESS`, else a new cluster on this machine.

    Raises:
        UserError: Ray is not installed, there is no such cluster, a node has other code or does
            not see the folders, or a run cannot be trained.
        ChildProcessError: processes of a run died again and again at the same step.
    """
    if not runs:
        return
    with connected(address) as cluster:
        tasks: RayTasks[RunKey] = RayTasks(cluster, needs, train_run)
        log.info(
            "Ray: runs to train: %d, nodes: %d; each run takes %s",
            *(len(runs), len(cluster.nodes()), tasks.shown_needs()),
        )
        _RayRuns(tasks, runs).watch(finished)


class _RayRuns:
    """The runs of one launch."""

    def __init__(self, tasks: RayTasks[RunKey], runs: Mapping[RunKey, RunConfig]) -> None:
        self._tasks = tasks
        self._runs = runs
        self._progress = RunsProgress(runs)
        self._folders = self._progress.folders
        self._deaths = Deaths[RunKey]()
        self._waiting = list(runs)

    def watch(self, finished: Callable[[RunKey], None]) -> None:
        """Starts all runs and waits for them; whatever ends it, no task is left."""
        try:
            self._start_ready()
            self._tasks.warn_without_room()
            with self._progress.shown() as advance:
                while self._tasks.running:
                    for key in self._see_ended():
                        finished(key)
                    self._start_ready()
                    advance()
                    self._tasks.warn_without_room()
        finally:
            self._tasks.cancel()

    def _start_ready(self) -> None:
        """Those that wait for no other run, or no longer."""
        missing = self._progress.left()
        for key in [key for key in self._waiting if not waits(key, self._runs, missing)]:
            self._waiting.remove(key)
            self._start(key)

    def _start(self, key: RunKey) -> None:
        self._tasks.start(
            key, order_for(self._folders[key].path, self._tasks.threads, self._tasks.ranks)
        )

    def _see_ended(self) -> list[RunKey]:
        """Runs that have finished since; one whose process died is started again."""
        finished = []
        for key, error, loss, _ in self._tasks.ended(LOOK_EVERY_S):
            if error is not None:
                raise UserError(f"{shown(key)}: {error}")
            if loss is not None:
                self._count_death(key, loss)
                self._start(key)
                continue
            result = self._folders[key].result
            if not seen(result.exists):
                raise UserError(
                    f"{shown(key)} is finished, but {result} is not seen from here: "
                    "output must lie on a filesystem that all nodes share"
                )
            finished.append(key)
        self._progress.finished.update(finished)
        return finished

    def _count_death(self, key: RunKey, loss: str) -> None:
        folder = self._folders[key]
        step = newest_step(folder.checkpoints)
        deaths = self._deaths.count(key, step)
        if deaths == MOST_DEATHS:
            raise ChildProcessError(
                f"{shown(key)}: its worker died {deaths} times without a checkpoint after step "
                f"{step} ({loss}): see {folder.path / LOG}, or lower checkpoint.every"
            )
        log.info("%s: its worker died (%s); it resumes from step %d", shown(key), loss, step)
