"""Forked processes, and which processes of this machine were started by which."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path


def forked(work: Callable[[], object]) -> int:
    """Does `work` in a child process, which has all that is imported; gives its number.

    It ends with 0, or with 1 if the work raised.
    """
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # else a second process would go on with the tests
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def parents() -> dict[int, int]:
    """Process -> the one that started it."""
    parent_of = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has just ended
            continue
        parent_of[int(stat.parent.name)] = int(fields[1])
    return parent_of


def descendants(pid: int) -> set[int]:
    """All that a process has started, and all that those have."""
    parent_of = parents()
    below: set[int] = set()
    reached = {pid}
    while reached:
        reached = {child for child, parent in parent_of.items() if parent in reached}
        below |= reached
    return below


def is_running(process: int) -> bool:
    """Whether it is there and no zombie, which whoever adopts orphans has not seen yet."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"
