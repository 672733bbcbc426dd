"""Options of the command line that say where runs are trained. Light: `--help` reads it."""

from typing import Annotated, Literal

import typer

from alignlab.errors import UserError


def _refuse_ray(launcher: str) -> str:
    if launcher == "ray":
        raise UserError(
            "--launcher ray trains comparisons only: give a sweep helpers on other machines with "
            "`alignlab sweep RECIPE --join` there (docs/clusters.md)"
        )
    return launcher


LauncherName = Annotated[
    Literal["local", "ray"],
    typer.Option("--launcher", help="Train here, or on the nodes of a Ray cluster."),
]
SweepLauncher = Annotated[
    Literal["local", "ray"], typer.Option("--launcher", hidden=True, callback=_refuse_ray)
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="HOST:PORT or auto [default: RAY_ADDRESS, else a new cluster here]."),
]
