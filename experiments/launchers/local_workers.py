"""Several processes of one command on this machine, which share its work: a sweep, a comparison.

Each is the command itself with `--join`. It finds what is left to do by itself, so that one that is
killed leaves its share to the others.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from alignlab.config.run import RunConfig
from alignlab.errors import USER_ERROR, UserError
from alignlab.experiments.launchers.config import LaunchConfig
from alignlab.experiments.launchers.local import check_machine, num_cpus
from alignlab.experiments.launchers.run_progress import RunKey, RunsProgress
from alignlab.experiments.launchers.several_ranks import INTERRUPTED, started, stop

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


def launch_workers(
    runs: Mapping[RunKey, RunConfig],
    finished: Callable[[RunKey], None],
    *,
    needs: LaunchConfig,
    workers: int,
    command: Sequence[str],
) -> None:
    """Trains the runs in several processes and calls `finished` as each ends.

    Args:
        runs: by variant and seed; their folders exist.
        finished: called in this process.
        needs: of each run.
        workers: how many processes.
        command: recipe and overrides of the comparison.

    Raises:
        UserError: this machine has less than the runs need, or a run cannot be trained.
        ChildProcessError: the machine ended a worker, or all of them.
    """
    check_machine(needs, runs=workers)
    progress = RunsProgress(runs)
    folder = next(iter(progress.folders.values())).path.parents[1]
    count = min(workers, len(runs))
    joined = ["compare", *command, "--join"]
    with local_workers(joined, count, folder, gpus=needs.num_ranks) as watch:
        with progress.shown() as advance:
            while True:
                is_any_left = watch()
                for key in progress.newly_finished():
                    finished(key)
                advance()
                if not is_any_left:
                    break
    if progress.left():
        raise all_died(folder)


@contextmanager
def local_workers(
    command: Sequence[str], count: int, folder: Path, *, gpus: int = 1
) -> Iterator[Callable[[], bool]]:
    """Starts processes of a command, and ends those that are left; none is replaced.

    Args:
        command: of `alignlab`, with its arguments.
        count: how many processes; they take the CUDA devices in turn.
        folder: gets `worker-N.log`.
        gpus: CUDA devices that each of them gets.

    Yields:
        What waits a moment and says whether a worker is left. If one met an error, it raises a
        UserError, or a ChildProcessError where the machine is to blame, with the worker's own line.
    """
    running: dict[int, subprocess.Popen[bytes]] = {}

    def watch() -> bool:
        time.sleep(LOOK_EVERY_S)
        for index in [i for i, worker in running.items() if worker.poll() is not None]:
            _check_exit(index, running.pop(index).returncode, folder)
        return bool(running)

    try:
        for index in range(1, count + 1):
            running[index] = _start(index, count, command, folder, gpus)
        log.info("%d workers, each writes %s", count, folder / "worker-N.log")
        yield watch
    finally:
        stop(list(running.values()))


def all_died(folder: Path) -> ChildProcessError:
    """What is said where no worker is left and something is to be done."""
    return ChildProcessError(
        f"all workers died, see {folder / 'worker-1.log'}; "
        "the same command resumes where they stopped"
    )


def _start(
    index: int, count: int, command: Sequence[str], folder: Path, gpus: int
) -> subprocess.Popen[bytes]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    environment = os.environ | devices_of(index - 1, visible, gpus)
    if gpus == 1 and "OMP_NUM_THREADS" not in environment:  # else each rank has its own
        environment["OMP_NUM_THREADS"] = str(max(1, num_cpus() // count))
    return started(
        [sys.executable, "-m", "alignlab", *command], environment, folder / f"worker-{index}.log"
    )


def devices_of(index: int, visible: str | None, gpus: int = 1) -> dict[str, str]:
    """The environment that gives a worker its share of several CUDA devices, in turn."""
    import torch

    names = [str(i) for i in range(torch.cuda.device_count())] if visible is None else []
    names = visible.split(",") if visible else names
    if len(names) <= gpus:
        return {}
    own = [names[(index * gpus + i) % len(names)] for i in range(gpus)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)}


def _check_exit(index: int, code: int, folder: Path) -> None:
    """A killed worker is no error: the others take over what it did."""
    if code < 0:
        log.info("worker %d was killed by signal %d", index, -code)
    elif code in INTERRUPTED:
        log.info("worker %d was interrupted", index)
    elif code > 0:
        path = folder / f"worker-{index}.log"
        last = path.read_text(errors="replace").strip().rsplit("\n", 1)[-1]
        line = f"worker {index}: {last.removeprefix('error: ')} (see {path})"
        raise UserError(line) if code == USER_ERROR else ChildProcessError(line)
