"""How long a step takes and how much memory it needs beyond what was there before.

On CUDA, time is that of the device, between events, with a cold L2. On a CPU, steps that are to be
compared are timed in turns, so that whatever else the machine does falls on all of them.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 1024**2
MIN_ROUNDS, MAX_ROUNDS = 5, 100
QUANTILES = (0.5, 0.2, 0.8)

Step = Callable[[], object]
Name = TypeVar("Name", bound=str)


class Spread(NamedTuple):
    """Median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def time_steps(
    steps: Mapping[Name, Step], device: torch.device, seconds: float
) -> dict[Name, Spread]:
    """Times each step, in milliseconds.

    Args:
        steps: each runs once before it is timed.
        device: where they run.
        seconds: time spent on each step in the mean; on a CPU there are at least 5 rounds, however
            long they take, and at most 100.
    """
    for step in steps.values():
        step()
    if device.type == "cuda":
        return {name: _device_time(step, seconds) for name, step in steps.items()}
    return _time_in_turns(steps, seconds)


def _device_time(step: Step, seconds: float) -> Spread:
    from triton.testing import do_bench

    rep = round(1000 * seconds)
    return Spread(*do_bench(step, warmup=max(25, rep // 4), rep=rep, quantiles=list(QUANTILES)))


def _time_in_turns(steps: Mapping[Name, Step], seconds: float) -> dict[Name, Spread]:
    names = list(steps)
    times: dict[Name, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds * len(names)
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() > end:
            break
        # Another one goes first in every round, and finds the caches as the one before left them.
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            begin = time.perf_counter()
            steps[name]()
            times[name].append(1000 * (time.perf_counter() - begin))
    return {name: spread(milliseconds) for name, milliseconds in times.items()}


def spread(values: list[float]) -> Spread:
    """Median, 20th and 80th percentile, interpolated between neighbours."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), fifths[0], fifths[-1])


def peak_extra_mib(step: Step, device: torch.device) -> float:
    """Measures the most that a step has allocated at any time, in MiB, results included.

    Counted are the tensors that torch's allocator hands out, on a CPU as on CUDA: a resident set
    also counts threads and libraries, and misses what the process kept from earlier steps.
    """
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints a line at each start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / MIB
