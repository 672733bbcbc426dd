"""The dataset cache: what frozen models made of clips and texts, kept on disk.

    with DatasetCache(path, "write") as cache:
        found = cache.read(key)
        if found is None:
            found = cache.write(key, {"latents": encode(clip)})

See `docs/dataset_cache.md` for the format and for what is guaranteed.
"""

import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, RLock
from types import TracebackType
from typing import Self

from torch import Tensor

from alignlab.dataset_cache.key import KINDS, CacheKey, Mode, StorageDtype
from alignlab.dataset_cache.shard import (
    SUFFIX,
    DamagedShardError,
    Entry,
    GoneError,
    entry_id,
    make_entry,
    read_entry,
    write_shard,
)
from alignlab.dataset_cache.shard_folder import ShardFolder
from alignlab.dataset_cache.storage_dtypes import (
    Stored,
    cosine_error,
    store_exactly,
    store_lossy,
)
from alignlab.errors import UserError
from alignlab.runs.disk_errors import as_os_error, shown

FLUSH_BYTES = 64 * 2**20
FLUSH_ENTRIES = 4096

log = logging.getLogger(__name__)


@dataclass
class Counts:
    """What a process did with entries of a kind.

    Args:
        hits: read.
        misses: not there, or damaged.
        damaged: entries whose checksum, or whose file, was not right.
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
        dtype: that teacher features are stored in; all else is stored as it is.

    Attributes:
        counts: by kind.

    Raises:
        UserError: the path is a file, or a newer alignlab has written there.
    """

    def __init__(self, path: Path, mode: Mode, dtype: StorageDtype = "fp32") -> None:
        self.path, self.mode, self.dtype = path, mode, dtype
        self.counts: dict[str, Counts] = {kind: Counts() for kind in KINDS}
        if mode != "off" and path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: name a folder as the cache's path")
        self._shards = ShardFolder(path) if mode != "off" else None
        self._buffer: dict[str, Entry] = {}
        self._buffered = 0  # bytes
        self._flushing: dict[str, Entry] = {}
        self._is_stopped = False
        self._lock = Lock()
        self._flush_lock = RLock()

    def read(self, key: CacheKey) -> dict[str, Tensor] | None:
        """The tensors of an entry, on the CPU; None: there is none, compute it.

        At fp32 they are what was written, bit for bit. A damaged entry is a miss, counted and said
        once.

        Raises:
            UserError: there is none, and the mode is `require`.
        """
        if self._shards is None:
            return None
        found = self._find(key)
        counts = self.counts[key.kind]
        with self._lock:
            if found is None:
                counts.misses += 1
            else:
                counts.hits += 1
        if found is None:
            if self.mode == "require":
                raise UserError(
                    f"no {key.kind} entry in {self.path} for {dict(key.parts)}: run "
                    "`alignlab cache build RECIPE`, or set data.cache.mode=write"
                )
            return None
        return {name: _own(stored) for name, stored in found.items()}

    def write(self, key: CacheKey, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keeps an entry, if the mode is `write`, and gives what `read` gives of it from now on.

        Use that in place of what was computed: where the dtype is lossy it is other numbers, in
        every mode but `off`, so that a run's numbers do not depend on what was in the cache.
        Where nothing is lossy, the tensors are those given. Entries are on the disk after `flush`.
        """
        if self._shards is None:
            return dict(tensors)
        dtype = self._dtype_of(key)
        id = entry_id(key, dtype)
        is_new = self.mode == "write" and not self._is_stopped and not self._is_known(id)
        if dtype == "fp32":
            if is_new:
                kept = {name: store_exactly(tensor) for name, tensor in tensors.items()}
                self._put(make_entry(key, dtype, kept, None))
            return dict(tensors)
        lossy = {name: store_lossy(tensor, dtype) for name, tensor in tensors.items()}
        if is_new:
            self._put(make_entry(key, dtype, lossy, cosine_error(tensors, lossy)))
        return {name: _own(stored) for name, stored in lossy.items()}

    def flush(self) -> None:
        """Returns when all that was written before is on the disk, or cannot be."""
        with self._flush_lock:
            with self._lock:
                self._flushing, self._buffer, self._buffered = self._buffer, {}, 0
                entries = list(self._flushing.values())
            if not entries or self._shards is None:
                return
            name = f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex}{SUFFIX}"
            try:
                self._shards.path.mkdir(parents=True, exist_ok=True)
                write_shard(self._shards.path / name, entries)
                self._shards.add(name)
            except OSError as error:
                self._stop(error)
                return
            finally:
                with self._lock:
                    self._flushing = {}
            with self._lock:
                for entry in entries:
                    counts = self.counts[entry.kind]
                    counts.written += 1
                    counts.written_bytes += entry.size

    def close(self) -> None:
        """Flushes."""
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
        return self.dtype if key.kind == "teacher" else "fp32"

    def _is_known(self, id: str) -> bool:
        assert self._shards is not None
        with self._lock:
            is_waiting = id in self._buffer or id in self._flushing
        return is_waiting or bool(self._shards.find(id))

    def _put(self, entry: Entry) -> None:
        with self._lock:
            self._buffer[entry.id] = entry
            self._buffered += entry.size
            is_full = self._buffered >= FLUSH_BYTES or len(self._buffer) >= FLUSH_ENTRIES
        if is_full:
            self.flush()

    def _find(self, key: CacheKey) -> Mapping[str, Stored] | None:
        assert self._shards is not None
        id = entry_id(key, self._dtype_of(key))
        with self._lock:
            waiting = self._buffer.get(id) or self._flushing.get(id)
        if waiting is not None:
            return waiting.tensors
        found = self._read_copy(key.kind, id)
        if found is None and self._shards.has_changed():
            self._shards.refresh()
            found = self._read_copy(key.kind, id)
        return found

    def _read_copy(self, kind: str, id: str) -> Mapping[str, Stored] | None:
        assert self._shards is not None
        for copy in self._shards.find(id):
            try:
                return read_entry(self._shards.file(copy), copy.row)
            except GoneError:
                pass
            except DamagedShardError as error:
                with self._lock:
                    self.counts[kind].damaged += 1
                self._say_damaged(copy.shard, str(error))
            self._shards.forget(id, copy)
        return None

    def _say_damaged(self, shard: str, reason: str) -> None:
        log.warning(
            "the cache %s is damaged (%s: %s): what cannot be read is computed again",
            *(self.path, shard, reason),
        )

    def _stop(self, error: OSError) -> None:
        self._is_stopped = True
        log.warning(
            "nothing more is cached in %s (%s): all else goes on",
            *(self.path, shown(as_os_error(error) or error)),
        )


def _own(stored: Stored) -> Tensor:
    """The tensor in memory that nothing else holds."""
    tensor = stored.read()
    return tensor.clone() if tensor is stored.values else tensor
