"""Runs as jobs of SLURM, through submitit: an array, each job resumed after it was preempted.

A job supervises the processes that train its run. At submitit's signal, before a preemption or a
time limit, they write a checkpoint and the job is requeued.
"""

import logging
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.launchers.config import LaunchConfig
from alignlab.experiments.launchers.local import shown
from alignlab.experiments.launchers.node import LOG, Order, arrive, logged, order_for, seen
from alignlab.experiments.launchers.ray_cluster import MOST_DEATHS, Deaths
from alignlab.experiments.launchers.run_progress import RunKey, RunsProgress
from alignlab.experiments.launchers.several_ranks import LostRankError, end_ranks, train_ranks
from alignlab.experiments.launchers.sources import waits
from alignlab.runs.checkpoint_folders import newest_step
from alignlab.runs.run_folder import RunFolder

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
MOST_TIMEOUTS = 10**6  # requeues after a time limit; those that bring nothing are counted here
FOLDER = "slurm"  # in the comparison's: submitit's scripts, logs and pickles
SIGNAL_S = 300  # between the signal and the limit: for the step and the checkpoint


def launch_slurm(
    runs: Mapping[RunKey, RunConfig],
    finished: Callable[[RunKey], None],
    *,
    needs: LaunchConfig,
    workers: int | None = None,
    cluster: str = "slurm",
) -> None:
    """Trains the runs in jobs and calls `finished` as each ends.

    Their folders must lie on a filesystem that this machine and the nodes share. If this command
    is interrupted, its jobs are cancelled.

    Args:
        runs: by variant and seed; their folders exist.
        finished: called in this process.
        needs: what each job asks for.
        workers: most jobs of an array that run at a time; None: as many as SLURM gives.
        cluster: submitit's name; `local` runs jobs as processes here.

    Raises:
        UserError: submitit or SLURM is missing, a node has other code or does not see the folders,
            or a run cannot be trained.
        ChildProcessError: jobs of a run were lost again and again at the same step.
    """
    if not runs:
        return
    progress = RunsProgress(runs)
    folder = next(iter(progress.folders.values())).path.parents[1]
    executor = _executor(folder / FOLDER, needs, cluster, workers)
    log.info("SLURM: runs to train: %d; jobs write into %s", len(runs), folder / FOLDER)
    _SlurmRuns(executor, runs, progress, needs).watch(finished)


def _executor(folder: Path, needs: LaunchConfig, cluster: str, workers: int | None) -> Any:
    try:
        import submitit
    except ImportError:
        raise UserError("--launcher slurm needs submitit: pip install 'alignlab[slurm]'") from None
    missing = [name for name in ("sbatch", "srun", "sacct") if shutil.which(name) is None]
    if cluster == "slurm" and missing:
        raise UserError(
            f"--launcher slurm: no {missing[0]} here: start the command on a login node of the "
            "cluster"
        )
    settings = {f"{cluster}_max_num_timeout": MOST_TIMEOUTS} if cluster == "slurm" else {}
    executor = submitit.AutoExecutor(folder, cluster=cluster, **settings)
    executor.update_parameters(**_parameters(needs, workers, folder.parent.name))
    return executor


def _parameters(needs: LaunchConfig, workers: int | None, name: str) -> dict[str, Any]:
    """What a job asks for, in submitit's names. It is on one node, as one task."""
    slurm = needs.slurm
    parameters: dict[str, Any] = {
        "name": name,
        "nodes": 1,
        "tasks_per_node": 1,
        "cpus_per_task": needs.cpus or needs.num_ranks,
        "timeout_min": max(1, round(slurm.hours * 60)),
        "slurm_signal_delay_s": SIGNAL_S,
        "slurm_array_parallelism": workers or 10_000,
        "slurm_additional_parameters": dict(slurm.options),
    }
    gpus = needs.num_ranks if needs.gpus is None else needs.gpus
    if gpus:
        parameters["gpus_per_node"] = int(gpus)
    if needs.memory_gib is not None:
        parameters["mem_gb"] = needs.memory_gib
    for key in ("partition", "account", "qos", "constraint"):
        if (value := getattr(slurm, key)) is not None:
            parameters[f"slurm_{key}"] = value
    return parameters


class RunJob:
    """What a job does: submitit calls it, and `checkpoint` before it is preempted or timed out."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._requeues = Deaths[str]()

    def __call__(self) -> tuple[str | None, str | None]:
        """Trains the run in processes of its own.

        Returns:
            The line of a UserError, and that of a rank which the machine has killed.
        """
        signal.signal(signal.SIGTERM, _cancelled)  # submitit would let it pass
        try:
            folder = RunFolder(arrive(self._order))
            with logged(folder.path / LOG):
                ranks, cpus = self._order["ranks"], self._order["threads"]
                train_ranks(folder.config(), ranks, wait=True, cpus=cpus)
        except UserError as error:
            return str(error), None
        except LostRankError as lost:
            return None, lost.loss
        return None, None

    def checkpoint(self) -> Any:
        """Ends the processes with a checkpoint; gives what the requeued job calls.

        Nothing where it has been requeued again and again at the same step: the job is lost then.
        """
        import submitit

        end_ranks()
        step = newest_step(RunFolder(Path(self._order["folder"])).checkpoints)
        if self._requeues.count("", step) == MOST_DEATHS:
            log.error("requeued %d times without a checkpoint after step %d", MOST_DEATHS, step)
            return None
        return submitit.helpers.DelayedSubmission(self)


def _cancelled(number: int, frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


class _SlurmRuns:
    """The jobs of one launch."""

    def __init__(
        self,
        executor: Any,
        runs: Mapping[RunKey, RunConfig],
        progress: RunsProgress,
        needs: LaunchConfig,
    ) -> None:
        self._executor = executor
        self._runs = runs
        self._progress = progress
        self._needs = needs
        self._jobs: dict[RunKey, Any] = {}
        self._deaths = Deaths[RunKey]()
        self._waiting = list(runs)

    def watch(self, finished: Callable[[RunKey], None]) -> None:
        """Submits all runs and waits for them; whatever ends it, no job is left."""
        try:
            self._submit_ready()
            with self._progress.shown() as advance:
                while self._jobs:
                    time.sleep(LOOK_EVERY_S)
                    for key in [key for key, job in self._jobs.items() if job.done()]:
                        if self._see_ended(key, self._jobs.pop(key)):
                            finished(key)
                    self._submit_ready()
                    advance()
        finally:
            for job in self._jobs.values():
                job.cancel(check=False)

    def _submit_ready(self) -> None:
        """One array of those that wait for no other run, or no longer."""
        missing = self._progress.left()
        ready = [key for key in self._waiting if not waits(key, self._runs, missing)]
        if not ready:
            return
        self._waiting = [key for key in self._waiting if key not in ready]
        jobs = [RunJob(self._order(key)) for key in ready]
        submitted = self._executor.submit_array(jobs)
        self._jobs.update(zip(ready, submitted, strict=True))
        log.info("SLURM: submitted %s", ", ".join(job.job_id for job in submitted))

    def _order(self, key: RunKey) -> Order:
        folder, ranks = self._progress.folders[key].path.absolute(), self._needs.num_ranks
        return order_for(folder, self._needs.cpus or ranks, ranks)

    def _see_ended(self, key: RunKey, job: Any) -> bool:
        """Whether the run is finished; one whose job was lost is submitted again."""
        from submitit.core.utils import FailedJobError, UncompletedJobError

        try:
            error, loss = job.result()
        except FailedJobError as failure:
            last = str(failure).strip().rsplit("\n", 1)[-1]
            raise ChildProcessError(
                f"{shown(key)}: {last} (see {self._progress.folders[key].path / LOG})"
            ) from failure
        except UncompletedJobError:
            error, loss = None, str(job.state)
        if error is not None:
            raise UserError(f"{shown(key)}: {error}")
        if loss is not None:
            self._count_death(key, job, loss)
            self._waiting.append(key)
            return False
        result = self._progress.folders[key].result
        if not seen(result.exists):
            raise UserError(
                f"{shown(key)} is finished, but {result} is not seen from here: "
                "output must lie on a filesystem that all nodes share"
            )
        self._progress.finished.add(key)
        return True

    def _count_death(self, key: RunKey, job: Any, loss: str) -> None:
        folder = self._progress.folders[key]
        step = newest_step(folder.checkpoints)
        deaths = self._deaths.count(key, step)
        if deaths == MOST_DEATHS:
            raise ChildProcessError(
                f"{shown(key)}: its job was lost {deaths} times without a checkpoint after step "
                f"{step} ({loss}): see {job.paths.stderr}, or lower checkpoint.every"
            )
        log.info("%s: job %s was lost (%s); submitted again", shown(key), job.job_id, loss)
