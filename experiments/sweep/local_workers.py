"""Several workers on this machine: processes that join the sweep of the one that starts them."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from optuna.trial import TrialState

from alignlab.errors import UserError
from alignlab.experiments.sweep.study import SweepStudy, sweep_folder
from alignlab.experiments.sweep.worker import finished_count
from alignlab.progress import step_progress

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
STOP_S = 30.0  # a worker puts its trial back before it ends

INTERRUPTED = 130


def run_workers(study: SweepStudy, count: int, command: Sequence[str]) -> None:
    """Runs `count` workers until all trials are finished; one that dies is not replaced.

    Args:
        study: made already; workers only join it.
        count: how many processes.
        command: recipe and overrides.

    Raises:
        UserError: a worker met an error, or none is left; the line is the worker's own.
    """
    folder = sweep_folder(study.config)
    running: dict[int, subprocess.Popen[bytes]] = {}
    shown = finished_count(study)
    try:
        for index in range(1, count + 1):
            running[index] = _start(index, count, command, folder)
        log.info("%d workers, each writes %s", count, folder / "worker-N.log")
        with step_progress(study.config.name, total=study.size, done=shown) as advance:
            while running:
                time.sleep(LOOK_EVERY_S)
                for index in [i for i, worker in running.items() if worker.poll() is not None]:
                    _judge(index, running.pop(index).returncode, folder)
                done = finished_count(study)
                if done != shown or done < study.size:  # the last line is written once
                    advance(done, f"{len(study.trials(TrialState.RUNNING))} running")
                shown = done
    finally:
        _stop(list(running.values()))
    if not study.is_finished():
        raise UserError(
            f"all workers died, see {folder / 'worker-1.log'}; "
            "the same command goes on where they stopped"
        )


def _start(index: int, count: int, command: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | device_of(index - 1, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if "OMP_NUM_THREADS" not in environment:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    with (folder / f"worker-{index}.log").open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "alignlab.cli", "sweep", *command, "--join"],
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


def _judge(index: int, code: int, folder: Path) -> None:
    """A killed worker is no error: the others take its trial over."""
    if code < 0:
        log.info("worker %d was killed by signal %d", index, -code)
    elif code == INTERRUPTED:
        log.info("worker %d was interrupted", index)
    elif code > 0:
        path = folder / f"worker-{index}.log"
        last = path.read_text(errors="replace").strip().rsplit("\n", 1)[-1]
        raise UserError(f"worker {index}: {last.removeprefix('error: ')} (see {path})")


def _stop(workers: list[subprocess.Popen[bytes]]) -> None:
    """Ctrl-C in a terminal reaches the workers as well; a signal to this process does not."""
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(signal.SIGTERM)
    for worker in workers:
        try:
            worker.wait(STOP_S)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
