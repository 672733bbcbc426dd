"""Who runs the trials of a sweep: this process, several on this machine, or nodes of a cluster."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

from optuna.trial import TrialState

from alignlab import interruption
from alignlab.errors import UserError
from alignlab.experiments.launchers import LauncherName, refuse_unread_address
from alignlab.experiments.launchers.local import check_machine, threads
from alignlab.experiments.sweep.config import SweepConfig
from alignlab.experiments.sweep.ray_workers import trials_on_ray
from alignlab.experiments.sweep.study import SweepStudy, sweep_folder
from alignlab.experiments.sweep.tracking import SweepTracker
from alignlab.experiments.sweep.worker import work
from alignlab.progress import step_progress

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
# Exit codes of `alignlab.interruption`.
INTERRUPTED = tuple(128 + number for number in interruption.SIGNALS)

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
    """Runs processes that join the sweep until all trials are finished; none is replaced.

    Args:
        study: created already.
        count: how many processes.
        command: recipe and overrides.

    Raises:
        UserError: a worker met an error, or none is left; the line is the worker's own.
    """
    folder = sweep_folder(study.config)
    running: dict[int, subprocess.Popen[bytes]] = {}
    shown = study.num_finished()
    try:
        for index in range(1, count + 1):
            running[index] = _start(index, count, command, folder)
        log.info("%d workers, each writes %s", count, folder / "worker-N.log")
        with step_progress(study.config.name, total=study.size, done=shown) as advance:
            while running:
                time.sleep(LOOK_EVERY_S)
                for index in [i for i, worker in running.items() if worker.poll() is not None]:
                    _check_exit(index, running.pop(index).returncode, folder)
                done = study.num_finished()
                if done != shown or done < study.size:  # the last line is written once
                    advance(done, f"{len(study.trials(TrialState.RUNNING))} running")
                shown = done
    finally:
        _stop(list(running.values()))
    if not study.is_finished():
        raise UserError(
            f"all workers died, see {folder / 'worker-1.log'}; "
            "the same command resumes where they stopped"
        )


def _start(index: int, count: int, command: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | device_of(index - 1, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if "OMP_NUM_THREADS" not in environment:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    with (folder / f"worker-{index}.log").open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "alignlab", "sweep", *command, "--join"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )


def device_of(index: int, visible: str | None) -> dict[str, str]:
    """The environment that gives a worker one of several CUDA devices, in turn."""
    import torch

    names = [str(i) for i in range(torch.cuda.device_count())] if visible is None else []
    names = visible.split(",") if visible else names
    return {"CUDA_VISIBLE_DEVICES": names[index % len(names)]} if len(names) > 1 else {}


def _check_exit(index: int, code: int, folder: Path) -> None:
    """A killed worker is no error: the others take its trial over."""
    if code < 0:
        log.info("worker %d was killed by signal %d", index, -code)
    elif code in INTERRUPTED:
        log.info("worker %d was interrupted", index)
    elif code > 0:
        path = folder / f"worker-{index}.log"
        last = path.read_text(errors="replace").strip().rsplit("\n", 1)[-1]
        raise UserError(f"worker {index}: {last.removeprefix('error: ')} (see {path})")


def _stop(workers: list[subprocess.Popen[bytes]]) -> None:
    """Ends the workers, which write a checkpoint and put their trials back.

    Ctrl-C in a terminal reaches them as well; a signal to this process does not. Another signal
    to it kills those that are left.
    """
    left = [worker for worker in workers if worker.poll() is None]
    if left:
        log.info("workers end their steps and write checkpoints: %d", len(left))
    for worker in left:
        worker.send_signal(signal.SIGTERM)
    try:
        for worker in left:
            worker.wait()
    except KeyboardInterrupt:
        for worker in left:
            worker.kill()
            worker.wait()
        raise
