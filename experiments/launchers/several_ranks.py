"""A run that several ranks on this machine train together: `alignlab train` in a process each.

They get the environment variables that torchrun sets, but are started from here: torchrun kills
after 30 s what still writes a checkpoint, and hides exit codes. This process follows them by what
they write into the run's folder; what a rank says goes to `rank-N.log` there.
"""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from alignlab import interruption
from alignlab.config.run import RunConfig
from alignlab.distributed.launch_env import LAUNCHER, LOST_RANK
from alignlab.errors import USER_ERROR, UserError
from alignlab.evaluation.intermediate import OnEvaluation, tell_earlier
from alignlab.experiments.launchers.run_progress import steps_done
from alignlab.progress import step_progress
from alignlab.recipe import dump, holds_recipe
from alignlab.runs.atomic_files import write_text
from alignlab.runs.checksums import with_checksum_line
from alignlab.runs.file_lock import WRITER, HeldError, file_lock, is_held
from alignlab.runs.run_folder import RunFolder, only_writer

log = logging.getLogger(__name__)

LOCK = ".launch.lock"
LOOK_EVERY_S = 0.5
ERROR = re.compile(r"^error( \(rank \d+ of \d+\))?: ")
# Exit codes of `alignlab.interruption`.
INTERRUPTED = tuple(128 + number for number in interruption.SIGNALS)
_started: list[subprocess.Popen[bytes]] = []  # the ranks of the run that is being trained
LAST_S = 30.0  # for a rank to see that another is gone, and to say so


class LostRankError(ChildProcessError):
    """The machine killed a rank; the run resumes from its newest checkpoint.

    Args:
        loss: which rank, and how. A launcher that resumes the run itself says no more.
    """

    def __init__(self, loss: str) -> None:
        super().__init__(loss)
        self.loss = loss

    def __str__(self) -> str:
        return f"{self.loss}: the same command resumes from its newest checkpoint"


def train_ranks(
    run: RunConfig,
    ranks: int,
    *,
    wait: bool,
    cpus: int | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> Path:
    """Trains, or resumes, a run with several ranks on this machine; returns its folder.

    A signal, or what `on_evaluation` raises, ends them with a checkpoint of the step that they are
    at.

    Args:
        run: its recipe.
        ranks: how many.
        wait: wait for another command that trains the run; else refuse.
        cpus: threads of all ranks together; None: one each.
        on_evaluation: is told, in this process, of every evaluation before the last step.

    Raises:
        UserError: the run cannot be trained, or another command trains it and `wait` is false.
        ChildProcessError: a rank ended with an error that is none of the user's;
            `LostRankError` where a signal killed it.
    """
    folder = RunFolder.create(run)

    def refused() -> str:
        return f"{folder.path} is being trained by another command: wait for it, or stop it"

    with file_lock(
        folder.path / LOCK,
        waiting=lambda: f"waiting for the command that trains {folder.path}",
        refused=None if wait else refused,
    ):
        if not wait and is_held(folder.path / WRITER):  # by ranks whose launcher was killed
            raise HeldError(refused())
        if wait:
            with only_writer(folder.path, wait=True):
                pass
        if not folder.is_finished_at(run.steps):
            _Ranks(run, folder, on_evaluation).train(ranks, cpus)
    return folder.path


def recipe_to_train(run: RunConfig, folder: RunFolder) -> Path:
    """The recipe with which an `alignlab train` makes a run: the folder's own.

    Of a run that would be prolonged it is a file beside that one, so that the folder holds what it
    held until the run is trained.
    """
    if holds_recipe(folder.recipe, run):
        return folder.recipe
    longer = folder.longer_recipe(run.steps)
    write_text(longer, with_checksum_line(dump(run)))
    return longer


def end_ranks() -> None:
    """Ends the ranks that this process has started, with a checkpoint: for a signal's handler."""
    stop(_started)


class _Ranks:
    """The processes of one run, and what is seen of them in its folder."""

    def __init__(
        self, run: RunConfig, folder: RunFolder, on_evaluation: OnEvaluation | None
    ) -> None:
        self._run = run
        self._folder = folder
        self._on_evaluation = on_evaluation
        self._told: dict[int, int] = {}

    def train(self, ranks: int, cpus: int | None) -> None:
        """Starts the ranks and follows them to their end."""
        run, folder = self._run, self._folder
        processes = _started
        try:
            port = _free_port()
            for rank in range(ranks):
                processes.append(self._start(rank, _environment(rank, ranks, port, cpus)))
            done = min(steps_done(folder), run.steps)
            with step_progress(run.name, total=run.steps, done=done) as advance:
                while any(process.poll() is None for process in processes):
                    if any(process.poll() for process in processes):
                        _wait_for_last_words(processes)
                        break
                    time.sleep(LOOK_EVERY_S)
                    interruption.check()
                    self._tell_evaluations()
                    if (now := min(steps_done(folder), run.steps)) != done:  # a line at the last
                        done = now
                        advance(done, "")
            self._tell_evaluations()
        finally:
            stop(processes)
            codes = [process.returncode for process in processes]
            processes.clear()
        if any(codes):
            raise self._why_ended(codes)

    def _start(self, rank: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        recipe = recipe_to_train(self._run, self._folder)
        command = [sys.executable, "-m", "alignlab", "train", str(recipe)]
        self._log(rank).unlink(missing_ok=True)
        return started(command, os.environ | environment, self._log(rank))

    def _log(self, rank: int) -> Path:
        return self._folder.path / f"rank-{rank}.log"

    def _tell_evaluations(self) -> None:
        """Each once, in their order, as a training in this process tells of them."""
        told = self._on_evaluation
        if told is None or not self._folder.metrics.exists():
            return

        def tell(step: int, metrics: Mapping[str, float]) -> None:
            # clips of a step may be measured later than its validation loss
            if len(metrics) > self._told.get(step, 0):
                self._told[step] = len(metrics)
                told(step, metrics)

        tell_earlier(self._folder.metrics, tell)

    def _why_ended(self, codes: list[int]) -> Exception:
        """The line of the rank that was at fault, as far as exit codes and last lines tell."""
        said = [_last_line(self._log(rank)) for rank in range(len(codes))]
        rank = at_fault(codes, said)
        line, code = ERROR.sub("", said[rank]), codes[rank]
        if code < 0:
            line = f"killed by {signal.Signals(-code).name}"
        line = f"rank {rank}: {line} (see {self._log(rank)})"
        if code < 0:
            return LostRankError(line)
        return UserError(line) if code == USER_ERROR else ChildProcessError(line)


def at_fault(codes: Sequence[int], said: Sequence[str]) -> int:
    """The rank whose end has ended the others, which say so or were told to end.

    Args:
        codes: exit codes of the ranks, of which one is not 0; negative of a signal.
        said: the last line of each.
    """

    def order(rank: int) -> int:
        code = codes[rank]
        if LOST_RANK in said[rank]:
            return 3
        if code in (*INTERRUPTED, -signal.SIGTERM):  # before it handles signals they kill it
            return 2
        return 0 if code < 0 else 1

    return min((rank for rank, code in enumerate(codes) if code), key=order)


def _last_line(log: Path) -> str:
    return log.read_text(errors="replace").strip().rsplit("\n", 1)[-1]


def _environment(rank: int, ranks: int, port: int, cpus: int | None) -> dict[str, str]:
    """What torchrun sets; and threads, of which it gives each rank one."""
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        LAUNCHER: str(os.getpid()),
    }
    if cpus is not None or "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, (cpus or ranks) // ranks))
    return environment


def _free_port() -> int:
    """A port where rank 0 will listen; nothing else on this machine does so now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def started(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """A process in a session of its own: Ctrl-C reaches the command alone, which ends it in order.

    Args:
        command: its program and arguments.
        environment: its own.
        log: what it says is added there.
    """
    with log.open("ab") as out:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def _wait_for_last_words(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ranks that lose another end by themselves, and a training that is interrupted does so."""
    end = time.monotonic() + LAST_S
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        time.sleep(0.1)


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ends processes, which write a checkpoint; another signal to this one kills them."""
    left = [process for process in processes if process.poll() is None]
    if left:
        log.info("processes end their steps and write checkpoints: %d", len(left))
    for process in left:
        process.send_signal(signal.SIGTERM)
    try:
        for process in left:
            process.wait()
    except KeyboardInterrupt:
        for process in left:
            process.kill()
            process.wait()
        raise
