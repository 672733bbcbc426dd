"""Rows of a folder's metadata file: one clip each, checked and confined to the folder.

Columns (`references`, `reference_names`, `reference_phrases` and `entities` are lists; in .csv,
their items are separated by `|`):

    file_name           video, relative to the folder (every path is)
    caption             or `text`
    start               seconds into the video at which the clip begins, default 0
    references          images of the subjects; transparency, where present, marks the background
    reference_names     identity of each reference, default its path; equal names, equal subject
    reference_phrases   what the caption calls each reference, default empty
    masks               folder of label images `00000.png`, `00001.png`, ..., one per frame of the
                        video: 8-bit, 0 background, k the k-th entity, 255 undecided
    entities            phrases of the masked subjects, in label order

Other columns are ignored, unless they look like a misspelling of one of these. Those that sound as
if they held what one of these does are told.
"""

import csv
import difflib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.errors import UserError

LISTS = ("references", "reference_names", "reference_phrases", "entities")
COLUMNS = ("file_name", "caption", "text", "start", "masks", *LISTS)
# Words by which other data sets call what these columns hold.
SYNONYMS = {
    **dict.fromkeys(("image", "images", "ref", "refs", "reference", "references"), "references"),
    **dict.fromkeys(("subject", "subjects", "identity"), "references"),
    **dict.fromkeys(("prompt", "description"), "caption"),
    **dict.fromkeys(("mask", "segmentation", "segmentations"), "masks"),
    **dict.fromkeys(("entity", "objects"), "entities"),
}
CSV_SEPARATOR = "|"


@dataclass(frozen=True)
class Row:
    """One clip of the metadata file. Its paths stay inside the folder; they may not exist.

    Args:
        where: metadata file and line, for messages.
        file_name: as written; the split is dealt by it.
        unread: names of its other columns.
    """

    where: str
    file_name: str
    video: Path
    caption: str
    start_s: float
    references: tuple[Path, ...]
    reference_names: tuple[str, ...]
    reference_phrases: tuple[str, ...]
    masks: Path | None
    entities: tuple[str, ...]
    unread: tuple[str, ...] = ()


def read_rows(root: Path, metadata: str) -> list[Row]:
    """Read every row of `root/metadata` (.jsonl, .json with a list of objects, or .csv).

    Raises:
        UserError: the file is missing or malformed, or a row lacks what it needs; the message
            gives the line.
    """
    path = _inside(root, metadata, "data.metadata")
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}
    if path.suffix not in readers:
        raise UserError(f"data.metadata: {metadata} must end in {', '.join(readers)}")
    if not path.is_file():
        raise UserError(f"data.metadata: {path} does not exist; it lists the clips, one per row")
    try:
        rows = [_row(root, where, raw) for where, raw in readers[path.suffix](path)]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error})") from error
    except csv.Error as error:
        raise UserError(f"{path}: is not valid CSV ({error})") from error
    if not rows:
        raise UserError(f"{path}: lists no clip")
    return rows


def misnamed_columns(rows: Iterable[Row]) -> dict[str, str]:
    """Columns that nothing reads and that sound like one that is read, each with that one."""
    unread = sorted({name for row in rows for name in row.unread})
    near = {name: _meant(name.lower()) for name in unread}
    return {name: column for name, column in near.items() if column is not None}


def _meant(name: str) -> str | None:
    for word in re.findall("[a-z]+", name):
        if word in SYNONYMS:
            return SYNONYMS[word]
    near = difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.6)
    return near[0] if near else None


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # Not splitlines(): captions may hold other line separators, such as U+2028.
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
        if line.strip():
            where = f"{path.name} line {number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: is not valid JSON ({error})") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path.name}: is not valid JSON ({error})") from error
    if not isinstance(rows, list):
        raise UserError(f"{path.name}: must hold a list of objects, one per clip")
    for number, row in enumerate(rows, start=1):
        yield f"{path.name} entry {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for cells in reader:
            where = f"{path.name} line {reader.line_num}"
            if None in cells:
                raise UserError(f"{where}: has more cells than the header; quote commas")
            row: dict[str, Any] = {key: cell for key, cell in cells.items() if cell}
            for key in LISTS:
                if key in row:
                    row[key] = [item.strip() for item in row[key].split(CSV_SEPARATOR)]
            if "start" in row:
                try:
                    row["start"] = float(row["start"])
                except ValueError as error:
                    raise UserError(f"{where}: start {row['start']!r} is no number") from error
            yield where, row


def _row(root: Path, where: str, raw: Any) -> Row:
    if not isinstance(raw, dict):
        raise UserError(f"{where}: must be an object with file_name and caption")
    raw = {key: value for key, value in raw.items() if value is not None}
    for key in raw:
        near = difflib.get_close_matches(str(key), COLUMNS, n=1, cutoff=0.85)
        if key not in COLUMNS and near:
            raise UserError(f"{where}: unknown column {key!r}, did you mean {near[0]!r}?")
    if "caption" in raw and "text" in raw:
        raise UserError(f"{where}: has both caption and text; keep one")
    file_name = _text(where, raw, "file_name")
    lists = {key: _texts(where, raw, key) for key in LISTS}
    references = lists["references"]
    for key in ("reference_names", "reference_phrases"):
        if lists[key] and len(lists[key]) != len(references):
            raise UserError(f"{where}: {len(lists[key])} {key} for {len(references)} references")
    masks = _text(where, raw, "masks") if "masks" in raw else None
    if (masks is None) != (not lists["entities"]):
        raise UserError(f"{where}: masks and entities go together; one of them is missing")
    return Row(
        where=where,
        file_name=file_name,
        video=_inside(root, file_name, where),
        caption=_text(where, raw, "text" if "text" in raw else "caption"),
        start_s=_start(where, raw),
        references=tuple(_inside(root, name, where) for name in references),
        reference_names=lists["reference_names"] or references,
        reference_phrases=lists["reference_phrases"] or ("",) * len(references),
        masks=None if masks is None else _inside(root, masks, where),
        entities=lists["entities"],
        unread=tuple(str(key) for key in raw if key not in COLUMNS),
    )


def _text(where: str, raw: dict[str, Any], key: str) -> str:
    text = raw.get(key)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: {key} is missing or empty")
    return text


def _texts(where: str, raw: dict[str, Any], key: str) -> tuple[str, ...]:
    items = raw.get(key, [])
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise UserError(f"{where}: {key} must be a list of texts")
    if key != "reference_phrases" and not all(items):
        raise UserError(f"{where}: {key} has an empty item")
    return tuple(items)


def _start(where: str, raw: dict[str, Any]) -> float:
    start = raw.get("start", 0.0)
    if isinstance(start, bool) or not isinstance(start, int | float) or not 0 <= start < 1e9:
        raise UserError(f"{where}: start must be a number of seconds, 0 or more")
    return float(start)


def _inside(root: Path, name: str, where: str) -> Path:
    """`root/name`, refused when it leads out of the folder, by its text or through a link."""
    path = root / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{where}: {name!r} must be a path inside the folder {root}")
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{where}: {name!r} is a link out of the folder {root}")
    return path
