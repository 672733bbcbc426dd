"""What a training costs: seconds per step between two log rows, and peak memory."""

import re
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from alignlab.runs.metric_rows import read_rows
from alignlab.runs.run_folder import RunFolder
from alignlab.units import MIB


class StepClock:
    """Splits wall-clock time into data and compute.

    A device may still be busy when a step returns, so single steps are not timed: read a lap only
    after the step's scalars have been fetched.

    Args:
        device: a GPU times the data itself, as what passes between the end of its work on one
            batch and the beginning of that on the next: a host that runs ahead waits for no batch.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        """Starts a lap; call it after anything that is no training (logging, a checkpoint)."""
        self._begin = time.perf_counter()
        self._steps = 0
        self._waits: list[tuple[_Mark, _Mark]] = []

    def step_begins(self) -> None:
        """Counts a step."""
        self._steps += 1

    @contextmanager
    def making_data(self) -> Iterator[None]:
        """Time inside is the data's: one of the step's batches is made."""
        begin = self._now()
        yield
        self._waits.append((begin, self._now()))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside counts as no part of a step."""
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self._begin += time.perf_counter() - begin

    def lap(self) -> dict[str, float]:
        """`time/step` and `time/data`, in seconds per step since the lap began."""
        total, steps = time.perf_counter() - self._begin, self._steps
        data = sum(_seconds_between(begin, end) for begin, end in self._waits)
        return {"time/step": (total - data) / steps, "time/data": data / steps}

    def _now(self) -> "_Mark":
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


_Mark = float | torch.cuda.Event
"""A time on the host, or a place in the work of a GPU."""


def _seconds_between(begin: _Mark, end: _Mark) -> float:
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return float(begin.elapsed_time(end)) / 1000
    assert not isinstance(end, torch.cuda.Event)
    return end - begin


class PeakMemory:
    """Peak since it was made: allocated CUDA memory, or on a CPU the process's resident set.

    The resident set includes the interpreter, libraries and cached clips; it compares runs of one
    process only roughly. Where the system does not let the peak be reset (not Linux), it is the
    peak since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before_pause = 0.0
        self._reset()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is needed inside, and given back, counts for no peak."""
        self._before_pause = self.peak_mib()
        yield
        self._reset()

    def peak_mib(self) -> float:
        """The peak so far, in MiB."""
        return max(self._before_pause, self._since_reset())

    def _reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif (reset := Path("/proc/self/clear_refs")).exists():
            reset.write_text("5")

    def _since_reset(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / MIB
        status = Path("/proc/self/status")
        if status.exists():
            peak_line = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
            if peak_line:
                return int(peak_line[1]) / 1024
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / MIB if sys.platform == "darwin" else peak / 1024


def logged_costs(folder: RunFolder) -> dict[str, float]:
    """Median of the logged step times, and the largest of the logged memory peaks.

    Nothing of a training that resumed at its last step without its log: what that said is lost.
    """
    rows = [row for row in read_rows(folder.metrics) if "time/step" in row]
    if not rows:
        return {}
    return {
        "time/step": statistics.median(row["time/step"] for row in rows),
        "memory/peak_mib": max(row["memory/peak_mib"] for row in rows),
    }
