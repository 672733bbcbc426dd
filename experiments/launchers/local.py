"""Runs one after another in this process, which share their encoded clips."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import ceil

import torch

from alignlab import interruption
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.launchers.config import LaunchConfig
from alignlab.experiments.launchers.run_progress import RunKey, RunsProgress
from alignlab.progress import tell
from alignlab.train import train
from alignlab.training.setup import Caches, shared_caches

GIB = 2**30


def launch_local(
    runs: Mapping[RunKey, RunConfig], finished: Callable[[RunKey], None], *, needs: LaunchConfig
) -> None:
    """Trains the runs in their order and calls `finished` after each.

    Raises:
        UserError: this machine has less than a run needs, or a run cannot be trained.
    """
    check_machine(needs)
    if not runs:
        return
    caches: dict[str, Caches] = {}
    with threads(needs.cpus), RunsProgress(runs).shown_here() as ended:
        for number, (key, run) in enumerate(runs.items(), start=1):
            interruption.check()
            tell(f"run {number} of {len(runs)}: {shown(key)}")
            with interruption.telling(partial(of_run, key)):
                train_one(run, caches, wait=False)
            finished(key)
            ended(key)


def train_one(run: RunConfig, caches: dict[str, Caches], *, wait: bool) -> None:
    """Trains, or resumes, a run whose folder exists, as the only process that writes there.

    Args:
        run: its recipe.
        caches: encoded clips of the runs that this process has trained; those that this run can
            share are used, new ones are added.
        wait: wait for another process that trains the run; else refuse.

    Raises:
        UserError: the run cannot be trained, or another process trains it and `wait` is false.
    """
    train(run, caches=shared_caches(run, caches), wait=wait)


def shown(key: RunKey) -> str:
    """A run as messages name it."""
    variant, seed = key
    return f"{variant}, seed {seed}"


def check_machine(needs: LaunchConfig, *, runs: int = 1) -> None:
    """Refuses a machine that has less than its runs need.

    Args:
        needs: of each run.
        runs: how many are trained at a time; they take the GPUs in turn.

    Raises:
        UserError: it names the setting.
    """
    who = "a run needs" if runs == 1 else f"{runs} workers need"
    cpus, gpus = num_cpus(), torch.cuda.device_count()
    if needs.cpus is not None and runs * needs.cpus > cpus:
        raise UserError(f"launch.cpus: {who} {runs * needs.cpus}, this machine has {cpus}")
    if needs.gpus and (not gpus or ceil(runs / gpus) * needs.gpus > 1):
        share = f"{needs.gpus:g}" if runs == 1 else f"{needs.gpus:g} each"
        raise UserError(f"launch.gpus: {who} {share}, this machine has {gpus or 'none'}")
    if needs.gpus == 0 and gpus:
        raise UserError(
            "launch.gpus: 0, but a run in this process would use the machine's GPU: "
            "set CUDA_VISIBLE_DEVICES to nothing, or remove the setting"
        )
    if needs.memory_gib is not None:
        memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
        if runs * needs.memory_gib > memory_gib:
            raise UserError(
                f"launch.memory_gib: {who} {runs * needs.memory_gib:g}, "
                f"this machine has {memory_gib:.1f}"
            )


def workers_that_fit(needs: LaunchConfig, most: int) -> int:
    """How many runs this machine can train at a time: up to `most`, and no more than its CPUs."""
    for runs in range(min(most, num_cpus()), 1, -1):
        try:
            check_machine(needs, runs=runs)
        except UserError:
            continue
        return runs
    return 1


def num_cpus() -> int:
    """CPUs that this process may use; all of them where the system cannot say (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Lets torch compute with so many threads for a while; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def of_run(key: RunKey) -> str:
    """A run in the line of an interruption."""
    return f"of {shown(key)}"
