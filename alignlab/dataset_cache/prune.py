"""Removes entries of a dataset cache, beside running readers and writers.

Shards are never changed. Those of which a part stays are written anew, with the old ones removed
afterwards: a reader finds an entry in one or the other, and a kill leaves copies at most. Small
shards are put together on the way.
"""

import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from alignlab.dataset_cache.clip_keys import content_digest
from alignlab.dataset_cache.shard import (
    DamagedShardError,
    GoneError,
    UnreadableError,
    read_entry,
    rows_entry,
    write_shard,
)
from alignlab.dataset_cache.shard_folder import new_name
from alignlab.dataset_cache.shard_index import Entry, Row
from alignlab.dataset_cache.store import SHARD_BYTES, SHARD_ENTRIES
from alignlab.dataset_cache.survey import Survey, check_is_cache, survey
from alignlab.errors import UserError
from alignlab.progress import step_progress
from alignlab.runs.atomic_files import remove_folder
from alignlab.runs.file_lock import file_lock

SMALL_BYTES = SHARD_BYTES // 4
LEFTOVER_S = 3600.0  # no writer needs as long for a shard
DAY_S = 86400.0
LOCK = ".prune.lock"

Where = tuple[str, str]  # name of a shard, id of an entry


@dataclass
class Pruned:
    """What was removed, or would be.

    Args:
        reasons: entries by why.
        kept: entries that stay.
        size_before: bytes of all shards.
        size_after: likewise; estimated, where nothing was removed.
        damaged_shards: removed whole, for nothing of them is.
        unreadable: why shards that are left alone cannot be read, by name.
        leftovers: of killed writers.
        merged: small shards that were put together.
    """

    reasons: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    size_before: int = 0
    size_after: int = 0
    damaged_shards: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    leftovers: int = 0
    merged: int = 0


def prune(
    path: Path,
    *,
    older_than_days: float | None = None,
    max_bytes: float | None = None,
    used: Collection[str] | None = None,
    dry_run: bool = False,
) -> Pruned:
    """Removes copies, damaged shards and what killed writers left, and what the arguments say.

    Args:
        path: of the cache.
        older_than_days: entries that were written earlier.
        max_bytes: entries from the oldest on, until the others are no more than that.
        used: `content_digest` of entries that stay; all others go. None: none is asked.
        dry_run: removes nothing.

    Raises:
        UserError: there is no cache, another command prunes it, a newer alignlab wrote it, or
            nothing of it is used.
        OSError: the disk does not let it.
    """
    with _only_one(path):
        found = survey(path)
        drop = _copies(found)
        for where, row in _left(found, drop):
            if older_than_days is not None and time.time() - row.written > older_than_days * DAY_S:
                drop[where] = "older"
        if used is not None:
            unused = [
                (name, id)
                for (name, id), row in _left(found, drop)
                if content_digest(row.kind, found.indexes[name].parts(id)) not in used
            ]
            if unused and len(unused) == len(list(_left(found, drop))):
                raise UserError(f"{path}: the recipes named read nothing of it, which stays")
            drop |= dict.fromkeys(unused, "unused")
        if max_bytes is not None:
            _drop_oldest(found, drop, max_bytes)
        return _remove(found, drop, dry_run=dry_run)


def remove_damaged(found: Survey, damaged: dict[Where, str]) -> Pruned:
    """Removes entries, and the shards that are damaged as a whole.

    Args:
        found: the cache.
        damaged: of `damaged_entries`.

    Raises:
        UserError: another command prunes it.
        OSError: the disk does not let it.
    """
    with _only_one(found.path):
        return _remove(found, dict.fromkeys(damaged, "damaged"), dry_run=False)


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Two at once might each take the other's copy of an entry for the one that stays."""
    check_is_cache(path)  # before the lock's file is made there

    def refused() -> str:
        return f"another command prunes {path}: wait until it is done"

    with file_lock(path / LOCK, waiting=refused, refused=refused):
        yield


def _left(found: Survey, drop: dict[Where, str]) -> Iterator[tuple[Where, Row]]:
    for name, row in found.rows():
        if (name, row.id) not in drop:
            yield (name, row.id), row


def _copies(found: Survey) -> dict[Where, str]:
    """All but the first whole one of entries that are there more than once."""
    places: dict[str, list[tuple[str, Row]]] = {}
    for name, row in found.rows():
        places.setdefault(row.id, []).append((name, row))
    drop = {}
    for id, copies in places.items():
        if len(copies) == 1:
            continue
        has_whole = False
        for name, row in copies:
            if has_whole:
                drop[name, id] = "copies"
                continue
            try:
                read_entry(found.shards / name, row, check=True)
                has_whole = True
            except UnreadableError as error:
                found.unreadable[name] = str(error)
            except (DamagedShardError, GoneError):
                drop[name, id] = "damaged"
    return drop


def _drop_oldest(found: Survey, drop: dict[Where, str], max_bytes: float) -> None:
    costs = _costs(found)
    left = sorted(_left(found, drop), key=lambda item: item[1].written)
    total = sum(costs[where] for where, _ in left)
    for where, _ in left:
        if total <= max_bytes:
            return
        drop[where] = "oldest"
        total -= costs[where]


def _costs(found: Survey) -> dict[Where, float]:
    """Bytes that entries take in their files, each with its share of the header."""
    costs = {}
    for name, index in found.indexes.items():
        header = index.file_size - sum(row.size for row in index.rows)
        for row in index.rows:
            costs[name, row.id] = row.size + header / len(index.rows)
    return costs


def _remove(found: Survey, drop: dict[Where, str], *, dry_run: bool) -> Pruned:
    costs = _costs(found)
    left = {name: 0.0 for name in found.indexes}  # bytes
    for (name, id), _ in _left(found, drop):
        left[name] += costs[name, id]
    small = [name for name, size in left.items() if 0 < size < SMALL_BYTES]
    if len(small) < 2:
        small = []
    old = [p for p in found.leftovers if _age_s(p) > LEFTOVER_S]
    result = Pruned(
        reasons=Counter(drop.values()),
        kept=len(costs) - len(drop),
        size_before=found.file_bytes,
        size_after=round(sum(left.values())),
        damaged_shards=len(found.damaged),
        unreadable=found.unreadable,
        leftovers=len(old),
        merged=len(small),
    )
    if dry_run:
        return result
    for leftover in old:
        leftover.unlink(missing_ok=True)
    for name in found.damaged:
        remove_folder(found.shards / name)
    for name in [name for name, size in left.items() if size == 0]:
        (found.shards / name).unlink(missing_ok=True)
    partly = {name for name, _ in drop if left[name]}
    _Rewriting(found, drop, result).run(sorted({*partly, *small}))
    result.size_after = survey(found.path).file_bytes
    return result


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:  # its writer is done
        return 0.0


class _Rewriting:
    """Puts what is left of shards into new ones, and removes them once that is on the disk.

    Args:
        found: the cache.
        drop: what goes away.
        result: damaged entries that are found on the way are counted there.
    """

    def __init__(self, found: Survey, drop: dict[Where, str], result: Pruned) -> None:
        self._found, self._drop, self._result = found, drop, result
        self._entries: list[Entry] = []
        self._size = 0
        self._read: list[str] = []  # shards all of whose entries are written, or wait here

    def run(self, names: list[str]) -> None:
        """Does it for these shards."""
        with step_progress("shards", total=len(names)) as advance:
            for done, name in enumerate(names, 1):
                self._take(name)
                advance(done, "")
            self._write()

    def _take(self, name: str) -> None:
        index = self._found.indexes[name]
        for row in index.rows:
            if (name, row.id) in self._drop:
                continue
            try:
                tensors = read_entry(self._found.shards / name, row, check=True)
            except GoneError:
                continue
            except UnreadableError as error:
                self._result.unreadable[name] = str(error)
                return  # it stays, and what was taken of it is there twice
            except DamagedShardError:
                self._result.reasons["damaged"] += 1
                self._result.kept -= 1
                continue
            self._entries.append(rows_entry(row, index.parts(row.id), tensors))
            self._size += row.size
            if self._size >= SHARD_BYTES or len(self._entries) >= SHARD_ENTRIES:
                self._write()
        self._read.append(name)

    def _write(self) -> None:
        if self._entries:
            write_shard(self._found.shards / new_name(), self._entries)
        for name in self._read:
            (self._found.shards / name).unlink(missing_ok=True)
        self._entries, self._size, self._read = [], 0, []
