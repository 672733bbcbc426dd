"""Scores of teachers as a table on the terminal and as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignlab.evaluation.teacher_score import NEIGHBOURS, TeacherScore
from alignlab.experiments.report.escaping import csv_cell
from alignlab.metrics.frequency import BANDS
from alignlab.runs.atomic_files import write_text

SPATIAL = ("lds", "cds", "srss", "rmsc")
POWER = tuple(f"power {low:g} to {min(high, 1.0):g}" for low, high in BANDS)
COST = ("seconds per clip", "weights MiB", "peak MiB", "features MiB per clip")
READING = (
    "iicr k: IICR-like, share of a frame's k nearest frames that are of its own clip (cannot reach "
    "1 once k exceeds the frames of a clip less one); chance: by guessing. lds, cds, srss, rmsc: "
    "iREPA's measures of spatial structure; higher is better in all of these. power: shares by "
    "frequency over the frame. stability: cosine from frame to frame at the same place. —: too few "
    "frames, too small a grid, or no masks."
)


def print_scores(scores: Sequence[TeacherScore]) -> None:
    """A table with one column per teacher, and how to read it."""
    table = Table("teacher", *(escape(score.alias) for score in scores))
    for name, *texts in score_rows(scores):
        table.add_row(name, *map(escape, texts))
    console = Console()
    console.print(table)
    console.print(READING, style="dim", highlight=False)


def score_rows(scores: Sequence[TeacherScore]) -> list[tuple[str, ...]]:
    """What a table shows: a row per fact and measure, its name first, then a text per teacher."""
    rows: list[tuple[str, ...]] = [
        ("family", *(score.config.family for score in scores)),
        ("feature", *(str(score.config.feature) for score in scores)),
        ("frames and patches", *("x".join(map(str, score.grid)) for score in scores)),
    ]
    values = zip(*map(_values, scores), strict=True)
    for name, numbers in zip(_names(), values, strict=True):
        rows.append((name, *("—" if v is None else f"{v:.3f}" for v in numbers)))
    return rows


def write_scores(
    scores: Sequence[TeacherScore], pairs: Mapping[tuple[str, str], float], out: Path
) -> None:
    """One row per teacher; a number that could not be taken is left empty.

    Args:
        scores: of the teachers.
        pairs: CKA of every two of them, in columns `cka_<alias>`.
        out: the file.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    head = ("teacher", "family", "path", "feature", "frames", "height", "width")
    measures = (name.replace(" ", "_") for name in _names())
    rows.writerow(map(csv_cell, (*head, *measures, *(f"cka_{score.alias}" for score in scores))))
    for score in scores:
        config = score.config
        facts = (score.alias, config.family, config.path, config.feature, *score.grid)
        alike = (
            pairs.get((score.alias, other.alias), pairs.get((other.alias, score.alias)))
            for other in scores
        )
        values = ("" if v is None else v for v in (*_values(score), *alike))
        rows.writerow(map(csv_cell, (*facts, *values)))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text.getvalue())


def _names() -> list[str]:
    return [*(f"iicr {k}" for k in NEIGHBOURS), "chance", *SPATIAL, *POWER, "stability", *COST]


def _values(score: TeacherScore) -> list[float | None]:
    spatial = (score.spatial.get(name) for name in SPATIAL)
    power = score.frequency or (None,) * len(BANDS)
    cost = score.cost
    costs = (cost.seconds, cost.weights_mib, cost.peak_mib, cost.features_mib)
    iicr = (score.iicr.get(k) for k in NEIGHBOURS)
    return [*iicr, score.chance, *spatial, *power, score.stability, *costs]
