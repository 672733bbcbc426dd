"""`alignlab cache build`. Heavy imports happen inside it."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from alignlab.cli_options import Overrides, Recipe
from alignlab.errors import UserError
from alignlab.experiments.cli.cache import cache_app as cache_app
from alignlab.experiments.cli.launch_options import RayAddress

if TYPE_CHECKING:
    from alignlab.training.cache_build import Encoders

BuildLauncher = Annotated[
    Literal["local", "ray"],
    typer.Option("--launcher", help="Encode here, or on the nodes of a Ray cluster."),
]


@cache_app.command("build")
def build(
    recipe: Recipe,
    overrides: Overrides = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that encode at a time, on this machine (default: 1)."),
    ] = None,
    launcher: BuildLauncher = "local",
    ray_address: RayAddress = None,
) -> None:
    """Encode all that the trainings of a recipe read of their clips; what is there is skipped."""
    from contextlib import ExitStack

    from alignlab.dataset_cache.disk_room import size_text
    from alignlab.experiments.compare.config import load_trainings
    from alignlab.experiments.launchers import refuse_unread_address
    from alignlab.experiments.launchers.local import threads
    from alignlab.experiments.launchers.ray_cache import OnRay
    from alignlab.runs.log_filters import quiet_libraries
    from alignlab.training.cache_build import Here, LocalProcesses, build_cache

    trainings, needs = load_trainings(recipe, overrides)
    encoders: Encoders
    with ExitStack() as stack:
        stack.enter_context(quiet_libraries())
        if launcher == "ray":
            if workers is not None:
                raise UserError(
                    "--workers: on Ray as many processes encode at a time as its nodes hold "
                    "(launch.cpus, launch.gpus)"
                )
            encoders = stack.enter_context(OnRay(needs, ray_address))
        else:
            refuse_unread_address(ray_address)
            # as the trainings will compute: on a CPU it is part of what is encoded
            stack.enter_context(threads(needs.cpus))
            encoders = LocalProcesses(workers) if workers and workers > 1 else Here()
        for built in build_cache(trainings, encoders):
            typer.echo(
                f"{built.path}: {built.clips:,} clips, {built.encoded:,} of them encoded now "
                f"({size_text(built.size)})"
            )
