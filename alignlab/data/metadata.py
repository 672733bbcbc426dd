"""Rows of a folder's metadata file: one clip each, checked and confined to the folder.

Columns (`references`, `reference_names`, `reference_phrases`, `entities` and `entity_names` are
lists; in .csv, their items are separated by `|`):

    file_name           video, relative to the folder (every path is)
    caption             or `text`
    start               seconds into the video at which the clip begins, default 0
    references          images of the subjects; transparency, where present, marks the background
    reference_names     identity of each reference, default its path; equal names, equal subject
    reference_phrases   what the caption calls each reference, default empty
    masks               folder of label images `00000.png`, `00001.png`, ..., one per frame of the
                        video: 8-bit, 0 background, k the k-th entity, 255 undecided
    entities            phrases of the masked subjects, in label order
    entity_names        identity of each entity, over all clips, for `alignlab data references`:
                        equal names are the same subject
    split               `train` or `val`: in every row, or in none
    group               rows with equal groups are in the same split, default: those of a video
    boxes, points, first_mask   where entities are, for `alignlab data masks` (`places.py`)

Other columns are ignored, unless they look like a misspelling of one of these. Those that sound as
if they held what one of these does are told.
"""

import csv
import difflib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from alignlab.data import places
from alignlab.data.places import Places, read_places
from alignlab.errors import UserError

LISTS = ("references", "reference_names", "reference_phrases", "entities", "entity_names")
COLUMNS = (
    *("file_name", "caption", "text", "start", "masks", "split", "group"),
    *LISTS,
    *places.COLUMNS,
)
# Words by which other data sets call what these columns hold.
SYNONYMS = {
    **dict.fromkeys(("image", "images", "ref", "refs", "reference", "references"), "references"),
    **dict.fromkeys(("subject", "subjects", "identity"), "references"),
    **dict.fromkeys(("prompt", "description"), "caption"),
    **dict.fromkeys(("mask", "segmentation", "segmentations"), "masks"),
    **dict.fromkeys(("entity", "objects"), "entities"),
}
CSV_SEPARATOR = "|"
# What other programs write where a caption is missing.
NO_CAPTION = frozenset({"nan", "null", "none", "n/a", "<na>"})


@dataclass(frozen=True)
class Row:
    """One clip of the metadata file. Its paths stay inside the folder; they may not exist.

    Args:
        where: metadata file and line, for messages.
        file_name: as written.
        split: as the row says, if it does.
        group: likewise.
        unread: names of its other columns.
        places: what it says of where its entities are; its phrases are there also where there are
            no masks yet (`read_rows(unmasked=True)`).
        entity_names: identity of each of its entities; empty if the row does not say.
        raw: the row as it stands in the file, with `unmasked` alone.
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
    split: Literal["train", "val"] | None = None
    group: str | None = None
    unread: tuple[str, ...] = ()
    places: Places = field(default_factory=Places)
    entity_names: tuple[str, ...] = ()
    raw: dict[str, Any] = field(default_factory=dict, hash=False, repr=False)


def read_rows(
    root: Path, metadata: str, *, follow_links: bool = False, unmasked: bool = False
) -> list[Row]:
    """Read every row of `root/metadata` (.jsonl, .json with a list of objects, or .csv).

    Args:
        root: the folder.
        metadata: the file's path inside it.
        follow_links: allow links that lead out of the folder.
        unmasked: allow `entities` without `masks`, for what makes the masks.

    Raises:
        UserError: the file is missing or malformed, or a row lacks what it needs; the message
            gives the line.
    """
    folder = _Folder(root, follow_links)
    path = folder.inside(metadata, "data.metadata")
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}
    if path.suffix not in readers:
        raise UserError(f"data.metadata: {metadata} must end in {', '.join(readers)}")
    if not path.is_file():
        raise UserError(f"data.metadata: {path} does not exist; it lists the clips, one per row")
    try:
        listed = readers[path.suffix](path)
        rows = [_row(folder, where, raw, unmasked=unmasked) for where, raw in listed]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error})") from error
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
                yield where, json.loads(line, object_pairs_hook=_Object)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: is not valid JSON ({error})") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=_Object)
    except json.JSONDecodeError as error:
        raise UserError(f"{path.name}: is not valid JSON ({error})") from error
    if not isinstance(rows, list):
        raise UserError(f"{path.name}: must hold a list of objects, one per clip")
    for number, row in enumerate(rows, start=1):
        yield f"{path.name} entry {number}", row


class _Object(dict[str, Any]):
    """A JSON object that remembers which of its keys stand there twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.twice = _twice([key for key, _ in pairs])


def _twice(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    lines = path.read_bytes().decode("utf-8-sig").split("\n")  # not splitlines(), as above
    header: list[str] = []
    for number, cells in _csv_records(path, lines):
        if not header:
            header = cells
            if twice := _twice([name for name in header if name]):
                raise UserError(f"{path.name} line {number}: has the column {twice[0]!a} twice")
            continue
        where = f"{path.name} line {number}"
        if len(cells) != len(header):
            more = "more" if len(cells) > len(header) else "fewer"
            raise UserError(
                f"{where}: has {more} cells than the header ({len(cells)}, not {len(header)}); "
                'put a cell that holds commas in "quotes"'
            )
        row: dict[str, Any] = {k: cell for k, cell in zip(header, cells, strict=True) if cell}
        for key in LISTS:
            if key in row:
                row[key] = [item.strip() for item in row[key].split(CSV_SEPARATOR)]
        if "start" in row:
            try:
                row["start"] = float(row["start"])
            except ValueError as error:
                raise UserError(f"{where}: start {row['start']!a} is no number") from error
        yield where, row


def _csv_records(path: Path, lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Number of the first line, counted from 1, and cells of every record."""
    reader = csv.reader((f"{line}\n" for line in lines), strict=True)
    header: list[str] = []
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{path.name} line {first}: is not valid CSV ({error}); a cell that holds quotes "
                'stands in quotes, and its own are doubled: "a 12"" record"'
            ) from None
        if cells is None:
            return
        if not cells:  # an empty line
            continue
        header = header or cells
        # A quote that is left open takes the rows below into its cell, up to the next quote.
        for number in range(first + 1, reader.line_num + 1):
            if _is_row(path, header, lines[number - 1]):
                raise UserError(
                    f"{path.name} line {first}: a quote is left open, and line {number}, which is "
                    "a row of its own, falls into its cell"
                )
        yield first, cells


def _is_row(path: Path, header: list[str], line: str) -> bool:
    """Whether a line by itself names a file where the header has `file_name`."""
    cells = line.split(",")
    at = header.index("file_name") if "file_name" in header else len(cells)
    name = cells[at].strip('" \r') if at < len(cells) else ""
    return bool(name) and "\0" not in name and (path.parent / name).is_file()


def _row(folder: "_Folder", where: str, raw: Any, *, unmasked: bool) -> Row:
    if not isinstance(raw, dict):
        raise UserError(f"{where}: must be an object with file_name and caption")
    for key in getattr(raw, "twice", ()):
        raise UserError(f"{where}: has {key!a} twice")
    raw = {key: value for key, value in raw.items() if value is not None}
    for key in raw:
        near = difflib.get_close_matches(str(key), COLUMNS, n=1, cutoff=0.85)
        if key not in COLUMNS and near:
            raise UserError(f"{where}: unknown column {key!a}, did you mean {near[0]!r}?")
    if "caption" in raw and "text" in raw:
        raise UserError(f"{where}: has both caption and text; keep one")
    file_name = _text(where, raw, "file_name")
    lists = {key: _texts(where, raw, key) for key in LISTS}
    references = lists["references"]
    for key in ("reference_names", "reference_phrases"):
        if lists[key] and len(lists[key]) != len(references):
            raise UserError(f"{where}: {len(lists[key])} {key} for {len(references)} references")
    masks = _text(where, raw, "masks") if "masks" in raw else None
    entities = lists["entities"]
    if (masks is None) != (not entities) and not (unmasked and masks is None):
        raise UserError(
            f"{where}: masks and entities go together; one of them is missing (`alignlab data "
            "masks` makes masks of entities)"
        )
    if lists["entity_names"] and len(lists["entity_names"]) != len(entities):
        raise UserError(
            f"{where}: {len(lists['entity_names'])} entity_names for {len(entities)} entities"
        )
    said = read_places(where, raw, entities)
    if said.first_mask is not None:
        folder.inside(said.first_mask, where)
    return Row(
        where=where,
        file_name=file_name,
        video=folder.inside(file_name, where),
        caption=_caption(where, raw),
        start_s=_start(where, raw),
        references=tuple(folder.inside(name, where) for name in references),
        reference_names=lists["reference_names"] or references,
        reference_phrases=lists["reference_phrases"] or ("",) * len(references),
        masks=None if masks is None else folder.inside(masks, where),
        entities=() if masks is None else entities,
        split=_split(where, raw),
        group=_text(where, raw, "group") if "group" in raw else None,
        unread=tuple(str(key) for key in raw if key not in COLUMNS),
        places=said,
        entity_names=lists["entity_names"],
        raw=raw if unmasked else {},
    )


def _caption(where: str, raw: dict[str, Any]) -> str:
    key = "text" if "text" in raw else "caption"
    caption = _text(where, raw, key)
    if caption.strip().lower() in NO_CAPTION:
        raise UserError(f"{where}: {key} is {caption.strip()!a}, which is a missing value")
    return caption


def _split(where: str, raw: dict[str, Any]) -> Literal["train", "val"] | None:
    split = raw.get("split")
    if split is None or split == "train" or split == "val":
        return split
    raise UserError(f"{where}: split must be train or val, not {split!a}")


def _text(where: str, raw: dict[str, Any], key: str) -> str:
    text = raw.get(key)
    if text is None or text == "" or (isinstance(text, str) and not text.strip()):
        raise UserError(f"{where}: {key} is missing or empty")
    if not isinstance(text, str):
        raise UserError(f"{where}: {key} must be a text, not {_shown(text)}")
    _check_characters(where, key, text)
    return text


def _texts(where: str, raw: dict[str, Any], key: str) -> tuple[str, ...]:
    items = raw.get(key, [])
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise UserError(f"{where}: {key} must be a list of texts")
    if key != "reference_phrases" and not all(items):
        raise UserError(f"{where}: {key} has an empty item")
    for item in items:
        _check_characters(where, key, item)
    return tuple(items)


def _check_characters(where: str, key: str, text: str) -> None:
    """Refuses what no file and no page can hold, or nobody sees: half surrogate pairs, control
    characters but for white space, and byte order marks."""
    for place, char in enumerate(text, start=1):
        if unicodedata.category(char) in ("Cc", "Cs") and not char.isspace():
            what = "half of a surrogate pair" if "\ud800" <= char <= "\udfff" else "no text"
        elif char == "\ufeff":
            what = "a byte order mark"
        else:
            continue
        raise UserError(
            f"{where}: {key} holds the character U+{ord(char):04X} in place {place}, which is "
            f"{what}: remove it"
        )


def _shown(value: Any) -> str:
    """A value for a message, in ASCII and not at length."""
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _start(where: str, raw: dict[str, Any]) -> float:
    start = raw.get("start", 0.0)
    if isinstance(start, bool) or not isinstance(start, int | float) or not 0 <= start < 1e9:
        raise UserError(f"{where}: start must be a number of seconds, 0 or more")
    return float(start)


class _Folder(NamedTuple):
    """A folder that paths are confined to, by their text and, unless links are followed, by where
    they lead."""

    root: Path
    follow_links: bool

    def inside(self, name: str, where: str) -> Path:
        """`root/name`, refused when it leads out of the folder."""
        root, path = self.root, self.root / name
        if any(unicodedata.category(char) == "Cc" for char in name):
            raise UserError(f"{where}: {name!a} has a control character, which no path may have")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{where}: {name!r} must be a path inside the folder {root}")
        if not self.follow_links and not path.resolve().is_relative_to(root.resolve()):
            raise UserError(
                f"{where}: {name!r} is a link out of the folder {root}; "
                "data.follow_links=true allows such links"
            )
        return path
