"""The index of a shard: which entries it has, and where their tensors lie.

Tensors are named `ID/NAME` in the file, their scales `ID#NAME`.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from alignlab.dataset_cache.key import CacheKey
from alignlab.dataset_cache.storage_dtypes import STORABLE, CosineError, Stored


@dataclass(frozen=True)
class Entry:
    """A value with all that a shard says of it.

    Args:
        id: `entry_id` of its key.
        kind: of its key.
        parts: of its key.
        dtype: that it is stored in.
        tensors: by name.
        cosine_error: None: all of it is stored exactly.
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
        return sum(tensor.nbytes for stored in self.tensors.values() for tensor in _held(stored))


@dataclass(frozen=True, slots=True)
class Span:
    """A tensor in a shard, from byte `begin` of the file on."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def end(self) -> int:
        """The byte behind it."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return self.begin + size


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of an entry lies, with its scale, and the dtype that it is read in."""

    name: str
    values: Span
    scale: Span | None
    dtype: torch.dtype


@dataclass(slots=True)
class Row:
    """An entry as the index of a shard has it.

    Args:
        id: `entry_id` of its key.
        kind: of its key.
        dtype: that it is stored in.
        size: bytes of its tensors.
        written: seconds since 1970.
        sha256: of names, dtypes, shapes and bytes of its tensors.
        cosine_error: None: all of it is stored exactly.
        places: of its tensors.
        checked: how the file looked when the checksum was last found right.
    """

    id: str
    kind: str
    dtype: str
    size: int
    written: float
    sha256: str
    cosine_error: CosineError | None
    places: tuple[Place, ...]
    checked: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Index:
    """The entries of a shard.

    Args:
        rows: in the order of the index.
        keys: of `keys_text`.
        file_size: bytes of the shard.
    """

    rows: list[Row]
    keys: str
    file_size: int

    def parts(self, id: str) -> dict[str, Any]:
        """Parts of an entry's key."""
        return {name: _as_tuples(part) for name, part in self._keys[id].items()}

    @cached_property
    def _keys(self) -> dict[str, dict[str, Any]]:
        return dict(json.loads(self.keys))


def entry_id(key: CacheKey, dtype: str) -> str:
    """What an entry is found under: what is read depends on the dtype as well."""
    return f"{key.digest}-{dtype}"


def key_digest(id: str) -> str:
    """`CacheKey.digest` of an entry."""
    return id.partition("-")[0]


def new_entry(
    key: CacheKey, dtype: str, tensors: Mapping[str, Stored], error: CosineError | None
) -> Entry:
    """An entry that is written now."""
    parts = dict(key.parts)
    return Entry(entry_id(key, dtype), key.kind, parts, dtype, tensors, error, time.time())


def named_tensors(entry: Entry) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an entry under their names in the file."""
    for name, stored in entry.tensors.items():
        yield f"{entry.id}/{name}", stored.values
        if stored.scale is not None:
            yield f"{entry.id}#{name}", stored.scale


def index_text(entries: list[Entry]) -> str:
    """The index of a shard, as `parse_index` reads it, as JSON."""
    index = {
        entry.id: {
            "kind": entry.kind,
            "dtype": entry.dtype,
            "written": entry.written,
            "bytes": entry.size,
            "cosine_error": None if entry.cosine_error is None else asdict(entry.cosine_error),
            "tensors": {name: _described(stored) for name, stored in entry.tensors.items()},
            "sha256": entry_sha256(entry.tensors),
        }
        for entry in entries
    }
    return json.dumps(index, separators=(",", ":"))


def keys_text(entries: list[Entry]) -> str:
    """The parts of all keys, by id, as JSON."""
    return json.dumps({e.id: dict(e.parts) for e in entries}, separators=(",", ":"))


def parse_index(
    metadata: Mapping[str, str], header: Mapping[str, Any], data: int, file_size: int
) -> Index:
    """Reads the index of a shard.

    Args:
        metadata: with `index` and `keys`, of `index_text` and `keys_text`.
        header: what safetensors says of each tensor.
        data: byte of the file from which on it counts.
        file_size: bytes.

    Raises:
        ValueError, TypeError, LookupError, AttributeError, RecursionError: it is none, or header
            and file do not fit.
    """
    rows = []
    for id, entry in json.loads(metadata["index"]).items():
        places = []
        for name, (stored, shape, scale, dtype) in entry["tensors"].items():
            values = _span(header[f"{id}/{name}"], stored, shape, data, file_size)
            if scale is not None:
                scale = _span(header[f"{id}#{name}"], "float32", scale, data, file_size)
            places.append(Place(name, values, scale, _dtype(dtype)))
        error = entry["cosine_error"]
        rows.append(
            Row(
                id=id,
                kind=entry["kind"],
                dtype=entry["dtype"],
                size=entry["bytes"],
                written=entry["written"],
                sha256=entry["sha256"],
                cosine_error=None if error is None else CosineError(error["mean"], error["max"]),
                places=tuple(places),
            )
        )
    return Index(rows, metadata["keys"], file_size)


def entry_sha256(tensors: Mapping[str, Stored]) -> str:
    """Of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        stored = tensors[name]
        digest.update(json.dumps([name, *_described(stored)]).encode())
        for tensor in _held(stored):
            if tensor.numel():
                digest.update(bytes_of(tensor).numpy().data)
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as bytes."""
    return tensor.reshape(-1).view(torch.uint8)


def _held(stored: Stored) -> list[Tensor]:
    return [stored.values] if stored.scale is None else [stored.values, stored.scale]


def _described(stored: Stored) -> list[Any]:
    """Dtype and shape as stored, shape of the scale or None, dtype that it is read in."""
    scale = None if stored.scale is None else list(stored.scale.shape)
    values = stored.values
    return [_name(values.dtype), list(values.shape), scale, _name(stored.dtype)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(name)
    return found


def _span(
    header: Mapping[str, Any], dtype: str, shape: list[int], data: int, file_size: int
) -> Span:
    begin, end = header["data_offsets"]
    span = Span(_dtype(dtype), tuple(shape), data + begin)
    if header["dtype"] != STORABLE[span.dtype] or header["shape"] != shape:
        raise ValueError("dtype or shape")
    if begin < 0 or span.end != data + end or span.end > file_size:
        raise ValueError("offsets")
    return span


def _as_tuples(part: Any) -> Any:
    return tuple(map(_as_tuples, part)) if isinstance(part, list) else part
