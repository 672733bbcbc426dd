"""`alignlab probe` and `alignlab teachers`. Heavy imports happen inside them."""

from pathlib import Path
from typing import Annotated

import typer

teachers_app = typer.Typer(help="Choose a teacher.", no_args_is_help=True)


def probe(
    run: Annotated[Path, typer.Argument(help="The folder of a run, such as runs/tiny.")],
    teacher: Annotated[
        str | None,
        typer.Option(help="Alias of the recipe (default: eval.teacher, or else the first)."),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(min=0, help="Whose tokens are shown (default: the last aligned block)."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write (default: RUN/probe).")] = None,
) -> None:
    """Compare every block of a run's model with a teacher, before and after training."""
    from alignlab.experiments.probe.page import probe as write

    typer.echo(f"probe: {write(run, out or run / 'probe', teacher=teacher, block=block)}")


@teachers_app.command("score")
def score(
    recipe: Annotated[str, typer.Argument(help="A run or a comparison: its teachers and data.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings that replace the recipe's.", metavar="KEY=VALUE"),
    ] = None,
    clips: Annotated[
        int | None, typer.Option(min=2, help="Val clips (default: eval.clips).")
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(help="Patches of every teacher, such as 14x14 (default: its own)."),
    ] = None,
    out: Annotated[Path, typer.Option(help="CSV file to write.")] = Path("teachers.csv"),
) -> None:
    """Score a recipe's teachers on its clips: steadiness over frames and spatial structure."""
    from alignlab.evaluation.teacher_score import parse_size, score_teachers
    from alignlab.experiments.probe.teacher_table import load_teachers, print_scores, write_scores

    size = None if grid is None else parse_size(grid)
    found = score_teachers(load_teachers(recipe, overrides), clips=clips, size=size)
    print_scores(found)
    write_scores(found, out)
    typer.echo(f"figures: {out}")
