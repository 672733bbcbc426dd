"""What is in a dataset cache: its entries by kind, and what is damaged."""

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from alignlab.dataset_cache.shard import (
    DamagedShardError,
    GoneError,
    UnreadableError,
    read_entry,
    read_index,
)
from alignlab.dataset_cache.shard_folder import SHARDS, leftovers, shard_names
from alignlab.dataset_cache.shard_index import Index, Row
from alignlab.errors import UserError, shown
from alignlab.progress import step_progress

THREADS = 4
SHOWN = 3  # parts of a key that a line has room for


@dataclass
class Survey:
    """The headers of all shards.

    Args:
        path: of the cache.
        indexes: by name of the shard.
        damaged: what is wrong with a shard, by its name.
        unreadable: why the system does not let a shard be read, by its name; it stays.
        leftovers: unfinished shards.
    """

    path: Path
    indexes: dict[str, Index] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    leftovers: list[Path] = field(default_factory=list)

    def rows(self) -> Iterator[tuple[str, Row]]:
        """All entries, with the shard of each."""
        for name, index in self.indexes.items():
            for row in index.rows:
                yield name, row

    @property
    def shards(self) -> Path:
        """Their folder."""
        return self.path / SHARDS

    @property
    def num_copies(self) -> int:
        """Entries that are there more than once, without the first of each."""
        ids = Counter(row.id for _, row in self.rows())
        return sum(ids.values()) - len(ids)

    @property
    def file_bytes(self) -> int:
        """Of all shards that can be read."""
        return sum(index.file_size for index in self.indexes.values())


@dataclass
class Group:
    """Entries of a kind that are stored in the same dtype.

    Args:
        entries: how many.
        size: bytes of their tensors.
        first: when the oldest was written, in seconds since 1970.
        last: when the newest was.
        error_sum: of the entries' mean cosine errors.
        error_max: of all tokens.
        lossy: entries that have a cosine error.
    """

    entries: int = 0
    size: int = 0
    first: float = float("inf")
    last: float = 0.0
    error_sum: float = 0.0
    error_max: float = 0.0
    lossy: int = 0

    def add(self, row: Row) -> None:
        """Counts an entry."""
        self.entries += 1
        self.size += row.size
        self.first, self.last = min(self.first, row.written), max(self.last, row.written)
        if row.cosine_error is not None:
            self.lossy += 1
            self.error_sum += row.cosine_error.mean
            self.error_max = max(self.error_max, row.cosine_error.max)


def check_is_cache(path: Path) -> None:
    """Refuses a folder that is no cache, before anything is made or removed there.

    Raises:
        UserError: it is none.
    """
    if not (path / SHARDS).is_dir():
        raise UserError(f"{path} holds no dataset cache (it has no folder {SHARDS})")


def survey(path: Path) -> Survey:
    """Reads the header of every shard.

    Raises:
        UserError: there is no cache, or a newer alignlab has written there.
        OSError: it cannot be listed.
    """
    check_is_cache(path)
    found = Survey(path, leftovers=leftovers(path / SHARDS))
    for name in sorted(shard_names(path / SHARDS)):
        try:
            found.indexes[name] = read_index(found.shards / name)
        except DamagedShardError as error:
            found.damaged[name] = str(error)
        except UnreadableError as error:
            found.unreadable[name] = str(error)
        except GoneError:  # another command prunes
            pass
    return found


def groups(found: Survey) -> dict[tuple[str, str], Group]:
    """Entries by kind and by the dtype that they are stored in."""
    result: dict[tuple[str, str], Group] = {}
    for _, row in found.rows():
        result.setdefault((row.kind, row.dtype), Group()).add(row)
    return dict(sorted(result.items()))


def days(found: Survey) -> dict[str, Group]:
    """Entries by the day (local time) on which they were written."""
    result: dict[str, Group] = {}
    for _, row in found.rows():
        day = time.strftime("%Y-%m-%d", time.localtime(row.written))
        result.setdefault(day, Group()).add(row)
    return dict(sorted(result.items()))


def damaged_entries(found: Survey) -> dict[tuple[str, str], str]:
    """Reads every entry and gives what is wrong, by shard and id of the entry.

    Shards that the system does not let be read are added to `found.unreadable`.
    """
    problems: dict[tuple[str, str], str] = {}
    with ExitStack() as stack:
        total = sum(len(index.rows) for index in found.indexes.values())
        advance = stack.enter_context(step_progress("entries", total=total))
        pool = stack.enter_context(ThreadPoolExecutor(THREADS))
        # on an error or Ctrl-C, what waits is not read any more
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        jobs = [(name, row, pool.submit(_problem, found, name, row)) for name, row in found.rows()]
        for done, (name, row, job) in enumerate(jobs, 1):
            problem = job.result()
            if problem is not None:
                problems[name, row.id] = problem
            advance(done, "")
    return problems


def described(found: Survey, shard: str, id: str) -> str:
    """An entry in words."""
    index = found.indexes[shard]
    kind = next(row.kind for row in index.rows if row.id == id)
    parts = list(index.parts(id).items())
    text = ", ".join(f"{name}={shown(part, 30)}" for name, part in parts[:SHOWN])
    return f"{kind} entry of {text}{', ...' if len(parts) > SHOWN else ''}"


def _problem(found: Survey, name: str, row: Row) -> str | None:
    try:
        read_entry(found.shards / name, row, check=True)
    except DamagedShardError as error:
        return str(error)
    except UnreadableError as error:
        found.unreadable[name] = str(error)
        return None
    except GoneError:  # another command prunes
        return None
    return None
