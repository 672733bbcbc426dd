"""`alignlab init`: recipes and data sets to begin with. Heavy imports happen inside."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from alignlab.config.paths import user_path

init_app = typer.Typer(
    help="Write a commented recipe, or an example data set.", no_args_is_help=True
)

Target = Annotated[
    Path, typer.Argument(parser=user_path, metavar="NAME", help="A name, or the file to write.")
]


@init_app.command("compare")
def init_compare(target: Target) -> None:
    """Write NAME.yaml, a comparison with comments that trains as it stands."""
    from alignlab.experiments.init_files import write_recipe

    path = write_recipe("compare", target)
    typer.echo(f"recipe: {path}\nnext: alignlab compare {quote(str(path))} --print-config")


@init_app.command("sweep")
def init_sweep(target: Target) -> None:
    """Write NAME.yaml, a sweep with comments that trains as it stands."""
    from alignlab.experiments.init_files import write_recipe

    path = write_recipe("sweep", target)
    typer.echo(f"recipe: {path}\nnext: alignlab sweep {quote(str(path))} --print-config")


@init_app.command("data")
def init_data(
    folder: Annotated[
        Path, typer.Argument(parser=user_path, metavar="FOLDER", help="The folder to make.")
    ],
) -> None:
    """Make a data set of four example clips, with metadata.jsonl and a README of the format."""
    from alignlab.experiments.init_files import write_data

    written = write_data(folder)
    typer.echo(
        f"data set: {written}\n"
        f"next: alignlab data preview tiny data.name=folder data.path={quote(str(written))}"
    )
