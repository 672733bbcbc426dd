"""`alignlab runs`: how far the runs below a folder are. Heavy imports happen inside it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alignlab.cli_tables import AsJson, print_json, print_table
from alignlab.config.paths import user_path

if TYPE_CHECKING:
    from alignlab.experiments.run_table import GroupRow, RunRow

RARELY_LOOKED_AT = ("finished", "not begun")


def runs(
    folder: Annotated[
        Path,
        typer.Argument(parser=user_path, metavar="FOLDER", help="Where runs lie, such as runs."),
    ] = Path("runs"),
    all_runs: Annotated[
        bool,
        typer.Option("--all", help="Also the finished and waiting runs of comparisons and sweeps."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the runs below a folder: state, step, loss, time left. Reads files, writes nothing."""
    from alignlab.experiments.run_table import GroupRow, runs_below

    rows = runs_below(folder)
    if as_json:
        print_json([row.as_json() for row in rows])
        return
    if not rows:
        typer.echo(f"no runs below {folder}")
        return
    is_of_one = len(rows) == 1 and isinstance(rows[0], GroupRow)
    shown: list[tuple[str, ...]] = []
    for row in rows:
        if isinstance(row, GroupRow):
            shown += _group(row, show_all=all_runs or is_of_one)
        else:
            shown.append(_run(row))
    print_table(("run", "state", "step", "loss", "time left"), shown)


def _group(group: "GroupRow", *, show_all: bool) -> list[tuple[str, ...]]:
    from alignlab.errors import printable
    from alignlab.progress import shown_duration

    count = f"{group.num_ended} of {group.planned} runs"
    left = "" if group.left_s is None else shown_duration(group.left_s)
    rows: list[tuple[str, ...]] = [
        (f"{printable(group.name)} ({group.kind})", group.state, count, "", left)
    ]
    for run in group.runs:
        if show_all or run.state not in RARELY_LOOKED_AT:
            rows.append(_run(run, "  "))
    return rows


def _run(run: "RunRow", indent: str = "") -> tuple[str, ...]:
    from alignlab.errors import printable
    from alignlab.progress import shown_duration

    state = f"{run.state}: {run.problem}" if run.problem else run.state
    step = "" if run.steps is None else f"{run.step or 0} of {run.steps}"
    loss = "" if run.loss is None else f"{run.loss:.4f}"
    left = "" if run.left_s is None else shown_duration(run.left_s)
    return indent + printable(run.name), printable(state), step, loss, left
