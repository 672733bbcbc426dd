"""`alignlab findings`. Heavy imports happen inside it."""

from pathlib import Path
from typing import Annotated

import typer

from alignlab.cli_options import path_option
from alignlab.cli_tables import print_table
from alignlab.config.paths import user_path
from alignlab.errors import MACHINE_ERROR


def findings(
    folder: Annotated[
        Path | None,
        typer.Argument(
            parser=user_path,
            metavar="FOLDER",
            help="With comparisons in it (default: the results that come with alignlab).",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, path_option("Also write the page as Markdown, such as docs/findings.md.")
    ] = None,
) -> None:
    """Show what came out of published findings that comparisons check."""
    from contextlib import nullcontext

    from alignlab.experiments.report.escaping import one_visible_line
    from alignlab.experiments.report.findings_page import (
        committed_findings,
        findings_markdown,
        read_findings,
    )
    from alignlab.runs.atomic_files import write_text
    from alignlab.runs.out_paths import out_file

    folder = committed_findings() if folder is None else folder
    with nullcontext() if out is None else out_file(out, ".md"):
        found, broken = read_findings(folder)
        rows = [
            [
                one_visible_line(one.judged.finding.claim),
                one_visible_line(one.judged.finding.source),
                "\n".join(map(one_visible_line, one.came_out)),
                one.judged.outcome,
            ]
            for one in found
        ]
        if rows:
            print_table(("claim", "source", "what came out", "verdict"), rows)
        for line in broken:
            typer.echo(f"error: {line}", err=True)
        if broken:
            if out is not None:
                typer.echo(f"error: {out} is not written: it would lack these", err=True)
            raise typer.Exit(MACHINE_ERROR)
        if out is not None:
            write_text(out, findings_markdown(found, folder, out))
            typer.echo(f"page: {out}")
