"""`alignlab report`. Heavy imports happen inside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from alignlab.cli_options import path_option
from alignlab.config.paths import user_path
from alignlab.errors import UserError

Folders = Annotated[
    list[Path],
    typer.Argument(parser=user_path, metavar="FOLDER", help="Of comparisons that have finished."),
]


def report(
    folders: Folders,
    out: Annotated[
        Path | None, path_option("Folder to write (default: that of the one comparison).")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Metrics to show, such as val/flow,cknna (default: all).")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Variant that differences are taken to.")
    ] = None,
    variants: Annotated[
        str | None, typer.Option(help="Variants to show besides the baseline (default: all).")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds to show (default: all).")] = None,
    power: Annotated[
        float | None,
        typer.Option(help="Say how many seeds find a true difference of this size, write nothing."),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Of --power (default: val/flow).")] = None,
) -> None:
    """Write the report of comparisons again, of a part or of several as one, or plan seeds."""
    from alignlab.experiments.compare.rebuild import Choice, rebuild

    choice = Choice(
        variants=_listed("--variants", variants, str),
        seeds=_listed("--seeds", seeds, int),
        metrics=_listed("--metrics", metrics, str),
        baseline=baseline,
    )
    if power is not None:
        if out is not None:
            raise UserError("--power: nothing is written, so leave out --out")
        _print_power(folders, choice, power, metric or "val/flow")
        return
    if metric is not None:
        raise UserError("--metric: it is of --power; a report takes --metrics")
    from rich.console import Console

    from alignlab.experiments.report.text import print_summary

    comparison, path = rebuild(folders, out, choice)
    print_summary(comparison, Console())
    typer.echo(f"report: {path}")


def _print_power(folders: list[Path], choice: Any, power: float, metric: str) -> None:
    from rich.console import Console

    from alignlab.experiments.compare.rebuild import chosen
    from alignlab.experiments.report.power import print_seeds_needed, seeds_needed
    from alignlab.experiments.report.summary import summary_rows

    rows = summary_rows(chosen(folders, None, choice))
    print_seeds_needed(rows, metric, power, seeds_needed(rows, metric, power), Console())


def _listed(option: str, text: str | None, kind: Callable[[str], Any]) -> tuple[Any, ...] | None:
    """What stands between commas; None where the option was not given."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UserError(f"{option}: {text!r} lists nothing between two commas")
    try:
        return tuple(kind(part) for part in parts)
    except ValueError:
        raise UserError(
            f"{option}: expected whole numbers with commas between, got {text!r}"
        ) from None
