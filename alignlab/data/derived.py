"""What commands make of a folder data set and write beside it: masks, references.

Such a command writes a folder inside the data set, with a part for each clip, and a copy of the
metadata with what it made; the metadata itself stays as it is.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from alignlab.config.names import check_name
from alignlab.data.metadata import Row
from alignlab.errors import UserError
from alignlab.runs.atomic_files import write_text

WRITTEN = "made.json"
"""In the folder of what was made: which metadata was written last."""


def clip_keys(rows: Sequence[Row]) -> list[str]:
    """`file_name`, with `@start` for later clips of a video and `#n` for a repeated clip."""
    seen: Counter[str] = Counter()
    keys = []
    for row in rows:
        name = PurePosixPath(row.file_name).as_posix()
        key = f"{name}@{row.start_s:g}" if row.start_s else name
        seen[key] += 1
        keys.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
    return keys


def derived_paths(root: Path, metadata: str, name: str) -> tuple[Path, Path]:
    """The folder of what is made, and the new metadata.

    Args:
        root: of the data set.
        metadata: of the clips, inside it.
        name: as the user gave it.

    Raises:
        UserError: no name of a folder, or a file has it.
    """
    try:
        check_name(name)
    except ValueError as error:
        raise UserError(f"--name: {error}") from None
    source = root / metadata
    folder = root / name
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--name: {folder} is a file: choose another name")
    return folder, source.with_name(f"{source.stem}-{name}.jsonl")


def check_metadata(folder: Path, metadata: Path, *, replace: bool) -> None:
    """Refuses to write over metadata that another program or a user wrote.

    Args:
        folder, metadata: of `derived_paths`.
        replace: whether the user said so.

    Raises:
        UserError: it is there, and not as `write_metadata` left it.
    """
    if replace or not metadata.exists():
        return
    try:
        written = json.loads((folder / WRITTEN).read_text("utf-8"))
    except (OSError, ValueError):
        written = None
    if written != {metadata.name: _digest(metadata.read_bytes())}:
        raise UserError(
            f"{metadata} is there, and is not as this command wrote it: choose another --name, or "
            "write it anew with --replace"
        )


def write_metadata(folder: Path, metadata: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes the rows, unless they stand there already."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    # a kill in between leaves no metadata, and the same command writes it
    if not metadata.exists() or metadata.read_text("utf-8") != text:
        metadata.unlink(missing_ok=True)
        write_text(folder / WRITTEN, json.dumps({metadata.name: _digest(text.encode())}))
        write_text(metadata, text)


def difference(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Which of all that something was made from is not what is wanted now."""
    keys = sorted(key for key in {*made, *wanted} if made.get(key) != wanted.get(key))
    return f"was made with other settings ({', '.join(keys)})"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
