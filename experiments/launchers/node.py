"""What a node does with an order of another process: it is told a folder that both see.

Nothing here knows Ray.
"""

import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from alignlab import interruption
from alignlab.errors import UserError
from alignlab.experiments.launchers.config import LaunchConfig
from alignlab.experiments.launchers.local import threads, train_one
from alignlab.experiments.launchers.same_code import code_facts, differing_code
from alignlab.runs.run_folder import RunFolder
from alignlab.training.setup import Caches

LOG = "worker.log"
RECIPE = "recipe.yaml"
VISIBLE_S = 60.0  # NFS clients may not ask again for so long what a folder holds
LOOK_EVERY_S = 0.5

_caches: dict[str, Caches] = {}  # a worker process often gets several runs


class Order(TypedDict):
    """What is to be trained.

    Args:
        directory: where the sender works: relative paths in the recipe start there.
        folder: of the run or the sweep, which holds its recipe.
        threads: that torch computes with, of all ranks together.
        ranks: of each run.
        code: the sender's `code_facts`.
    """

    directory: str
    folder: str
    threads: int
    ranks: int
    code: dict[str, str]


def order_for(folder: Path, num_threads: int, ranks: int = 1) -> Order:
    """The order to train what a folder holds, sent from this process."""
    return Order(
        directory=os.getcwd(),
        folder=str(folder),
        threads=num_threads,
        ranks=ranks,
        code=code_facts(),
    )


def train_run(order: Order) -> None:
    """Trains, or resumes, the run; its log lines go to `worker.log` in its folder.

    Raises:
        UserError: this node has other code or does not see the folder, or the run cannot be
            trained.
    """
    folder = RunFolder(arrive(order))
    needs = LaunchConfig(cpus=order["threads"], ranks=order["ranks"])
    with working(folder.path / LOG, order["threads"]):
        train_one(folder.config(), _caches, needs, wait=True)


def arrive(order: Order, *, holds: str = RECIPE, setting: str = "output") -> Path:
    """Goes to the sender's working directory; gives the folder of the run or sweep.

    Args:
        order: of the sender.
        holds: what the folder has in it.
        setting: that names the folder, for the message.

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
    if not seen((folder / holds).exists):
        raise UserError(
            f"node {platform.node()} does not see {folder.resolve()}: "
            f"{setting} must lie on a filesystem that all nodes share"
        )
    return folder


def seen(exists: Callable[[], bool]) -> bool:
    """Whether something that another node has written shows up within `VISIBLE_S` seconds."""
    end = time.monotonic() + VISIBLE_S
    while not exists():
        if time.monotonic() > end:
            return False
        time.sleep(LOOK_EVERY_S)
    return True


@contextmanager
def working(log: Path, num_threads: int) -> Iterator[None]:
    """In place while a node carries out an order.

    A task that Ray cancels ends its step and writes a checkpoint.

    Args:
        log: gets the log lines.
        num_threads: that torch computes with.
    """
    with interruption.handled(sent_by_ray=True), logged(log), threads(num_threads):
        yield


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
