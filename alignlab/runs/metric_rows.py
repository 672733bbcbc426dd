"""Rows of a run's `metrics.jsonl`: one per logged step, as JSON, with `step` and `time`.

A checkpoint says which bytes the file held when it was written (`LogMark`), and a finished run's
result its checksum: rows that were lost or changed since are seen.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from alignlab.errors import UserError, one_line
from alignlab.runs.atomic_files import named_errors, sync_file, write_text
from alignlab.runs.checksums import DamagedError

log = logging.getLogger(__name__)

TAIL = 2**16  # bytes; the last row of a log is shorter


@dataclass(frozen=True)
class LogMark:
    """What `metrics.jsonl` held at some moment; later rows follow it.

    Args:
        rows: how many.
        bytes: their length.
        sha256: of these bytes.
    """

    rows: int
    bytes: int
    sha256: str


def append_row(metrics: Path, row: Mapping[str, float]) -> None:
    """Adds a row to the file, which is made if need be."""
    with named_errors(metrics), metrics.open("a") as file:
        file.write(json.dumps(row) + "\n")


def mark_log(metrics: Path) -> LogMark:
    """What the file holds now; it is on the disk then, so that no checkpoint is without its log."""
    if not metrics.exists():
        return LogMark(0, 0, hashlib.sha256().hexdigest())
    sync_file(metrics)
    content = metrics.read_bytes()
    return LogMark(content.count(b"\n"), len(content), hashlib.sha256(content).hexdigest())


def check_log(metrics: Path, mark: LogMark | None) -> tuple[str, ...]:
    """Refuses a log that does not begin with the rows that a checkpoint was written after.

    Args:
        metrics: the file; what follows these rows will be written again.
        mark: of the checkpoint; None: it is older than marks.

    Returns:
        What the result has to say: the file is gone.

    Raises:
        UserError: the rows were cut or changed.
    """
    if mark is None:
        return ()
    fix = (
        "copy it back from elsewhere, or remove it: the run then resumes without these rows, and "
        "says so"
    )
    if metrics.is_dir():
        raise DamagedError(metrics, "it is a folder", fix)
    if not metrics.exists():
        if not mark.rows:
            return ()
        note = f"metrics.jsonl was gone at a resume: its first {mark.rows} rows are lost"
        log.warning("%s: %s", metrics.parent, note)
        return (note,)
    with metrics.open("rb") as file:
        content = file.read(mark.bytes)
    if len(content) < mark.bytes:
        what = f"it has {len(content)} of the {mark.bytes} bytes of its first {mark.rows} rows"
        raise DamagedError(metrics, what, fix)
    if hashlib.sha256(content).hexdigest() != mark.sha256:
        raise DamagedError(metrics, f"its first {mark.rows} rows were changed since", fix)
    return ()


def read_rows(metrics: Path) -> list[dict[str, float]]:
    """Rows of `metrics.jsonl`; a last line cut off by a kill is left out.

    Raises:
        UserError: a line is no row.
    """
    rows = []
    for number, line in _lines(metrics):
        row = _row(line)
        if isinstance(row, str):
            raise UserError(f"{metrics}, line {number} is damaged ({row}): {_LINE_FIX}")
        rows.append(row)
    return rows


def last_rows(metrics: Path, *, size: int = TAIL) -> list[dict[str, float]]:
    """Whole rows among the last bytes of the file, so that a long log costs what a short one does.

    Raises:
        DamagedError: one of these lines is no row.
    """
    rows = []
    for line in last_lines(metrics, size=size):
        row = _row(line)
        if isinstance(row, str):
            raise DamagedError(metrics, row, _LINE_FIX)
        rows.append(row)
    return rows


def last_lines(metrics: Path, *, size: int = TAIL) -> list[bytes]:
    """Whole lines among the last bytes of the file; none where there is no file."""
    if not metrics.is_file():
        return []
    with metrics.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - size))
        lines = file.read().split(b"\n")[:-1]
    return [line for line in (lines[1:] if end > size else lines) if line]


def keep_rows(metrics: Path, start: int) -> None:
    """Keeps what resuming from step `start` will not write again.

    That is nothing for a run that starts anew, and never the evaluation at the end of a training.

    Raises:
        UserError: a line among these is no row.
    """
    if not metrics.exists():
        return
    kept: list[dict[str, float]] = []
    broken: str | None = None  # what follows the rows that are kept is written again
    for number, line in _lines(metrics) if start else ():
        row = _row(line)
        if isinstance(row, str):
            broken = broken or f"{metrics}, line {number} is damaged ({row}): {_LINE_FIX}"
        elif row["step"] <= start and not is_last(row):
            if broken:
                raise UserError(broken)
            kept.append(row)
    write_rows(metrics, kept)


def write_rows(metrics: Path, rows: Iterable[Mapping[str, float]]) -> None:
    """Replaces all rows of the file."""
    write_text(metrics, "".join(json.dumps(row) + "\n" for row in rows))


def evaluations(rows: Iterable[Mapping[str, float]]) -> dict[int, dict[str, float]]:
    """Metrics of the evaluations before the last step, by step, among the rows of a run."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if (has_validation(row) or has_generation(row)) and not is_last(row):
            metrics = {k: v for k, v in row.items() if k not in ("step", "time")}
            found.setdefault(int(row["step"]), {}).update(metrics)
    return found


def has_validation(row: Mapping[str, float]) -> bool:
    """Whether a row holds a validation loss."""
    return any(key.startswith("val/") for key in row)


def has_generation(row: Mapping[str, float]) -> bool:
    """Whether a row holds metrics of generated clips."""
    return any(key.startswith("gen/") for key in row)


def is_last(row: Mapping[str, float]) -> bool:
    """Whether a row is the evaluation at the end of a training, which has its costs as well."""
    return any(key.startswith("params/") for key in row)


_LINE_FIX = "copy the file back from elsewhere, or remove the line"


def _lines(metrics: Path) -> list[tuple[int, bytes]]:
    """Whole lines with their numbers, without empty ones."""
    if not metrics.exists():
        return []
    lines = metrics.read_bytes().split(b"\n")[:-1]
    return [(number, line) for number, line in enumerate(lines, start=1) if line]


def _row(line: bytes) -> dict[str, float] | str:
    """A row, or what is wrong with the line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return one_line(error)
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return "no row with a step"
    if not all(isinstance(value, int | float) for value in row.values()):
        return "not all its values are numbers"
    return {str(key): value for key, value in row.items()}
