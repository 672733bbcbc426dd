"""`alignlab sweep`. Heavy imports happen inside it."""

from typing import Annotated

import typer

from alignlab.cli_options import Overrides, PrintConfig, Recipe, echo_mlflow
from alignlab.experiments.cli.launch_options import LauncherName, RayAddress, Workers
from alignlab.passwords import without_password


def sweep(
    recipe: Recipe,
    overrides: Overrides = None,
    workers: Workers = None,
    join: Annotated[
        bool, typer.Option("--join", help="Help with a sweep begun elsewhere, on its storage.")
    ] = False,
    launcher: LauncherName = "local",
    ray_address: RayAddress = None,
    print_config: PrintConfig = False,
) -> None:
    """Search the settings of a run with Optuna, or resume a killed sweep."""
    from alignlab.experiments.sweep.config import dump_sweep, load_sweep

    config = load_sweep(recipe, overrides)
    if print_config:
        typer.echo(without_password(dump_sweep(config)), nl=False)
        return
    from alignlab.experiments.sweep import run
    from alignlab.experiments.sweep.launch import make_sweep_launcher

    command = [recipe, *(overrides or ())]
    trial_launcher = make_sweep_launcher(
        launcher, workers=workers, command=command, join=join, ray_address=ray_address
    )
    if join:
        run.join(config, launcher=trial_launcher)
    else:
        results = run.sweep(config, launcher=trial_launcher)
        typer.echo(f"results: {results}")
        echo_mlflow(results.parent, config.base)
