"""The shards of a cache's folder and which entries they have, as far as this process knows."""

import os
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from alignlab.dataset_cache.shard import (
    DamagedShardError,
    GoneError,
    NewerShardError,
    UnreadableError,
    read_index,
)
from alignlab.dataset_cache.shard_index import Row

SHARDS = "shards"
SETTLED_NS = 2 * 10**9  # a folder may change twice within a tick of its filesystem's clock
_NAME = re.compile(r"\d{8}T\d{6}-[0-9a-f]{32}\.safetensors")


@dataclass(frozen=True, eq=False, slots=True)
class Copy:
    """One place of an entry; there are several where commands wrote it at once."""

    shard: str
    row: Row


class ShardFolder:
    """Reads the headers of shards, each once.

    Processes agree on nothing: who looks for what is not there lists the folder again if it
    changed.

    Args:
        path: of the cache.

    Attributes:
        path: of its shards.
        damaged: what is wrong with a shard, by its name.
        unreadable: why the system does not let a shard be read, by its name.
        unlisted: why the folder cannot be listed; None: it can, or there is none.

    Raises:
        NewerShardError: a later version of alignlab has written here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path / SHARDS
        self.damaged: dict[str, str] = {}
        self.unreadable: dict[str, str] = {}
        self.unlisted: str | None = None
        self._copies: dict[str, list[Copy]] = {}
        self._ids: dict[str, list[str]] = {}  # by shard
        self._listed_ns = -1  # the folder's time of modification; -1: list it again
        self._lock = Lock()
        self._refresh(is_first=True)

    def find(self, id: str) -> list[Copy]:
        """The copies of an entry that are known."""
        with self._lock:
            return list(self._copies.get(id, ()))

    def forget(self, id: str, copy: Copy) -> None:
        """Takes a copy out that cannot be read."""
        with self._lock:
            copies = self._copies.get(id, [])
            if copy in copies:
                copies.remove(copy)
            if not copies:
                self._copies.pop(id, None)

    def refresh(self, *, always: bool = False) -> None:
        """Takes over what other processes have written and removed.

        Args:
            always: lists the folder even if it looks as it did.
        """
        if always or self._modified_ns() != self._listed_ns:
            self._refresh()

    def add(self, name: str) -> None:
        """Takes over a shard that was just written."""
        with self._lock:
            if name not in self._ids:
                self._add(name)

    def renew_lock(self) -> None:
        """For a forked process: a thread that it does not have may have held it."""
        self._lock = Lock()

    def shards(self) -> Iterator[Path]:
        """Those that could be read."""
        with self._lock:
            names = sorted(self._ids)
        return (self.path / name for name in names)

    def _modified_ns(self) -> int:
        try:
            return self.path.stat().st_mtime_ns
        except OSError:
            return 0

    def _refresh(self, *, is_first: bool = False) -> None:
        with self._lock:
            modified, now = self._modified_ns(), time.time_ns()
            names = self._list()
            for name in self._ids.keys() - names:
                self._drop(name)
            self.damaged = {n: why for n, why in self.damaged.items() if n in names}
            self.unreadable = {n: why for n, why in self.unreadable.items() if n in names}
            known = self._ids.keys() | self.damaged.keys() | self.unreadable.keys()
            for name in sorted(names - known):
                try:
                    self._add(name)
                except NewerShardError as error:
                    if is_first:
                        raise
                    self.damaged[name] = str(error)
            self._listed_ns = modified if now - modified > SETTLED_NS else -1

    def _list(self) -> set[str]:
        self.unlisted = None
        try:
            return shard_names(self.path)
        except OSError as error:
            self.unlisted = error.strerror or str(error)
            return set()

    def _add(self, name: str) -> None:
        try:
            rows = read_index(self.path / name).rows
        except GoneError:
            return
        except DamagedShardError as error:
            self.damaged[name] = str(error)
            return
        except UnreadableError as error:
            self.unreadable[name] = str(error)
            return
        self._ids[name] = [row.id for row in rows]
        for row in rows:
            self._copies.setdefault(row.id, []).append(Copy(name, row))

    def _drop(self, name: str) -> None:
        for id in self._ids.pop(name):
            left = [copy for copy in self._copies.get(id, ()) if copy.shard != name]
            if left:
                self._copies[id] = left
            else:
                self._copies.pop(id, None)


def new_name() -> str:
    """A name for a shard that no other process will take."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex}.safetensors"


def shard_names(folder: Path) -> set[str]:
    """Names of the shards in a folder, whatever they hold; none if there is no such folder.

    Unfinished files have other names, and so do files that alignlab has not written.

    Raises:
        OSError: it cannot be listed.
    """
    try:
        return {name for name in os.listdir(folder) if _NAME.fullmatch(name)}
    except FileNotFoundError:
        return set()


def leftovers(folder: Path) -> list[Path]:
    """Unfinished shards, of writers that are at work and of those that were killed."""
    return [path for path in folder.glob(".*.tmp") if _NAME.fullmatch(path.name[1:-4])]
