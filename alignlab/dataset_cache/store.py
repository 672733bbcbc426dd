"""The dataset cache: what frozen models made of clips and texts, kept on disk.

    with DatasetCache(path, "write") as cache:
        found = cache.read(key)
        if found is None:
            found = cache.write(key, {"latents": encode(clip)})

See `docs/dataset_cache.md` for the format and for what is guaranteed.
"""

import os
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, RLock
from types import TracebackType
from typing import Self

from torch import Tensor

from alignlab.dataset_cache.disk_room import check_room
from alignlab.dataset_cache.key import KINDS, CacheKey, Mode, StorageDtype
from alignlab.dataset_cache.missed import why_missing
from alignlab.dataset_cache.shard import (
    DamagedShardError,
    GoneError,
    UnreadableError,
    read_entry,
    write_shard,
)
from alignlab.dataset_cache.shard_folder import ShardFolder, new_name
from alignlab.dataset_cache.shard_index import Entry, entry_id, new_entry
from alignlab.dataset_cache.storage_dtypes import (
    Stored,
    cosine_error,
    is_exact,
    store_exactly,
    store_lossy,
)
from alignlab.errors import UserError
from alignlab.progress import tell_once, warn_once
from alignlab.runs.disk_errors import FULL
from alignlab.units import MIB

SHARD_BYTES = 64 * MIB
SHARD_ENTRIES = 4096
SOONEST_S, LATEST_S, SHARE = 30.0, 600.0, 0.05
"""Entries wait at most this long, or this share of the time since the cache was opened: a kill
loses a twentieth of the work, and a long run writes no thousands of small shards."""

LISTINGS = 3  # `prune` may move an entry again, and a listing meanwhile may have it in no place


@dataclass
class Counts:
    """What a process did with entries of a kind.

    Args:
        hits: read.
        misses: not there, damaged, or not to be read.
        damaged: copies that are not what was written.
        written: on the disk.
        written_bytes: of their tensors.
    """

    hits: int = 0
    misses: int = 0
    damaged: int = 0
    written: int = 0
    written_bytes: int = 0


class DatasetCache:
    """Reads and writes entries; threads and processes may do so at once.

    Args:
        path: the cache's folder, made by the first entry that is written.
        mode: `off`: nothing is read or written. `read`: nothing is written. `write`: both.
            `require`: a miss is refused.
        dtype: that teacher features are stored in; all else, and keys that are `is_exact`, are
            stored as they are.

    Attributes:
        counts: by kind.
        write_error: why nothing more is written; None: it is, if the mode is `write`.

    Raises:
        UserError: the path is a file, or a newer alignlab has written there.
    """

    def __init__(self, path: Path, mode: Mode, dtype: StorageDtype = "fp32") -> None:
        self.path, self.mode, self.dtype = path, mode, dtype
        self.counts = {str(kind): Counts() for kind in KINDS}
        self.write_error: OSError | None = None
        if mode != "off" and path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: name a folder as the cache's path")
        self._shards = ShardFolder(path) if mode != "off" else None
        self._opened_at = time.monotonic()
        self._is_told = self._is_told_unreadable = False
        self._start()
        if self._shards is not None:
            self._tell_shards(self._shards)
        _all.add(self)

    def _start(self) -> None:
        """Nothing waits, and no thread is at work."""
        self._buffer: dict[str, Entry] = {}
        self._flushing: dict[str, Entry] = {}
        self._buffered = 0  # bytes
        self._oldest = 0.0  # when the first entry came into the buffer
        self._lock = Lock()
        self._flush_lock = RLock()

    def begin_anew(self) -> None:
        """For a forked process, which has none of the threads."""
        self._start()
        if self._shards is not None:
            self._shards.renew_lock()

    @property
    def damaged_shards(self) -> int:
        """Shards nothing of which is whole."""
        return 0 if self._shards is None else len(self._shards.damaged)

    def read(self, key: CacheKey) -> dict[str, Tensor] | None:
        """The tensors of an entry, on the CPU, in memory of their own; None: compute it.

        At fp32 they are what was written, bit for bit. A damaged entry is a miss, counted and said
        once.

        Raises:
            UserError: it is missing or damaged, and the mode is `require`.
        """
        if self._shards is None:
            return None
        self._flush_in_time()
        found = self._find(key)
        counts = self.counts[key.kind]
        with self._lock:
            if found is None:
                counts.misses += 1
            else:
                counts.hits += 1
        if found is None and self.mode == "require":
            raise UserError(
                f"data.cache.mode=require, but {self.path} has no {key.kind} entry "
                f"{why_missing(self._shards, key, self._dtype_of(key))}: run `alignlab cache "
                "build` with this recipe, or set data.cache.mode=write"
            )
        return found

    def write(self, key: CacheKey, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keeps an entry, if the mode is `write`, and gives what `read` gives of it from now on.

        Use that in place of what was computed: where the dtype is lossy it is other numbers, in
        every mode but `off`, so that a run's numbers do not depend on what was in the cache.
        What is stored exactly is given back as it is. Entries are on the disk after `flush`, which
        is called where many wait or one waits for long.
        """
        if self._shards is None:
            return dict(tensors)
        dtype = self._dtype_of(key)
        is_new = self.mode == "write" and self.write_error is None and not self._is_known(key)
        if dtype == "fp32":
            if is_new:
                kept = {name: store_exactly(tensor) for name, tensor in tensors.items()}
                self._put(new_entry(key, dtype, kept, None))
            return dict(tensors)
        lossy = {name: store_lossy(tensor, dtype) for name, tensor in tensors.items()}
        if is_new:
            self._put(new_entry(key, dtype, lossy, cosine_error(tensors, lossy)))
        return {name: _own(stored) for name, stored in lossy.items()}

    def has(self, key: CacheKey) -> bool:
        """Whether an entry is there, as far as the index says: it is not read."""
        return self._shards is not None and self._is_known(key)

    def flush(self) -> None:
        """Returns when all that was written before is on the disk, or cannot be."""
        with self._flush_lock:
            with self._lock:
                self._flushing, self._buffer, self._buffered = self._buffer, {}, 0
                entries = list(self._flushing.values())
            if not entries or self._shards is None:
                return
            try:
                self._write(self._shards, entries)
            except OSError as error:
                self._stop(error)
            except BaseException:  # Ctrl-C: they are written by the next flush, or by `close`
                with self._lock:
                    self._buffer = self._flushing | self._buffer
                raise
            finally:
                with self._lock:
                    self._flushing = {}

    def close(self) -> None:
        """Flushes. What is read or written afterwards is as before."""
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _dtype_of(self, key: CacheKey) -> StorageDtype:
        return self.dtype if key.kind == "teacher" and not key.is_exact else "fp32"

    def _is_known(self, key: CacheKey) -> bool:
        assert self._shards is not None
        id = entry_id(key, self._dtype_of(key))
        return self._waiting(id) is not None or bool(self._shards.find(id))

    def _waiting(self, id: str) -> Entry | None:
        with self._lock:
            return self._buffer.get(id) or self._flushing.get(id)

    def _put(self, entry: Entry) -> None:
        with self._lock:
            if entry.id in self._buffer:  # another thread was faster
                return
            if not self._buffer:
                self._oldest = time.monotonic()
            self._buffer[entry.id] = entry
            self._buffered += entry.size + len(str(entry.parts))
            is_full = self._buffered >= SHARD_BYTES or len(self._buffer) >= SHARD_ENTRIES
        if is_full:
            self.flush()
        else:
            self._flush_in_time()

    def _flush_in_time(self) -> None:
        now = time.monotonic()
        limit = min(LATEST_S, max(SOONEST_S, SHARE * (now - self._opened_at)))
        if self._buffer and now - self._oldest > limit:
            self.flush()

    def _write(self, shards: ShardFolder, entries: list[Entry]) -> None:
        check_room(shards.path, sum(entry.size for entry in entries))
        name = new_name()
        shards.path.mkdir(parents=True, exist_ok=True)
        write_shard(shards.path / name, entries)
        shards.add(name)
        with self._lock:
            for entry in entries:
                counts = self.counts[entry.kind]
                counts.written += 1
                counts.written_bytes += entry.size

    def _find(self, key: CacheKey) -> dict[str, Tensor] | None:
        assert self._shards is not None
        id = entry_id(key, self._dtype_of(key))
        waiting = self._waiting(id)
        if waiting is not None:
            return {name: _own(stored) for name, stored in waiting.tensors.items()}
        found, is_gone = self._read_copy(self._shards, key, id)
        for _ in range(LISTINGS if is_gone else 1):
            if found is not None:
                break
            self._shards.refresh(always=is_gone or self.mode == "require")
            self._tell_shards(self._shards)
            found, _ = self._read_copy(self._shards, key, id)
        if found is None and is_gone:
            tell_once(f"entries of {self.path} were removed since it was opened: computed again")
        return found

    def _read_copy(
        self, shards: ShardFolder, key: CacheKey, id: str
    ) -> tuple[dict[str, Tensor] | None, bool]:
        """The entry, if a copy of it is whole, and whether one was removed meanwhile."""
        is_gone = False
        for copy in shards.find(id):
            try:
                stored = read_entry(shards.path / copy.shard, copy.row)
                return {name: one.read() for name, one in stored.items()}, is_gone
            except GoneError:
                is_gone = True
                shards.forget(id, copy)
            except UnreadableError as error:
                shards.forget(id, copy)
                self._tell_unreadable(copy.shard, str(error))
            except DamagedShardError as error:
                shards.forget(id, copy)
                with self._lock:
                    self.counts[key.kind].damaged += 1
                self._tell(copy.shard, str(error))
        return None, is_gone

    def _tell_shards(self, shards: ShardFolder) -> None:
        for name, reason in shards.damaged.items():
            self._tell(name, reason)
            break
        for name, reason in shards.unreadable.items():
            self._tell_unreadable(name, reason)
            break
        if shards.unlisted is not None:
            warn_once(
                f"{shards.path} cannot be listed ({shards.unlisted}): nothing is read from it"
            )

    def _tell(self, shard: str, reason: str) -> None:
        """Says once that something is damaged; the rest is counted."""
        with self._lock:
            is_first, self._is_told = not self._is_told, True
        if is_first:
            warn_once(
                f"the dataset cache {self.path} is damaged ({shard}: {reason}): what cannot be "
                f"read is computed again; `alignlab cache verify {self.path} --remove` removes it"
            )

    def _tell_unreadable(self, shard: str, reason: str) -> None:
        """Says once that something may not be read."""
        with self._lock:
            is_first, self._is_told_unreadable = not self._is_told_unreadable, True
        if is_first:
            warn_once(
                f"the dataset cache {self.path} cannot be read in part ({shard}: {reason}): what "
                "is in there is computed again; it may be whole, and no command removes it"
            )

    def _stop(self, error: OSError) -> None:
        self.write_error = error
        warn_once(
            f"nothing more is cached in {self.path} ({write_reason(error)}): all else goes on, and "
            "what is not there is computed each time"
        )


def write_reason(error: OSError) -> str:
    """Why the disk took nothing more, in words."""
    return "the disk is full" if error.errno in FULL else error.strerror or str(error)


def _own(stored: Stored) -> Tensor:
    """The tensor in memory that nothing else holds."""
    return stored.values.clone() if is_exact(stored) else stored.read()


_all: "weakref.WeakSet[DatasetCache]" = weakref.WeakSet()


def _after_fork() -> None:
    """What waits to be written is the parent's, and so are the threads that hold locks."""
    for cache in list(_all):
        cache.begin_anew()


os.register_at_fork(after_in_child=_after_fork)
