"""Why an entry is not in a cache, for those who expect it there."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignlab.dataset_cache.key import CacheKey
from alignlab.dataset_cache.shard import DamagedShardError, GoneError, UnreadableError, read_index
from alignlab.dataset_cache.shard_folder import ShardFolder
from alignlab.dataset_cache.shard_index import entry_id, key_digest
from alignlab.errors import shown

THREADS = "model.threads"  # of `model_parts` on a CPU
SHOWN = 4  # parts that a message has room for


def why_missing(shards: ShardFolder, key: CacheKey, dtype: str) -> str:
    """The end of a sentence: what is asked for, and how the entry that is nearest to it differs."""
    best: tuple[int, Mapping[str, Any]] | None = None
    for id, stored_in, parts in _entries(shards, key.kind):
        if id == entry_id(key, dtype):
            return f"that is whole (`alignlab cache verify {shards.path.parent} --remove`)"
        if key_digest(id) == key.digest:
            return f"stored as {dtype} (there is one as {stored_in}: see data.cache.dtype)"
        distance = len(_differing(key.parts, parts))
        if best is None or distance < best[0]:
            best = distance, parts
    if best is None:
        return f"at all that can be read (asked for: {_listed(key.parts, list(key.parts))})"
    names = _differing(key.parts, best[1])
    hint = ""
    if THREADS in names and THREADS in key.parts and THREADS in best[1]:
        hint = f"; give as many CPU threads: OMP_NUM_THREADS={best[1][THREADS]}, or launch.cpus"
    return f"of {_listed(key.parts, names)} (the nearest has {_listed(best[1], names)}{hint})"


def _entries(shards: ShardFolder, kind: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Id, dtype and parts of all of a kind that can be read."""
    for path in shards.shards():
        try:
            index = read_index(path)
        except (GoneError, UnreadableError, DamagedShardError):
            continue
        for row in index.rows:
            if row.kind == kind:
                yield row.id, row.dtype, index.parts(row.id)


def _differing(asked: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Names of the parts in which keys differ."""
    names = [*asked, *(name for name in there if name not in asked)]
    return [name for name in names if repr(asked.get(name)) != repr(there.get(name))]


def _listed(parts: Mapping[str, Any], names: Sequence[str]) -> str:
    text = ", ".join(
        f"{name}={shown(parts[name], 40)}" if name in parts else f"no {name}"
        for name in names[:SHOWN]
    )
    more = len(names) - SHOWN
    return f"{text} and {more} more" if more > 0 else text
