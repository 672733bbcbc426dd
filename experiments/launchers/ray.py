"""Runs as tasks of a Ray cluster; one whose node dies goes on elsewhere from its checkpoint."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.launchers.config import LaunchConfig
from alignlab.experiments.launchers.on_node import LOG, Order, seen
from alignlab.experiments.launchers.one_run import RunKey, shown
from alignlab.experiments.launchers.progress import RunsProgress
from alignlab.experiments.launchers.ray_cluster import RayTasks, connected
from alignlab.experiments.launchers.same_code import code_facts
from alignlab.runs.run_folder import RunFolder
from alignlab.training import checkpoint

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
MOST_DEATHS = 5


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
    """
    if not runs:
        return
    with connected(address) as cluster:
        tasks: RayTasks[RunKey] = RayTasks(cluster, needs, "run")
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
        self._folders = {k: RunFolder(Path(run.output) / run.name) for k, run in runs.items()}
        self._deaths: dict[RunKey, tuple[int, int]] = {}

    def watch(self, finished: Callable[[RunKey], None]) -> None:
        """Starts all runs and waits for them; whatever ends it, no task is left."""
        progress = RunsProgress(self._runs, self._folders)
        try:
            for key in self._runs:
                self._start(key)
            self._tasks.tell_of_room()
            with progress.shown():
                while self._tasks.running:
                    for key, error, loss in self._tasks.ended(LOOK_EVERY_S):
                        if error is not None:
                            raise UserError(f"{shown(key)}: {error}")
                        if loss is not None:
                            self._count_death(key, loss)
                            self._start(key)
                            continue
                        self._check_result(key)
                        progress.finish(key)
                        finished(key)
                    progress.look()
                    self._tasks.tell_of_room()
        finally:
            self._tasks.cancel()

    def _start(self, key: RunKey) -> None:
        order = Order(
            directory=os.getcwd(),
            folder=str(self._folders[key].path),
            threads=self._tasks.threads,
            code=code_facts(),
        )
        self._tasks.start(key, order)

    def _check_result(self, key: RunKey) -> None:
        folder = self._folders[key]
        if not seen(folder.result.exists):
            raise UserError(
                f"{shown(key)} is finished, but {folder.result} is not seen from here: "
                "output must lie on a filesystem that all nodes share"
            )

    def _count_death(self, key: RunKey, kind: str) -> None:
        folder = self._folders[key]
        step = reached_step(folder.checkpoints)
        reached, deaths = self._deaths.get(key, (step, 0))
        deaths = deaths + 1 if step == reached else 1
        if deaths == MOST_DEATHS:
            raise UserError(
                f"{shown(key)}: its worker died {deaths} times without a checkpoint after step "
                f"{step} ({kind}): see {folder.path / LOG}, or lower checkpoint.every"
            )
        self._deaths[key] = (step, deaths)
        log.info("%s: its worker died (%s); it goes on from step %d", shown(key), kind, step)


def reached_step(checkpoints: Path) -> int:
    """Step of the newest checkpoint in a run's folder of them; 0 without one."""
    found = checkpoint.latest(checkpoints)
    return 0 if found is None else int(found.name.removeprefix("step-"))
