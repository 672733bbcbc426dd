"""`alignlab probe`, `alignlab teachers score` and `alignlab data preview`.

Heavy imports happen inside them.
"""

from pathlib import Path
from typing import Annotated

import typer

from alignlab.cli_options import CheckpointStep, Ema, Overrides, Recipe, RunFolder, path_option

teachers_app = typer.Typer(help="Choose a teacher.", no_args_is_help=True)


def probe(
    run: RunFolder,
    teacher: Annotated[
        str | None,
        typer.Option(help="Alias of the recipe (default: eval.teacher, or else the first)."),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(min=0, help="Whose tokens are shown (default: the last aligned block)."),
    ] = None,
    out: Annotated[Path | None, path_option("Folder to write (default: RUN/probe).")] = None,
    checkpoint: CheckpointStep = None,
    ema: Ema = None,
) -> None:
    """Compare every block of a run's model with a teacher, before and after training."""
    from alignlab.experiments.probe.page import probe as write
    from alignlab.training.checkpoint import ModelChoice

    choice = ModelChoice(checkpoint, ema)
    page = write(run, out, teacher=teacher, block=block, choice=choice)
    typer.echo(f"probe: {page}")


@teachers_app.command("score")
def score(
    recipe: Annotated[str, typer.Argument(help="A run or a comparison: its teachers and data.")],
    overrides: Overrides = None,
    clips: Annotated[
        int | None, typer.Option(min=2, help="Val clips (default: eval.clips).")
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(help="Patches of every teacher, such as 14x14 (default: its own)."),
    ] = None,
    out: Annotated[Path, path_option("CSV file to write.")] = Path("teachers.csv"),
) -> None:
    """Compare a recipe's teachers on its clips: what they tell apart, how fine, at what cost.

    Beside the CSV file a page is written, of the same name.
    """
    from alignlab.evaluation.teacher_pairs import similar_pairs
    from alignlab.evaluation.teacher_score import parse_size, score_teachers
    from alignlab.experiments.compare.config import load_base
    from alignlab.experiments.probe.teacher_page import write_page
    from alignlab.experiments.probe.teacher_table import print_scores, write_scores
    from alignlab.runs.out_paths import out_file

    page = out.with_suffix(".html")
    with out_file(out, ".csv"), out_file(page, ".html"):
        size = None if grid is None else parse_size(grid)
        config = load_base(recipe, overrides)
        scores, samples = score_teachers(config, clips=clips, size=size)
        print_scores(scores)
        pairs = similar_pairs(scores)
        write_scores(scores, pairs, out)
        write_page(scores, samples, pairs, page, name=config.name)
    typer.echo(f"figures: {out}\npage: {page}")


def preview(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[Path, path_option("Folder to write.")] = Path("preview"),
    clips: Annotated[int, typer.Option(min=1, help="How many clips.")] = 8,
) -> None:
    """Write a page with clips of a recipe's data set, their captions, references and masks."""
    from alignlab.experiments.data_preview import load_data
    from alignlab.experiments.data_preview import preview as write

    data, output = load_data(recipe, overrides)
    typer.echo(f"preview: {write(data, out, clips, memory=output)}")
