"""The shards of a cache's folder and which entries they have, as far as this process knows."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from alignlab.dataset_cache.shard import (
    SUFFIX,
    DamagedShardError,
    GoneError,
    NewerShardError,
    Row,
    read_index,
)

SHARDS = "shards"
SETTLED_NS = 2 * 10**9  # a folder may change twice within a tick of its filesystem's clock


@dataclass(frozen=True, eq=False)
class Copy:
    """One place of an entry; there may be several, of commands that wrote it at once."""

    shard: str
    row: Row


class ShardFolder:
    """Reads the headers of shards, each once.

    Nothing is agreed on between processes: who looks for what is not there lists the folder again
    if it changed.

    Args:
        path: of the cache.

    Attributes:
        damaged: why a shard cannot be read, by its name.

    Raises:
        NewerShardError: a later version of alignlab has written here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path / SHARDS
        self.damaged: dict[str, str] = {}
        self._copies: dict[str, list[Copy]] = {}
        self._ids: dict[str, list[str]] = {}  # by shard
        self._seen_ns = 0  # the folder's time of modification when it was listed; 0: not settled
        self._lock = Lock()
        self.refresh()

    def find(self, id: str) -> list[Copy]:
        """The copies of an entry that are known."""
        with self._lock:
            return list(self._copies.get(id, ()))

    def file(self, copy: Copy) -> Path:
        """The shard of a copy."""
        return self.path / copy.shard

    def forget(self, id: str, copy: Copy) -> None:
        """Takes a copy out that cannot be read."""
        with self._lock:
            copies = self._copies.get(id, [])
            if copy in copies:
                copies.remove(copy)
            if not copies:
                self._copies.pop(id, None)

    def has_changed(self) -> bool:
        """Whether the folder may hold other shards than when it was listed."""
        try:
            return self.path.stat().st_mtime_ns != self._seen_ns
        except OSError:
            return bool(self._ids)

    def refresh(self) -> None:
        """Takes over what other processes have written and removed."""
        with self._lock:
            now = time.time_ns()
            try:
                modified = self.path.stat().st_mtime_ns
                with os.scandir(self.path) as files:
                    names = sorted(f.name for f in files if is_shard(f.name))
            except OSError:  # there is none, or it cannot be read: then nothing is found
                modified, names = 0, []
            for name in self._ids.keys() - set(names):
                self._drop(name)
            for name in names:
                if name not in self._ids and name not in self.damaged:
                    self._add(name)
            self._seen_ns = modified if now - modified > SETTLED_NS else 0

    def add(self, name: str) -> None:
        """Takes over a shard that was just written."""
        with self._lock:
            self._add(name)

    def _add(self, name: str) -> None:
        try:
            rows = read_index(self.path / name).rows
        except GoneError:
            return
        except NewerShardError:
            if not self._ids:
                raise
            self.damaged[name] = "a newer alignlab wrote it"
            return
        except DamagedShardError as error:
            self.damaged[name] = str(error)
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


def is_shard(name: str) -> bool:
    """Whether a file's name is that of a shard; names of unfinished files begin with a dot."""
    return name.endswith(SUFFIX) and not name.startswith(".")
