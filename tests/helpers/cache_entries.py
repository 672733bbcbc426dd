"""Entries of a dataset cache that follow from their numbers, so that any process can tell them."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from alignlab.dataset_cache.key import CacheKey, Kind, StorageDtype
from alignlab.dataset_cache.store import DatasetCache


def entry_key(number: int, kind: Kind = "text") -> CacheKey:
    return CacheKey(kind, {"caption": f"clip {number}", "frames": (number, number + 1)})


def entry_tensors(number: int, size: int = 24) -> dict[str, Tensor]:
    """Two tensors of `size` numbers and fewer."""
    generator = torch.Generator().manual_seed(number)
    values = torch.randn(size // 8, 8, generator=generator)
    return {"values": values, "mask": values[:, 0] > 0}


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Also of what is not a number, and of -0."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    bits = [one.contiguous().reshape(-1) for one in (first, second)]
    return not first.numel() or torch.equal(bits[0].view(torch.uint8), bits[1].view(torch.uint8))


def same_tensors(found: dict[str, Tensor] | None, expected: dict[str, Tensor]) -> bool:
    return (
        found is not None
        and found.keys() == expected.keys()
        and all(same_bits(found[name], tensor) for name, tensor in expected.items())
    )


def write_entries(
    path: Path,
    numbers: Iterable[int],
    kind: Kind = "text",
    *,
    dtype: StorageDtype = "fp32",
    size: int = 24,
) -> list[Path]:
    """Writes entries as one shard, and gives all shards of the cache."""
    with DatasetCache(path, "write", dtype) as cache:
        for number in numbers:
            cache.write(entry_key(number, kind), entry_tensors(number, size))
    return shards_of(path)


def shards_of(path: Path) -> list[Path]:
    return sorted((path / "shards").glob("[!.]*"))
