"""A process that ends with the one that has started it, however that ends. Imports no torch."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with_parent(number: signal.Signals, parent: int | None = None) -> None:
    """Has the kernel send this process a signal when its parent is gone.

    On Linux alone: elsewhere a process outlives a parent that is killed.

    Args:
        number: of the signal.
        parent: its process number: one that is gone already sends the signal at once. None: it is
            not asked whether it is.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), number)
