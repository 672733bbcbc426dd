"""What a node does with a run or a sweep that another process sends it: it is told the folder.

Nothing here knows Ray.
"""

import logging
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypedDict

from alignlab.errors import UserError
from alignlab.experiments.launchers.local import threads
from alignlab.experiments.launchers.one_run import train_one
from alignlab.experiments.launchers.same_code import code_facts, differing_code
from alignlab.runs.run_folder import RunFolder
from alignlab.training.setup import Caches

LOG = "worker.log"
RECIPE = "recipe.yaml"
SHARED_STORAGE = (
    "a sweep on several machines needs storage=journal:///PATH on a filesystem that all of them "
    "share, or a database server that all of them reach"
)
VISIBLE_S = 60.0  # NFS clients may not ask again for so long what a folder holds
LOOK_EVERY_S = 0.5

JobName = Literal["run", "trials"]

_caches: dict[str, Caches] = {}  # a worker process often gets several runs


class Order(TypedDict):
    """What is to be trained.

    Args:
        directory: where the sender works: relative paths in the recipe start there.
        folder: of the run or the sweep, which holds its recipe.
        threads: that torch computes with.
        code: the sender's `code_facts`.
    """

    directory: str
    folder: str
    threads: int
    code: dict[str, str]


class TrialsOrder(Order):
    """A sweep whose trials are to be run.

    Args:
        worker: which of the sweep's workers this is, counted from 1.
        machine: the only one that may take part; None where any may.
    """

    worker: int
    machine: str | None


def train_run(order: Order) -> None:
    """Trains, or goes on with, the run; its log lines go to `worker.log` in its folder.

    Raises:
        UserError: this node has other code or does not see the folder, or the run cannot be
            trained.
    """
    folder = RunFolder(_arrive(order))
    with logged(folder.path / LOG), threads(order["threads"]):
        train_one(folder.config(), _caches, wait=True)


def run_trials(order: TrialsOrder) -> None:
    """Takes one waiting trial of a sweep after another, until none waits.

    Its log lines go to `worker-<number>.log` in the sweep's folder. Trials that other workers hold
    are theirs: whoever has sent the order starts another worker if one of these dies.

    Raises:
        UserError: as `train_run`, and when this node does not reach the sweep's storage.
    """
    folder = _arrive(order)
    from alignlab.experiments.sweep.config import load_sweep
    from alignlab.experiments.sweep.study import join_study, shown_url, storage_url
    from alignlab.experiments.sweep.tracking import SweepTracker
    from alignlab.experiments.sweep.worker import check, work

    config = load_sweep(folder / RECIPE)
    url = storage_url(config)
    journal = Path(url) if "://" not in url else None
    if order["machine"] not in (None, machine()) or (journal and not seen(journal.exists)):
        raise UserError(f"node {platform.node()} cannot use {shown_url(config)}: {SHARED_STORAGE}")
    with logged(folder / f"worker-{order['worker']}.log"), threads(order["threads"]):
        check(config)
        try:
            study = join_study(config)
        except UserError as error:
            raise UserError(f"node {platform.node()}: {error}") from None
        work(study, SweepTracker(study), stay=False)


JOBS: Mapping[JobName, Callable[[Any], None]] = {"run": train_run, "trials": run_trials}


def machine() -> str:
    """The same for all processes under one kernel, also in containers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else str(uuid.getnode())


def _arrive(order: Order) -> Path:
    """Goes to the sender's working directory; gives the folder of the run or sweep.

    Raises:
        UserError: this node has other code, or does not see one of the two.
    """
    differing = differing_code(order["code"], code_facts())
    if differing is not None:
        raise UserError(
            f"node {platform.node()} would train with other code than the node that sends the "
            f"runs ({differing}): install the same alignlab and torch on every node"
        )
    try:
        os.chdir(order["directory"])
    except OSError as error:
        raise UserError(
            f"node {platform.node()}: {order['directory']}: {error.strerror}: "
            "start the command in a folder that every node sees under the same path"
        ) from None
    folder = Path(order["folder"])
    if not seen((folder / RECIPE).exists):
        raise UserError(
            f"node {platform.node()} does not see {folder.resolve()}: "
            "output must lie on a filesystem that all nodes share"
        )
    return folder


def seen(there: Callable[[], bool]) -> bool:
    """Whether something that another node has written shows up within `VISIBLE_S` seconds."""
    end = time.monotonic() + VISIBLE_S
    while not there():
        if time.monotonic() > end:
            return False
        time.sleep(LOOK_EVERY_S)
    return True


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Appends alignlab's log lines, and why it ended early, to a file for a while."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("alignlab")
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.info("process %d on %s", os.getpid(), platform.node())
    try:
        yield
    except BaseException as error:
        log.info("ended by %r", error)
        raise
    finally:
        log.setLevel(before)
        log.removeHandler(handler)
        handler.close()
