"""A shard: a safetensors file of entries that is written once, whole, and never changed.

Its metadata has `format`, `version`, `index` and `sha256`, which is of version and index. The index
is JSON: the entries by id, each with kind, parts, how it is stored, when it was written, the bytes
and the SHA-256 of its tensors. Tensors are named `ID/NAME`, scales `ID#NAME`.

Entries are read with `pread`, never through a memory map, which would kill the process if the file
were cut while it is read. A removed file is then a miss, or is read to its end.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from alignlab.dataset_cache.key import CacheKey
from alignlab.dataset_cache.storage_dtypes import CosineError, Stored
from alignlab.errors import UserError
from alignlab.runs.atomic_files import whole_file

FORMAT = "alignlab dataset cache"
VERSION = 1
SUFFIX = ".safetensors"
MAX_HEADER = 100_000_000  # bytes: what safetensors itself reads


class GoneError(Exception):
    """A shard was removed since it was listed."""


class DamagedShardError(Exception):
    """A shard, or an entry of it, is not what was written; says why."""


class NewerShardError(UserError):
    """A later version of alignlab has written a shard."""


@dataclass(frozen=True)
class Entry:
    """A value to be written.

    Args:
        id: `entry_id` of its key.
        key: what it is of.
        dtype: that it is stored in.
        tensors: by name.
        cosine_error: of what is not stored exactly.
        written: seconds since 1970.
    """

    id: str
    kind: str
    parts: Mapping[str, Any]
    dtype: str
    tensors: Mapping[str, Stored]
    cosine_error: CosineError | None
    written: float

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(t.nbytes for s in self.tensors.values() for t in _parts_of(s))


@dataclass(frozen=True)
class Span:
    """Where a tensor lies in a shard: from byte `begin` of the file on."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


@dataclass(frozen=True)
class Place:
    """Where one tensor of an entry lies, and its scale."""

    values: Span
    scale: Span | None
    dtype: torch.dtype


@dataclass(slots=True)
class Row:
    """An entry of a shard as its index has it.

    Args:
        sha256: of names, dtypes, shapes and bytes of its tensors.
        checked: how the shard's file looked when the checksum was last found right.
    """

    id: str
    kind: str
    dtype: str
    size: int
    written: float
    sha256: str
    cosine_error: CosineError | None
    places: Mapping[str, Place]
    checked: tuple[int, ...] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Index:
    """What the header of a shard says.

    Args:
        rows: its entries.
        parts: of the entries' keys, in the same order.
    """

    rows: list[Row]
    parts: list[dict[str, Any]]


def entry_id(key: CacheKey, dtype: str) -> str:
    """A key as it is stored: what is read depends on the dtype as well."""
    return f"{key.digest}-{dtype}"


def make_entry(
    key: CacheKey, dtype: str, tensors: Mapping[str, Stored], error: CosineError | None
) -> Entry:
    """An entry that is written now."""
    parts = dict(key.parts)
    return Entry(entry_id(key, dtype), key.kind, parts, dtype, tensors, error, time.time())


def write_shard(path: Path, entries: list[Entry]) -> None:
    """Writes a shard, there whole or not at all.

    Raises:
        OSError: the disk does not take it.
    """
    tensors: dict[str, Tensor] = {}
    index = {}
    for entry in entries:
        for name, stored in entry.tensors.items():
            tensors[f"{entry.id}/{name}"] = stored.values
            if stored.scale is not None:
                tensors[f"{entry.id}#{name}"] = stored.scale
        index[entry.id] = {
            "kind": entry.kind,
            "parts": entry.parts,
            "dtype": entry.dtype,
            "written": entry.written,
            "bytes": entry.size,
            "cosine_error": None if entry.cosine_error is None else asdict(entry.cosine_error),
            "tensors": {
                name: {"dtype": _name(stored.dtype), "stored": _described(stored)}
                for name, stored in entry.tensors.items()
            },
            "sha256": _sha256(entry.tensors),
        }
    text = json.dumps(index)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "index": text,
        "sha256": _index_sha256(str(VERSION), text),
    }
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_index(path: Path) -> Index:
    """Reads the header of a shard.

    Raises:
        GoneError: there is no such file.
        DamagedShardError: it is no whole shard.
        NewerShardError: a later version wrote it.
    """
    number = _open(path)
    try:
        size = os.fstat(number).st_size
        start = _pread(number, 8, 0)
        length = int.from_bytes(bytes(start), "little")
        if length > MAX_HEADER or 8 + length > size:
            raise DamagedShardError("its header is cut")
        header = bytes(_pread(number, length, 8))
    except OSError as error:
        raise DamagedShardError(error.strerror or str(error)) from error
    finally:
        os.close(number)
    try:
        content = json.loads(header)
        metadata = content.pop("__metadata__")
        version, text = metadata["version"], metadata["index"]
        is_whole = metadata["format"] == FORMAT and metadata["sha256"] == _index_sha256(
            version, text
        )
        if not is_whole:
            raise DamagedShardError("the checksum of its index is another")
        if int(version) > VERSION:
            raise NewerShardError(
                f"{path}: a newer alignlab wrote this cache (format {version}, this one reads "
                f"{VERSION}): update alignlab, or name another folder"
            )
        index = _parsed(json.loads(text), content, 8 + length)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise DamagedShardError("its header is none") from error
    if any(_end(span) > size for row in index.rows for span in _spans(row)):
        raise DamagedShardError("it is cut")
    return index


def read_entry(path: Path, row: Row, *, always_check: bool = False) -> dict[str, Stored]:
    """Reads an entry; its checksum is compared unless the file is as it was when it last was.

    Raises:
        GoneError: the file is gone.
        DamagedShardError: it does not hold what was written.
    """
    number = _open(path)
    try:
        look = os.fstat(number)
        fingerprint = (look.st_dev, look.st_ino, look.st_size, look.st_mtime_ns)
        tensors = {
            name: Stored(
                _read_span(number, place.values),
                None if place.scale is None else _read_span(number, place.scale),
                place.dtype,
            )
            for name, place in row.places.items()
        }
    except OSError as error:
        raise DamagedShardError(error.strerror or str(error)) from error
    finally:
        os.close(number)
    if always_check or row.checked != fingerprint:
        if _sha256(tensors) != row.sha256:
            raise DamagedShardError("its checksum is another")
        row.checked = fingerprint
    return tensors


def _open(path: Path) -> int:
    try:
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise GoneError from error
    except OSError as error:
        raise DamagedShardError(error.strerror or str(error)) from error
    return number


def _pread(number: int, size: int, begin: int) -> memoryview:
    """Bytes of a file in memory that may be written."""
    held = torch.empty(size, dtype=torch.uint8)
    _fill(number, held, begin)
    return memoryview(held.numpy())


def _fill(number: int, held: Tensor, begin: int) -> None:
    """Fills a tensor of bytes from a file."""
    left = memoryview(held.numpy())
    while left:
        read = os.preadv(number, [left], begin)
        if read == 0:
            raise DamagedShardError("it is cut")
        left, begin = left[read:], begin + read


def _read_span(number: int, span: Span) -> Tensor:
    held = torch.empty(span.shape, dtype=span.dtype)
    if held.numel():
        _fill(number, _bytes_of(held), span.begin)
    return held


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _sha256(tensors: Mapping[str, Stored]) -> str:
    """Of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        stored = tensors[name]
        digest.update(json.dumps([name, _name(stored.dtype), _described(stored)]).encode())
        for tensor in _parts_of(stored):
            digest.update(_bytes_of(tensor).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _index_sha256(version: str, text: str) -> str:
    return hashlib.sha256(f"{version}\n{text}".encode()).hexdigest()


def _parts_of(stored: Stored) -> list[Tensor]:
    return [stored.values] if stored.scale is None else [stored.values, stored.scale]


def _described(stored: Stored) -> list[Any]:
    """Dtype and shape of the values, and the shape of the scale or None."""
    scale = None if stored.scale is None else list(stored.scale.shape)
    return [_name(stored.values.dtype), list(stored.values.shape), scale]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(name)
    return found


def _parsed(index: dict[str, Any], header: dict[str, Any], data: int) -> Index:
    rows, parts = [], []
    for id, entry in index.items():
        places = {}
        for name, tensor in entry["tensors"].items():
            dtype, shape, scale = tensor["stored"]
            places[name] = Place(
                _span(header[f"{id}/{name}"], _dtype(dtype), shape, data),
                None
                if scale is None
                else _span(header[f"{id}#{name}"], torch.float32, scale, data),
                _dtype(tensor["dtype"]),
            )
        error = entry["cosine_error"]
        rows.append(
            Row(
                id=id,
                kind=str(entry["kind"]),
                dtype=str(entry["dtype"]),
                size=int(entry["bytes"]),
                written=float(entry["written"]),
                sha256=str(entry["sha256"]),
                cosine_error=None if error is None else CosineError(error["mean"], error["max"]),
                places=places,
            )
        )
        parts.append({name: _as_tuples(part) for name, part in entry["parts"].items()})
    return Index(rows, parts)


def _span(header: dict[str, Any], dtype: torch.dtype, shape: list[int], data: int) -> Span:
    span = Span(dtype, tuple(shape), data + int(header["data_offsets"][0]))
    if _end(span) != data + int(header["data_offsets"][1]) or span.begin < data:
        raise ValueError("offsets")
    return span


def _end(span: Span) -> int:
    size = span.dtype.itemsize
    for length in span.shape:
        size *= length
    return span.begin + size


def _spans(row: Row) -> list[Span]:
    return [s for p in row.places.values() for s in (p.values, p.scale) if s is not None]


def _as_tuples(part: Any) -> Any:
    return tuple(map(_as_tuples, part)) if isinstance(part, list) else part
