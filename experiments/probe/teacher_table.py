"""Scores of teachers as a table on the terminal and as CSV."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignlab.evaluation.teacher_score import NEIGHBOURS, TeacherScore
from alignlab.experiments.report.escaping import csv_cell
from alignlab.runs.atomic_files import write_text

SPATIAL = ("lds", "cds", "srss", "rmsc")
READING = (
    "iicr k: IICR-like, share of a frame's k nearest frames that are of its own clip (cannot reach "
    "1 once k exceeds the frames of a clip less one); chance: by guessing. lds, cds, srss, rmsc: "
    "iREPA's measures of spatial structure. Higher is better in all; —: too few frames, too "
    "small a grid, or no masks."
)


def print_scores(scores: Sequence[TeacherScore]) -> None:
    """A table with one column per teacher, and how to read it."""
    table = Table("teacher", *(escape(score.alias) for score in scores))
    table.add_row("family", *(score.config.family for score in scores))
    table.add_row("feature", *(str(score.config.feature) for score in scores))
    table.add_row("frames and patches", *("x".join(map(str, s.grid)) for s in scores))
    values = zip(*map(_values, scores), strict=True)
    for name, numbers in zip(_names(), values, strict=True):
        table.add_row(name, *("—" if v is None else f"{v:.3f}" for v in numbers))
    console = Console()
    console.print(table)
    console.print(READING, style="dim", highlight=False)


def write_scores(scores: Sequence[TeacherScore], out: Path) -> None:
    """One row per teacher; a number that could not be taken is left empty."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    head = ("teacher", "family", "path", "feature", "frames", "height", "width")
    rows.writerow((*head, *(name.replace(" ", "_") for name in _names())))
    for score in scores:
        config = score.config
        values = ("" if v is None else v for v in _values(score))
        facts = (score.alias, config.family, config.path, config.feature, *score.grid)
        rows.writerow(map(csv_cell, (*facts, *values)))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text.getvalue())


def _names() -> list[str]:
    return [*(f"iicr {k}" for k in NEIGHBOURS), "chance", *SPATIAL]


def _values(score: TeacherScore) -> list[float | None]:
    spatial = (score.spatial.get(name) for name in SPATIAL)
    return [*(score.iicr.get(k) for k in NEIGHBOURS), score.chance, *spatial]
