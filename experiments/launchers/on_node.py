"""What a node does with a run that another process sends it: the run folder is all it is told.

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

from alignlab.errors import UserError
from alignlab.experiments.launchers.local import threads
from alignlab.experiments.launchers.one_run import train_one
from alignlab.experiments.launchers.same_code import code_facts, differing_code
from alignlab.run import Caches
from alignlab.run_folder import RunFolder

LOG = "worker.log"
VISIBLE_S = 60.0  # NFS clients may not ask again for so long what a folder holds
LOOK_EVERY_S = 0.5

_caches: dict[str, Caches] = {}  # a worker process often gets several runs


class Order(TypedDict):
    """A run to be trained.

    Args:
        directory: where the sender works: relative paths in the recipe start there.
        folder: of the run, which holds its recipe.
        threads: that torch computes with.
        code: the sender's `code_facts`.
    """

    directory: str
    folder: str
    threads: int
    code: dict[str, str]


def carry_out(order: Order) -> None:
    """Trains, or goes on with, the run; its log lines go to `worker.log` in its folder.

    Raises:
        UserError: this node has other code or does not see the folder, or the run cannot be
            trained.
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
    folder = RunFolder(Path(order["folder"]))
    if not seen(folder.recipe.exists):
        raise UserError(
            f"node {platform.node()} does not see {folder.path.resolve()}: "
            "output must lie on a filesystem that all nodes share"
        )
    with logged(folder.path / LOG), threads(order["threads"]):
        train_one(folder.config(), _caches, wait=True)


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
