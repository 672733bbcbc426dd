"""`alignlab plan`. Heavy imports happen inside it."""

from typing import Annotated

import typer

from alignlab.cli_options import Overrides, Recipe
from alignlab.cli_tables import AsJson, print_json, print_table


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="That train: one run together, others a run each (launch.gpus)."),
    ] = None,
    memory: Annotated[float, typer.Option(min=1, max=1e6, help="Of a GPU, in GiB.")] = 80.0,
    tflops: Annotated[
        float,
        typer.Option(
            min=0.001, max=1e9, help="Achieved by a GPU in bf16, in TF/s; in fp32 a fifth of it."
        ),
    ] = 400.0,
    clips: Annotated[
        int | None,
        typer.Option(min=1, help="Of the data set (default: the recipe's, or all drawn)."),
    ] = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Fetch config.json files of hub ids; no weights.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a recipe costs before it is trained: operations, memory, bytes, days.

    No weights are read, and no data: models are built of their config.json files alone.
    """
    import logging
    from contextlib import ExitStack

    from alignlab.experiments.plan.comparison import plan_recipe
    from alignlab.experiments.plan.fits import changes_to_fit
    from alignlab.experiments.plan.rates import Rates
    from alignlab.experiments.plan.recipe_runs import recipe_runs
    from alignlab.experiments.plan.table import as_json as plain
    from alignlab.experiments.plan.table import plan_lines, plan_tables
    from alignlab.plan.architecture import Architectures
    from alignlab.runs.log_filters import quiet_libraries
    from alignlab.units import GIB

    runs, most = recipe_runs(recipe, overrides), int(memory * GIB)
    log = logging.getLogger("alignlab")
    with ExitStack() as stack:
        stack.enter_context(quiet_libraries())
        stack.callback(log.setLevel, log.level)
        log.setLevel(logging.WARNING)  # no grids, no choice of kernels
        architectures = Architectures(stack, fetch=fetch)
        planned = plan_recipe(runs, architectures, gpus=gpus, rates=Rates(tflops), clips=clips)
        highest = planned.highest
        changes = changes_to_fit(highest.config, highest.plan, architectures, most)
    if as_json:
        print_json(plain(planned, most, changes))
        return
    for title, header, rows in plan_tables(planned, most, changes):
        print_table(header, rows, title)
    for line in plan_lines(planned, most, changes):
        typer.echo(line)
