"""Arguments and options that several commands share. Light: `--help` reads it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from alignlab.config.paths import user_path
from alignlab.errors import UserError


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes by name and YAML files by path; with none of both, shells offer paths."""
    from alignlab.config.recipe_file import shipped_recipes

    names = [name for name in shipped_recipes() if name.startswith(incomplete)]
    folder, slash, begin = incomplete.rpartition("/")
    try:
        files = sorted(path.name for path in user_path(f"{folder}{slash}" or ".").glob("*.y*ml"))
    except (OSError, UserError):  # no folder that can be read
        return names
    return names + [f"{folder}{slash}{name}" for name in files if name.startswith(begin)]


Recipe = Annotated[
    str,
    typer.Argument(
        help="A YAML file, or the name of a shipped recipe.", autocompletion=complete_recipe
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings that replace the recipe's.", metavar="KEY=VALUE"),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the resolved recipe and stop.")
]
RunFolder = Annotated[
    Path,
    typer.Argument(parser=user_path, metavar="RUN", help="The folder of a run, such as runs/tiny."),
]
CheckpointStep = Annotated[
    int | None,
    typer.Option("--checkpoint", min=1, metavar="STEP", help="Which one (default: the newest)."),
]
Ema = Annotated[
    bool | None,
    typer.Option(
        help="The moving average of the weights, or the weights themselves (default: the average, "
        "if the recipe keeps one).",
        show_default=False,
    ),
]


def echo_mlflow(folder: Path, config: Any) -> None:
    """Says where MLflow shows the runs of a folder, if it has any."""
    from alignlab.tracking import runs_address

    address = runs_address(folder, config)
    if address is not None:
        typer.echo(f"mlflow: {address}")


def path_option(help: str) -> Any:
    """An option that takes a path, `~` included: `--out=~/x` is expanded by no shell."""
    return typer.Option(parser=user_path, metavar="PATH", help=help)
