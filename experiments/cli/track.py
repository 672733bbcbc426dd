"""`alignlab track`. Heavy imports happen inside it."""

import os
from pathlib import Path
from typing import Annotated

import typer

from alignlab.config.paths import user_path

# Nothing waits for this command: it may wait longer than a training does.
PATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}


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
    for name, value in PATIENT.items():
        os.environ.setdefault(name, value)
    from alignlab.experiments.send import send_folder

    sent = send_folder(folder, to=to)
    for address in sent.addresses:
        typer.echo(f"mlflow: {address}")
    if not sent.complete:
        raise typer.Exit(1)
