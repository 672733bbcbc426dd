"""Rows of a run's `metrics.jsonl`: one per logged step, as JSON, with `step` and `time`."""

import json
from collections.abc import Iterable, Mapping
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

    That is nothing for a run that starts anew, and never the evaluation at the end of a training.
    """
    if metrics.exists():
        rows = [r for r in read_rows(metrics) if r["step"] <= start and not _is_last(r)]
        rows = rows if start else []
        write_text(metrics, "".join(json.dumps(row) + "\n" for row in rows))


def evaluations(rows: Iterable[Mapping[str, float]]) -> dict[int, dict[str, float]]:
    """Metrics of the evaluations before the last step, by step, among the rows of a run."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if (has_validation(row) or has_generation(row)) and not _is_last(row):
            metrics = {k: v for k, v in row.items() if k not in ("step", "time")}
            found.setdefault(int(row["step"]), {}).update(metrics)
    return found


def has_validation(row: Mapping[str, float]) -> bool:
    """Whether a row holds a validation loss."""
    return any(key.startswith("val/") for key in row)


def has_generation(row: Mapping[str, float]) -> bool:
    """Whether a row holds metrics of generated clips."""
    return any(key.startswith("gen/") for key in row)


def _is_last(row: Mapping[str, float]) -> bool:
    """Whether a row is the evaluation at the end of a training, which has its costs as well."""
    return any(key.startswith("params/") for key in row)
