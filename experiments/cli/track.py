"""`alignlab track`. Heavy imports happen inside it."""

import os
from pathlib import Path
from typing import Annotated

import typer

from alignlab.config.path_kinds import not_a_folder
from alignlab.config.paths import user_path
from alignlab.errors import UserError

PATIENCE_S = "30"  # for an answer: no training waits for this command


def track(
    folder: Annotated[
        Path,
        typer.Argument(
            parser=user_path,
            metavar="FOLDER",
            help="Of a run, a comparison or a sweep, or a folder that holds some.",
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(help="sqlite, or the address of an MLflow server (default: the recipe's)."),
    ] = None,
) -> None:
    """Send to MLflow what it lacks of a folder, and end there what is not being trained."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", PATIENCE_S)
    problem = not_a_folder(folder)
    if problem is not None:
        raise UserError(problem)
    from alignlab.experiments.send import send_folder

    sent = send_folder(folder, to=to)
    for address in sent.addresses:
        typer.echo(f"mlflow: {address}")
    if not sent.complete:
        raise typer.Exit(1)
