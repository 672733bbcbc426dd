"""How long work takes on a device: one way for every side of a measurement."""

import time
from collections.abc import Callable

import torch


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of wall-clock time that `work` takes, with all that it starts on the device.

    Args:
        work: is called once.
        device: waited for before the clock starts and before it stops; a CPU needs no waiting.
    """
    _wait(device)
    begin = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
