"""Arguments and options that several commands share. Light: `--help` reads it."""

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings that replace the recipe's.", metavar="KEY=VALUE"),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the resolved recipe and stop.")
]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run, such as runs/tiny.")]
