"""Who trains the runs of a comparison: this process, or the nodes of a Ray cluster."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.experiments.launchers.config import LaunchConfig
from alignlab.experiments.launchers.local import RunKey, launch_local
from alignlab.experiments.launchers.ray_runs import launch_ray

__all__ = ["Launcher", "LauncherName", "RunKey", "make_launcher", "refuse_unread_address"]

LauncherName = Literal["local", "ray"]

Launcher = Callable[[Mapping[RunKey, RunConfig], Callable[[RunKey], None]], None]
"""Trains all of these runs, whose folders exist, and tells which one has just been finished."""


def make_launcher(
    name: LauncherName, needs: LaunchConfig, *, ray_address: str | None = None
) -> Launcher:
    """The launcher of this name.

    Args:
        name: `local` or `ray`.
        needs: what each run needs of its machine.
        ray_address: `HOST:PORT` or `auto`; None: `RAY_ADDRESS`, else a new cluster here.

    Raises:
        UserError: an address for a launcher that reads none.
    """
    if name == "ray":
        return partial(launch_ray, needs=needs, address=ray_address)
    refuse_unread_address(ray_address)
    return partial(launch_local, needs=needs)


def refuse_unread_address(ray_address: str | None) -> None:
    """Refuses an address where the launcher is local.

    Raises:
        UserError: there is one.
    """
    if ray_address is not None:
        raise UserError("--ray-address: nothing reads it without --launcher ray")
