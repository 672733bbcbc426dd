"""`alignlab tune`. Heavy imports happen inside it."""

from typing import Annotated

import typer

from alignlab.cli_options import Overrides, PrintConfig, Recipe, echo_mlflow
from alignlab.passwords import without_password


def tune(
    recipe: Recipe,
    overrides: Overrides = None,
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="Trials of each variant (default: the recipe's tune.trials)."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="How many runs are trained at a time (default: one).")
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry", help="Print what would be searched and trained, and stop.")
    ] = False,
    print_config: PrintConfig = False,
) -> None:
    """Tune every variant of a comparison alike, then compare the best of each on fresh seeds.

    Each variant is swept with the same number of trials of the same length, by the same sampler, on
    the tuning seeds; then the best settings are compared. The same command resumes.
    """
    from alignlab.experiments.tune.plan import check, dump_tune, load_tune, shown_spaces

    plan = load_tune(recipe, overrides, trials=trials)
    if print_config:
        typer.echo(without_password(dump_tune(plan)), nl=False)
        return
    if dry:
        check(plan)
        for line in (*shown_spaces(plan), plan.sentence):
            typer.echo(line)
        return
    from alignlab.experiments.tune import run

    report = run.tune(plan, workers=workers)
    typer.echo(f"report: {report}")
    echo_mlflow(report.parent, plan.config.base)
