"""`alignlab cache status`, `verify`, `prune`: what they say, and beside running readers."""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from alignlab.dataset_cache import prune as pruning
from alignlab.dataset_cache import shard
from alignlab.dataset_cache.prune import prune
from alignlab.dataset_cache.shard_folder import new_name
from alignlab.dataset_cache.store import DatasetCache
from alignlab.dataset_cache.survey import damaged_entries, survey
from alignlab.runs.file_lock import file_lock
from cache_entries import entry_key, entry_tensors, same_tensors, shards_of, write_entries
from command_line import alignlab, refused
from damage import KINDS, delete, empty


def whole(path: Path, numbers: list[int], size: int = 24) -> bool:
    """Whether exactly these text entries are there, once and as they were written."""
    found = survey(path)
    cache = DatasetCache(path, "require")
    return (
        found.damaged == {}
        and found.num_copies == 0
        and len(list(found.rows())) == len(numbers)
        and all(same_tensors(cache.read(entry_key(n)), entry_tensors(n, size)) for n in numbers)
    )


def write_copies(path: Path, numbers: range) -> None:
    caches = [DatasetCache(path, "write") for _ in range(2)]
    for cache in caches:
        for number in numbers:
            cache.write(entry_key(number), entry_tensors(number))
    for cache in caches:
        cache.close()


def test_status(tmp_path: Path) -> None:
    write_entries(tmp_path, range(3))
    write_entries(tmp_path, range(2), "teacher", dtype="fp8")
    write_copies(tmp_path, range(5, 6))
    done = alignlab("cache", "status", tmp_path)
    assert done.exit_code == 0, done.output
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines()]
    rows = {tuple(line[:2]): line[2:6] for line in lines if len(line) == 8}
    assert rows["text", "fp32"] == ["5", "495 B", "-", "-"]
    entries, size, mean, largest = rows["teacher", "fp8"]
    assert (entries, size) == ("2", "78 B") and 1e-5 < float(mean) < float(largest) < 1e-2
    assert "7 entries" in done.stdout and "in 4 shards, 1 copies" in done.stdout


@pytest.mark.parametrize("command", ["status", "verify", "prune"])
def test_what_is_no_cache_is_refused_and_left_alone(tmp_path: Path, command: str) -> None:
    for path in (tmp_path, tmp_path / "none"):
        assert "holds no dataset cache" in refused("cache", command, path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["status", "verify", "prune"])
def test_a_newer_cache_is_refused(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shard, "VERSION", 2)
        write_entries(tmp_path, [0])
    assert "a newer alignlab wrote it" in refused("cache", command, tmp_path)
    assert len(shards_of(tmp_path)) == 1


def test_verify_of_a_whole_cache(tmp_path: Path) -> None:
    write_entries(tmp_path, range(3))
    done = alignlab("cache", "verify", tmp_path)
    assert done.exit_code == 0 and done.stdout == "3 entries in 1 shards, all whole\n"


@pytest.mark.parametrize("damage", [kind for kind in KINDS if kind is not delete])
def test_verify_finds_and_removes_damage(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    [path] = write_entries(tmp_path, range(4), size=2400)
    write_entries(tmp_path, range(4, 6), size=2400)
    damage(path)
    done = alignlab("cache", "verify", tmp_path)
    assert done.exit_code == 1 and str(path) in done.stdout and "--remove" in done.stdout
    assert path.exists()
    done = alignlab("cache", "verify", tmp_path, "--remove")
    assert done.exit_code == 0 and "removed" in done.stdout
    left = [row.id for _, row in survey(tmp_path).rows()]
    assert len(left) == (5 if damage.__name__ == "flip" else 2)
    assert alignlab("cache", "verify", tmp_path).exit_code == 0
    cache = DatasetCache(tmp_path, "read")
    found = [cache.read(entry_key(number)) for number in range(6)]
    assert sum(tensors is not None for tensors in found) == len(left)


def test_verify_names_the_entry(tmp_path: Path) -> None:
    [path] = write_entries(tmp_path, [3])
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = alignlab("cache", "verify", tmp_path)
    assert "its checksum is another: text entry of caption='clip 3', frames=(3, 4)" in done.stdout


def test_prune_puts_small_shards_together_without_copies(tmp_path: Path) -> None:
    for number in range(3):
        write_copies(tmp_path, range(number * 2, number * 2 + 2))
    written = {row.id: row.written for _, row in survey(tmp_path).rows()}
    done = alignlab("cache", "prune", tmp_path, "--dry-run")
    assert "6 entries: copies" in done.stdout and "would stay: 6 entries" in done.stdout
    assert len(shards_of(tmp_path)) == 6
    done = alignlab("cache", "prune", tmp_path)
    assert "6 entries: copies" in done.stdout and "stay: 6 entries" in done.stdout
    assert whole(tmp_path, list(range(6))) and len(shards_of(tmp_path)) == 1
    assert {row.id for _, row in survey(tmp_path).rows()} == written.keys()
    [before] = shards_of(tmp_path)
    assert alignlab("cache", "prune", tmp_path).exit_code == 0  # there is nothing to do
    assert shards_of(tmp_path) == [before]


def test_prune_keeps_the_copy_that_is_whole(tmp_path: Path) -> None:
    for place in range(2):
        path = tmp_path / str(place)
        write_copies(path, range(1))
        damaged = shards_of(path)[place]
        content = damaged.read_bytes()
        damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert prune(path).kept == 1
        assert whole(path, [0])


def written_at(path: Path, number: int, days_ago: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        then = time.time() - days_ago * 86400
        patch.setattr("alignlab.dataset_cache.shard_index.time.time", lambda: then)
        write_entries(path, [number], size=2400)


def test_prune_by_age_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, days in enumerate((40, 1, 30, 3, 2)):
        written_at(tmp_path, number, days, monkeypatch)
    done = alignlab("cache", "prune", tmp_path, "--older-than", 35)
    assert "1 entries: written more than 35.0 days ago" in done.stdout
    assert whole(tmp_path, [1, 2, 3, 4], 2400)  # in one shard, each as old as it was
    done = alignlab("cache", "prune", tmp_path, "--older-than", 20, "--max-size", 25e-6)
    assert "1 entries: written more than" in done.stdout
    assert "1 entries: the oldest, above" in done.stdout
    assert whole(tmp_path, [1, 4], 2400)
    assert survey(tmp_path).file_bytes <= 25e3


def test_prune_clears_what_killed_writers_left(tmp_path: Path) -> None:
    [path] = write_entries(tmp_path, [0])
    old, young = (path.with_name(f".{new_name()}.tmp") for _ in range(2))
    for left in (old, young):
        left.write_bytes(b"half")
    other = path.with_name("model.safetensors")
    other.write_text("of somebody else")
    os.utime(old, (0, 0))
    prune(tmp_path)
    assert not old.exists() and young.exists() and other.exists() and whole(tmp_path, [0])


def test_a_killed_prune_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    for number in range(3):
        write_entries(tmp_path, [number])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pruning, "write_shard", stopped)
        prune(tmp_path)
    assert whole(tmp_path, [0, 1, 2])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", stopped)  # the new shard is there, and so are the old ones
        prune(tmp_path)
    assert survey(tmp_path).num_copies == 3
    prune(tmp_path)
    assert whole(tmp_path, [0, 1, 2])


def test_two_prunes_at_once_are_refused(tmp_path: Path) -> None:
    write_entries(tmp_path, [0])
    with file_lock(tmp_path / pruning.LOCK, waiting=str):
        assert "another command prunes" in refused("cache", "prune", tmp_path)


def test_readers_and_writers_beside_prune(tmp_path: Path) -> None:
    for first in range(0, 12, 2):
        write_entries(tmp_path, range(first, first + 2))
    problems: list[object] = []
    done = threading.Event()

    def read() -> None:
        cache = DatasetCache(tmp_path, "require")
        while not done.wait(0.001):
            for number in range(12):
                found = cache.read(entry_key(number))  # refused if it were missing
                if not same_tensors(found, entry_tensors(number)):
                    problems.append(number)

    def write() -> None:
        for number in range(12, 20):
            write_entries(tmp_path, [number])

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                problems.append(error)
                raise

        return run

    reader, writer = (threading.Thread(target=guarded(work)) for work in (read, write))
    reader.start()
    writer.start()
    while writer.is_alive():
        prune(tmp_path)
    writer.join()
    done.set()
    reader.join()
    assert problems == []
    prune(tmp_path)
    assert whole(tmp_path, list(range(20))) and damaged_entries(survey(tmp_path)) == {}


def test_a_folder_in_place_of_a_shard_goes_away(tmp_path: Path) -> None:
    [path] = write_entries(tmp_path, [0])
    path.unlink()
    (path / "inner").mkdir(parents=True)
    empty(path / "file")
    assert prune(tmp_path).damaged_shards == 1
    assert shards_of(tmp_path) == []


def test_a_shard_that_this_user_may_not_read_is_told_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_entries(tmp_path, [0, 1])
    [first] = shards_of(tmp_path)
    write_entries(tmp_path, [2, 3])
    opened = os.open

    def refusing(path: Path, *args: int, **options: int) -> int:
        if path == first:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *args, **options)

    early = survey(tmp_path)  # its header is read before the shard's owner closes it
    monkeypatch.setattr(os, "open", refusing)
    cache = DatasetCache(tmp_path, "write")
    assert cache.read(entry_key(0)) is None and cache.read(entry_key(2)) is not None
    assert cache.counts["text"].damaged == cache.damaged_shards == 0
    (message,) = [one for one in caplog.messages if "cannot be read in part" in one]
    assert f"({first.name}: Permission denied)" in message
    assert damaged_entries(early) == {} and list(early.unreadable) == [first.name]
    line = f"{first} cannot be read, and stays: Permission denied"
    for command, code in (("status", 0), ("verify", 1), ("prune", 0)):
        result = alignlab("cache", command, tmp_path)
        assert (line in result.stdout, result.exit_code) == (True, code), result.output
    assert alignlab("cache", "verify", tmp_path, "--remove").exit_code == 1
    monkeypatch.setattr(pruning, "survey", lambda path: early)
    assert prune(tmp_path, max_bytes=10**9).unreadable == {first.name: "Permission denied"}
    monkeypatch.setattr(os, "open", opened)
    assert first.exists() and whole(tmp_path, [0, 1, 2, 3])
