"""`alignlab compare` and `alignlab demo`. Heavy imports happen inside them."""

from typing import Annotated

import typer

from alignlab.cli_options import Overrides, PrintConfig, Recipe, echo_mlflow
from alignlab.errors import UserError
from alignlab.experiments.cli.launch_options import CompareLauncherName, RayAddress, Workers
from alignlab.passwords import without_password

DEMO_WORKERS = 2
"""Its tensors are small: of two cores, one for each run is faster than both for one after another
(docs/performance.md)."""


def compare(
    recipe: Recipe,
    overrides: Overrides = None,
    workers: Workers = None,
    join: Annotated[
        bool, typer.Option("--join", help="Train runs that no other process trains, and stop.")
    ] = False,
    aa: Annotated[
        bool,
        typer.Option("--aa", help="Train the baseline twice: how far do equal trainings differ?"),
    ] = False,
    launcher: CompareLauncherName = "local",
    ray_address: RayAddress = None,
    list_runs: Annotated[
        bool, typer.Option("--list-runs", help="Print the recipes of untrained runs and stop.")
    ] = False,
    print_config: PrintConfig = False,
) -> None:
    """Train every variant of a comparison over its seeds and write the report."""
    from alignlab.experiments.compare.config import dump_compare, load_compare, show_variants

    overrides = [*(overrides or ()), *(["aa=true"] if aa else [])]  # also those of the workers
    config = load_compare(recipe, overrides)
    if print_config:
        typer.echo(without_password(dump_compare(config) + show_variants(config)), nl=False)
        return
    from alignlab.experiments.compare import run
    from alignlab.experiments.launchers import make_launcher

    is_launched = launcher != "local" or ray_address is not None or workers is not None
    if list_runs:
        if is_launched or join:
            raise UserError(
                "--list-runs: nothing is trained, so leave out --launcher, --workers and --join"
            )
        for path in run.unfinished(config):
            typer.echo(path)
        return
    if join:
        if is_launched:
            raise UserError("--join: this process trains, so leave out --launcher and --workers")
        run.join(config)
        return
    run_launcher = make_launcher(
        launcher,
        config.launch,
        workers=workers,
        command=[recipe, *overrides],
        ray_address=ray_address,
    )
    report = run.compare(config, launcher=run_launcher)
    typer.echo(f"report: {report}")
    echo_mlflow(report.parent, config.base)


def demo(
    overrides: Overrides = None, workers: Workers = None, print_config: PrintConfig = False
) -> None:
    """Run the shipped comparison `demo`: offline, on a CPU, in minutes.

    Two processes train its runs, unless `--workers` says otherwise or the machine has too little.
    """
    if workers is None and not print_config:
        from alignlab.experiments.compare.config import load_compare
        from alignlab.experiments.launchers.local import workers_that_fit

        workers = workers_that_fit(load_compare("demo", overrides).launch, DEMO_WORKERS)
    compare("demo", overrides, workers=workers, print_config=print_config)
