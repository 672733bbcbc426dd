"""`alignlab verify`. Heavy imports happen inside it."""

from pathlib import Path
from typing import Annotated

import typer

from alignlab.config.path_kinds import not_a_folder
from alignlab.config.paths import user_path
from alignlab.errors import UserError

Folder = Annotated[
    Path,
    typer.Argument(
        parser=user_path,
        metavar="FOLDER",
        help="Of a run, a Stage 1 network, a comparison or a sweep.",
    ),
]


def verify(folder: Folder) -> None:
    """Check every file of a run, Stage 1 network, comparison or sweep; exit 1 if one is damaged."""
    problem = not_a_folder(folder)
    if problem is not None or not folder.is_dir():
        raise UserError(problem or f"{folder}: no such folder")
    from alignlab.experiments.verify import verify_folder

    found = verify_folder(folder)
    for line in found.damaged.values():
        typer.echo(line)
    for line in found.unknown:
        typer.echo(f"note: {line}")
    if found.damaged:
        typer.echo(f"{len(found.files)} files, {len(found.damaged)} damaged")
        raise typer.Exit(1)
    typer.echo(f"{len(found.files)} files, all whole")
