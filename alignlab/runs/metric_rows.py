"""Rows of a run's `metrics.jsonl`: one per logged step, as JSON, with `step` and `time`."""

import json
from collections.abc import Mapping
from pathlib import Path

from alignlab.runs.atomic_files import named_errors, write_text


def append_row(metrics: Path, row: Mapping[str, float]) -> None:
    """Adds a row to the file, which is made if need be."""
    with named_errors(metrics), metrics.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(metrics: Path) -> list[dict[str, float]]:
    """Rows of `metrics.jsonl`; a last line cut off by a kill is left out."""
    if not metrics.exists():
        return []
    lines = metrics.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def keep_rows(metrics: Path, start: int) -> None:
    """Keeps what resuming from step `start` will not write again.

    That is nothing for a run that starts anew, and never the evaluation, which comes last.
    """
    if metrics.exists():
        rows = [r for r in read_rows(metrics) if r["step"] <= start and not _is_evaluation(r)]
        rows = rows if start else []
        write_text(metrics, "".join(json.dumps(row) + "\n" for row in rows))


def _is_evaluation(row: Mapping[str, float]) -> bool:
    return any(key.startswith("val/") for key in row)
