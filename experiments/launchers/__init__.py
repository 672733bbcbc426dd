"""Who trains the runs of a comparison: this process, several here, nodes of Ray, or SLURM."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.launchers.config import LaunchConfig
from alignlab.experiments.launchers.local import launch_local
from alignlab.experiments.launchers.local_workers import launch_workers
from alignlab.experiments.launchers.ray_runs import launch_ray
from alignlab.experiments.launchers.run_progress import RunKey
from alignlab.experiments.launchers.slurm import launch_slurm
from alignlab.experiments.launchers.sources import check_folders

__all__ = ["Launcher", "LauncherName", "RunKey", "make_launcher", "refuse_unread_address"]

LauncherName = Literal["local", "ray", "slurm"]

Launcher = Callable[[Mapping[RunKey, RunConfig], Callable[[RunKey], None]], None]
"""Trains all of these runs, whose folders exist, and tells which one has just been finished."""


def make_launcher(
    name: LauncherName,
    needs: LaunchConfig,
    *,
    workers: int | None = None,
    command: Sequence[str] = (),
    ray_address: str | None = None,
) -> Launcher:
    """The launcher of this name.

    Args:
        name: `local`, `ray` or `slurm`.
        needs: what each run needs of its machine.
        workers: how many runs are trained at a time: on this machine, None is one; by SLURM, as
            many as it gives.
        command: recipe and overrides, as local workers are started with them; read if there are
            several.
        ray_address: `HOST:PORT` or `auto`; None: `RAY_ADDRESS`, else a new cluster here.

    Raises:
        UserError: an address or a number of workers for a launcher that reads none.
    """
    if name == "ray":
        if workers is not None:
            raise UserError(
                "--workers: on Ray as many runs are trained at a time as its nodes hold "
                "(launch.cpus, launch.gpus)"
            )
        return partial(launch_ray, needs=needs, address=ray_address)
    refuse_unread_address(ray_address)
    if name == "slurm":
        return partial(_launch_here, partial(launch_slurm, needs=needs, workers=workers))
    if workers is not None and workers > 1:
        several = partial(launch_workers, needs=needs, workers=workers, command=command)
        return partial(_launch_here, several)
    return partial(_launch_here, partial(launch_local, needs=needs))


def _launch_here(
    launch: Launcher, runs: Mapping[RunKey, RunConfig], finished: Callable[[RunKey], None]
) -> None:
    check_folders(runs)  # nodes of a cluster may have others than this machine
    launch(runs, finished)


def refuse_unread_address(ray_address: str | None) -> None:
    """Refuses an address where the launcher is local.

    Raises:
        UserError: there is one.
    """
    if ray_address is not None:
        raise UserError("--ray-address: nothing reads it without --launcher ray")
