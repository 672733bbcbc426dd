"""Options of the command line that say where runs are trained. Light: `--help` reads it."""

from typing import Annotated, Literal

import typer

LauncherName = Annotated[
    Literal["local", "ray"],
    typer.Option("--launcher", help="Train here, or on the nodes of a Ray cluster."),
]
CompareLauncherName = Annotated[
    Literal["local", "ray", "slurm"],
    typer.Option("--launcher", help="Train here, on the nodes of a Ray cluster, or as SLURM jobs."),
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="HOST:PORT or auto; left out: RAY_ADDRESS, else a new cluster here."),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="How many run at a time; left out: one; on Ray, as many as its nodes hold.",
    ),
]
