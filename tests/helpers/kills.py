"""Kills: an exception that stands for one, and processes that really kill themselves."""

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from processes import forked


class Killed(BaseException):
    """Stands for a kill: nothing in the program handles it."""


_died = Path()  # is written by a process that kills itself, so that no other kill passes for it


def die() -> NoReturn:
    """Kills this process, which `fork` has started."""
    _died.touch()
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("not reached")


def die_after(module: Any, name: str, when: Callable[..., bool]) -> None:
    """Kills the process once `module.name(...)` has returned with arguments that fit `when`."""
    original = getattr(module, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if when(*args):
            die()
        return result

    setattr(module, name, wrapped)


def fork(job: str, work: Callable[[], object], *, dies: bool) -> None:
    """Does `work` in a child process, and exits unless that dies by itself, or not, as it has to.

    Args:
        job: what the message calls it.
        work: is over when it returns.
        dies: whether `work` has to end in `die`.
    """
    global _died
    with tempfile.TemporaryDirectory() as folder:
        _died = Path(folder) / "died"
        _, status = os.waitpid(forked(work), 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if killed and not (dies and _died.exists()):
            sys.exit(f"{job}: killed by another process, or for want of memory")
        if killed != dies or (not killed and status):
            sys.exit(f"{job}: ended with {status}")
