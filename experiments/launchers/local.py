"""Runs one after another in this process, which share their encoded clips."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import ceil
from pathlib import Path

import torch

from alignlab import interruption
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.evaluation.intermediate import OnEvaluation
from alignlab.experiments.launchers.config import LaunchConfig
from alignlab.experiments.launchers.run_progress import RunKey, RunsProgress
from alignlab.experiments.launchers.several_ranks import train_ranks
from alignlab.progress import tell
from alignlab.train import train
from alignlab.training.setup import Caches, shared_caches
from alignlab.units import GIB


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
                train_one(run, caches, needs, wait=False)
            finished(key)
            ended(key)


def train_one(
    run: RunConfig,
    caches: dict[str, Caches],
    needs: LaunchConfig,
    *,
    wait: bool,
    on_evaluation: OnEvaluation | None = None,
) -> Path:
    """Trains, or resumes, a run, as the only command that writes its folder, which it returns.

    A run of one rank is trained in this process, one of several in processes of their own.

    Args:
        run: its recipe.
        caches: encoded clips of the runs that this process has trained; those that this run can
            share are used, new ones are added. Ranks in processes of their own keep theirs.
        needs: how many ranks train it.
        wait: wait for another process that trains the run; else refuse.
        on_evaluation: as `alignlab.train.train` takes it.

    Raises:
        UserError: the run cannot be trained, or another process trains it and `wait` is false.
        ChildProcessError: the machine ended one of several ranks.
    """
    if needs.num_ranks > 1:
        ranks, cpus = needs.num_ranks, needs.cpus
        return train_ranks(run, ranks, wait=wait, cpus=cpus, on_evaluation=on_evaluation)
    shared = shared_caches(run, caches)
    return train(run, caches=shared, wait=wait, on_evaluation=on_evaluation)


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
    if needs.gpus and not _holds(gpus, needs.gpus, runs):
        share = f"{needs.gpus:g}" if runs == 1 else f"{needs.gpus:g} each"
        raise UserError(f"launch.gpus: {who} {share}, this machine has {gpus or 'none'}")
    if needs.gpus is None and needs.num_ranks > 1 and 0 < gpus < runs * needs.num_ranks:
        raise UserError(
            f"launch.ranks: {who} {runs * needs.num_ranks} GPUs, a rank on each, this machine has "
            f"{gpus}"
        )
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


def _holds(gpus: int, needed: float, runs: int) -> bool:
    """Whether so many GPUs are enough for so many runs at a time."""
    if needed > 1:
        return runs * needed <= gpus
    return gpus > 0 and ceil(runs / gpus) * needed <= 1


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
