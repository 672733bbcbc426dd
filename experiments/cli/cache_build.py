"""`alignlab cache build`. Heavy imports happen inside it."""

from typing import Annotated

import typer

from alignlab.cli_options import Overrides, Recipe
from alignlab.experiments.cli.cache import cache_app as cache_app


@cache_app.command("build")
def build(
    recipe: Recipe,
    overrides: Overrides = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that encode at a time, on this machine.")
    ] = 1,
) -> None:
    """Encode all that the runs of a recipe read of their clips; what is there is skipped."""
    from alignlab.experiments.compare.config import load_runs
    from alignlab.runs.log_filters import quiet_libraries
    from alignlab.training.cache_build import build_cache

    runs = load_runs(recipe, overrides)
    with quiet_libraries():
        for built in build_cache(runs, workers=workers):
            typer.echo(
                f"{built.path}: {built.clips:,} clips, {built.encoded:,} of them encoded now "
                f"({built.size / 1e6:,.1f} MB)"
            )
