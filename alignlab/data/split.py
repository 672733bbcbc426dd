"""Which rows of a folder's metadata are trained on and which are held out."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from alignlab.data.metadata import Row
from alignlab.errors import UserError

Split = Literal["train", "val"]


def deal(rows: Sequence[Row], root: Path, val_fraction: float) -> list[Split]:
    """The split of each row: as its `split` column says, or by the rank of a hash.

    Rows of one group stay together. A group is what the `group` column names; without one, it is
    the rows of a video, by its real path: links to it and other spellings of its path count as the
    same. Groups are ordered by the SHA-256 of their name (a video's is its path in the folder), and
    the first `val_fraction` of them, rounded, are held out: at least one, and not all if there are
    several.

    Args:
        rows: all of the metadata.
        root: the folder.
        val_fraction: share of the groups to hold out, in (0, 1); not read where rows say their
            split.

    Raises:
        UserError: a video is in two groups, a group in two splits, or some rows alone say a split.
    """
    groups = _groups(rows, root)
    if any(row.split is not None for row in rows):
        return _as_told(rows, groups)
    by_rank = sorted(set(groups), key=lambda group: (_hash(group[1]), group))
    held_out = set(by_rank[: num_held_out(len(by_rank), val_fraction)])
    return ["val" if group in held_out else "train" for group in groups]


def num_held_out(groups: int, val_fraction: float) -> int:
    """How many of so many groups are held out: the share rounded to the nearest (a half goes up),
    at least one, and all but one at most; the only one there is."""
    return max(1, min(int(val_fraction * groups + 0.5), groups - 1))


# Whether the `group` column names it, and its name.
_Group = tuple[bool, str]


def _groups(rows: Sequence[Row], root: Path) -> list[_Group]:
    """The group of each row."""
    files = [_file(row.video) for row in rows]
    names: dict[object, str] = {}
    named: dict[object, Row] = {}  # the first row that names the group of the video
    for file, row in zip(files, rows, strict=True):
        names[file] = min(names.get(file, name := _name(row, root)), name)
        first = named.setdefault(file, row) if row.group is not None else row
        if first.group != row.group:
            raise UserError(
                f"{row.where}: {row.file_name} is of group {row.group!r}, and the same video is of "
                f"group {first.group!r} in {first.where}"
            )
    return [
        (True, str(named[file].group)) if file in named else (False, names[file]) for file in files
    ]


def _file(video: Path) -> object:
    """What two paths share that lead to the same file."""
    try:
        found = video.stat()
    except OSError:  # it is not there, which is told where videos are looked at
        return video.resolve()
    return found.st_dev, found.st_ino


def _name(row: Row, root: Path) -> str:
    """Path of the video inside the folder, as links lead to it; as written if they lead out."""
    real, inside = row.video.resolve(), root.resolve()
    if real.is_relative_to(inside):
        return real.relative_to(inside).as_posix()
    return PurePosixPath(row.file_name).as_posix()


def _hash(name: str) -> bytes:
    return hashlib.sha256(os.fsencode(name)).digest()


def _as_told(rows: Sequence[Row], groups: Sequence[_Group]) -> list[Split]:
    told = next(row for row in rows if row.split is not None)
    splits: list[Split] = []
    first: dict[_Group, Row] = {}
    for row, group in zip(rows, groups, strict=True):
        if row.split is None:
            raise UserError(
                f"{row.where}: says no split, and {told.where} does: fill in every row, or none"
            )
        other = first.setdefault(group, row)
        if other.split != row.split:
            what = "group" if group[0] else "video"
            raise UserError(
                f"{row.where}: split is {row.split}, and {other.split} in {other.where}, "
                f"which is of the same {what}"
            )
        splits.append(row.split)
    return splits
