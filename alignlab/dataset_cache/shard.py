"""A shard: a safetensors file of entries that is written once, whole, and never changed.

Its metadata has `format`, `version`, `index`, `keys` (both JSON, see `shard_index`), and `sha256`
of the last three. Keys are parsed only where they are shown.

Entries are read with `pread`, never through a memory map, which would kill the process if the file
were cut while it is read. A file that is removed meanwhile is read to its end.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from alignlab.dataset_cache.shard_index import (
    Entry,
    Index,
    Row,
    Span,
    bytes_of,
    entry_sha256,
    index_text,
    keys_text,
    named_tensors,
    parse_index,
)
from alignlab.dataset_cache.storage_dtypes import Stored
from alignlab.errors import UserError
from alignlab.runs.atomic_files import write_bytes

FORMAT = "alignlab dataset cache"
VERSION = 1
MAX_HEADER = 100_000_000  # bytes: safetensors itself reads no longer one
NO_FILE = (errno.ELOOP, errno.ESPIPE, errno.ENXIO)  # links in a circle, a pipe, a socket
NO_HEADER = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


class GoneError(Exception):
    """A shard was removed since it was listed."""


class UnreadableError(Exception):
    """The system does not let a shard be read, as one of another user; says why. It may be whole,
    and so is never removed."""


class DamagedShardError(Exception):
    """A shard, or an entry of it, is not what was written; says why."""


class NewerShardError(UserError):
    """A later version of alignlab has written a shard."""


def write_shard(path: Path, entries: list[Entry]) -> None:
    """Writes a shard, there whole or not at all, also after a power failure.

    Raises:
        OSError: the disk does not take it.
    """
    metadata = {"version": str(VERSION), "index": index_text(entries), "keys": keys_text(entries)}
    tensors = {name: tensor for entry in entries for name, tensor in named_tensors(entry)}
    # not `save_file`: its temporary file has a name of its own, which a kill would leave behind
    write_bytes(path, save(tensors, {"format": FORMAT, **metadata, "sha256": _sha256(metadata)}))


def read_index(path: Path) -> Index:
    """Reads the header of a shard.

    Raises:
        GoneError: there is no such file.
        UnreadableError: the system does not let it be read.
        DamagedShardError: it is no whole shard.
        NewerShardError: a later version wrote it.
    """
    with _opened(path) as file:
        size = os.fstat(file).st_size
        length = int.from_bytes(_read(file, 8, 0), "little")
        if length > MAX_HEADER or 8 + length > size:
            raise DamagedShardError("its header is cut, or none")
        content = _read(file, length, 8)
    try:
        header = json.loads(content)
        metadata = header.pop("__metadata__")
        version = metadata["version"]
        is_whole = metadata["format"] == FORMAT and metadata["sha256"] == _sha256(metadata)
        if is_whole and int(version) > VERSION:
            raise NewerShardError(
                f"{path}: a newer alignlab wrote it (format {version}, this one reads {VERSION}): "
                "update alignlab, or name another folder as the cache"
            )
        if is_whole:
            return parse_index(metadata, header, 8 + length, size)
    except NO_HEADER as error:
        raise DamagedShardError("its header is not whole, or it is cut") from error
    raise DamagedShardError("the checksum of its index is another")


def read_entry(path: Path, row: Row, *, check: bool = False) -> dict[str, Stored]:
    """Reads an entry.

    Args:
        path: of the shard.
        row: of its index.
        check: compares the checksum even if the file is as it was when it last was compared.

    Raises:
        GoneError: the file is gone.
        UnreadableError: the system does not let it be read.
        DamagedShardError: it does not hold what was written.
    """
    with _opened(path) as file:
        found = os.fstat(file)
        tensors = {
            place.name: Stored(
                _tensor(file, place.values),
                None if place.scale is None else _tensor(file, place.scale),
                place.dtype,
            )
            for place in row.places
        }
    look = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    if check or row.checked != look:
        if entry_sha256(tensors) != row.sha256:
            raise DamagedShardError("its checksum is another")
        row.checked = look
    return tensors


def rows_entry(row: Row, parts: Mapping[str, object], tensors: Mapping[str, Stored]) -> Entry:
    """An entry that was read, to be written into another shard."""
    return Entry(row.id, row.kind, parts, row.dtype, tensors, row.cosine_error, row.written)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Gives the number of an open file. A pipe in its place would block but for O_NONBLOCK."""
    file = None
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        yield file
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # NFS: another machine has removed it
            raise GoneError from error
        if error.errno == errno.EISDIR:
            raise DamagedShardError("it is a folder") from error
        if error.errno in NO_FILE:
            raise DamagedShardError(f"it is no file: {error.strerror}") from error
        raise UnreadableError(error.strerror or str(error)) from error
    finally:
        if file is not None:
            os.close(file)


def _tensor(file: int, span: Span) -> Tensor:
    tensor = torch.empty(span.shape, dtype=span.dtype)
    if tensor.numel():
        _fill(file, bytes_of(tensor).numpy().data, span.begin)
    return tensor


def _read(file: int, size: int, begin: int) -> bytes:
    content = bytearray(size)
    _fill(file, memoryview(content), begin)
    return bytes(content)


def _fill(file: int, left: memoryview, begin: int) -> None:
    while left:
        size = os.preadv(file, [left], begin)
        if size == 0:
            raise DamagedShardError("it is cut")
        left, begin = left[size:], begin + size


def _sha256(metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name in ("version", "index", "keys"):
        digest.update(f"{metadata[name]}\n".encode())
    return digest.hexdigest()
