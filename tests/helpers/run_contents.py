"""What a run leaves behind, in forms that can be compared."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import pandas as pd

from alignlab.runs.metric_rows import read_rows

Value = TypeVar("Value")


def timeless(values: Mapping[str, Value]) -> dict[str, Value]:
    """The values without those that a clock or the memory gives."""
    return {
        key: value
        for key, value in values.items()
        if key != "time" and not key.startswith(("time/", "memory/"))
    }


def timeless_rows(run: Path) -> list[dict[str, float]]:
    """The rows of a run's log, without what a clock or the memory gives."""
    return [timeless(row) for row in read_rows(run / "metrics.jsonl")]


def timeless_metrics(run: Path) -> dict[str, float]:
    """The metrics of a finished run, without what a clock or the memory gives."""
    return timeless(json.loads((run / "result.json").read_text())["metrics"])


def file_contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder, by its path in there."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def timeless_contents(folder: Path) -> dict[str, bytes]:
    """`file_contents` without the marks that checkpoints keep of the log, in which times are."""
    return {
        name: held for name, held in file_contents(folder).items() if Path(name).name != "log.json"
    }


def table_frame(path: Path) -> pd.DataFrame:
    """A CSV file as a frame, its numbers as they were written and NaN where there is nothing."""

    def cell(text: str) -> object:
        try:
            return float(text or "nan")
        except ValueError:
            return text

    return pd.DataFrame([{k: cell(v) for k, v in row.items()} for row in read_table(path)])


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open() as file:
        return list(csv.DictReader(file))
