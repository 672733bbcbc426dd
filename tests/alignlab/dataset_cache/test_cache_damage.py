"""Damage is a miss that is counted and said once: never a traceback, never a wrong tensor."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from alignlab.dataset_cache import shard, store
from alignlab.dataset_cache.shard_folder import ShardFolder
from alignlab.dataset_cache.store import DatasetCache
from alignlab.errors import UserError
from cache_entries import entry_key, entry_tensors, same_tensors, shards_of, write_entries
from damage import KINDS, cut, delete

COUNT = 4
LARGE = 2400  # so that most of a shard is no header


def all_right_or_missing(cache: DatasetCache, size: int = 24) -> int:
    """Reads every entry, and gives how many are missing."""
    missing = 0
    for number in range(COUNT):
        found = cache.read(entry_key(number))
        if found is None:
            missing += 1
        else:
            assert same_tensors(found, entry_tensors(number, size)), number
    return missing


@pytest.mark.parametrize("damage", KINDS)
@pytest.mark.parametrize("is_open", [False, True], ids=["before", "under a reader"])
def test_a_damaged_shard(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    is_open: bool,
) -> None:
    [path] = write_entries(tmp_path, range(COUNT), size=LARGE)
    cache = DatasetCache(tmp_path, "write")
    if is_open:
        assert cache.read(entry_key(0)) is not None
    caplog.set_level(logging.INFO)
    damage(path)
    if not is_open:
        cache = DatasetCache(tmp_path, "write")
    missing = all_right_or_missing(cache, LARGE)
    assert missing == cache.counts["text"].misses > 0
    assert all_right_or_missing(cache, LARGE) == missing
    assert len(caplog.messages) == (0 if damage is delete and not is_open else 1)
    is_counted = cache.counts["text"].damaged > 0 or cache.damaged_shards > 0
    assert is_counted == (damage is not delete)
    for number in range(COUNT):  # as a run does
        if cache.read(entry_key(number)) is None:
            cache.write(entry_key(number), entry_tensors(number, LARGE))
    cache.close()
    assert all_right_or_missing(cache, LARGE) == 0
    assert all_right_or_missing(DatasetCache(tmp_path, "read"), LARGE) == 0


def test_every_bit_of_a_shard_counts(tmp_path: Path) -> None:
    [path] = write_entries(tmp_path, range(COUNT))
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        cache = DatasetCache(tmp_path, "read")
        missing = all_right_or_missing(cache)
        is_padding = content[position] == ord(" ")
        assert missing > 0 or is_padding, position


def test_every_length_of_a_shard(tmp_path: Path) -> None:
    [path] = write_entries(tmp_path, range(COUNT))
    content = path.read_bytes()
    cache = DatasetCache(tmp_path, "read")
    for length in range(len(content) - 1, -1, -97):
        os.truncate(path, length)
        assert all_right_or_missing(DatasetCache(tmp_path, "read")) == COUNT
    assert all_right_or_missing(cache) == COUNT  # that knew its index


def test_a_copy_is_read_in_place_of_a_damaged_entry(tmp_path: Path) -> None:
    first, second = DatasetCache(tmp_path, "write"), DatasetCache(tmp_path, "write")
    for cache in (first, second):
        cache.write(entry_key(0), entry_tensors(0))
    first.close()
    second.close()
    for path in shards_of(tmp_path):
        content = path.read_bytes()
        cache = DatasetCache(tmp_path, "read")
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert same_tensors(cache.read(entry_key(0)), entry_tensors(0))
        path.write_bytes(content)


def test_only_the_first_damage_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(COUNT):
        write_entries(tmp_path, [number])
    for path in shards_of(tmp_path):
        cut(path)
    cache = DatasetCache(tmp_path, "read")
    assert all_right_or_missing(cache) == COUNT and cache.damaged_shards == COUNT
    assert len(caplog.messages) == 1
    assert "is damaged" in caplog.text and "alignlab cache verify" in caplog.text


def test_a_required_entry_that_is_damaged_is_refused(tmp_path: Path) -> None:
    [path] = write_entries(tmp_path, [0])
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="no text entry that is whole"):
        DatasetCache(tmp_path, "require").read(entry_key(0))


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shard, "VERSION", 2)
        write_entries(tmp_path, [0])
    with pytest.raises(UserError, match="a newer alignlab wrote it \\(format 2, this one reads 1"):
        DatasetCache(tmp_path, "read")


def test_a_newer_format_while_a_run_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_entries(tmp_path, [0])
    cache = DatasetCache(tmp_path, "write")
    with monkeypatch.context() as patch:
        patch.setattr(shard, "VERSION", 2)
        write_entries(tmp_path, [1])
    assert cache.read(entry_key(1)) is None and cache.read(entry_key(0)) is not None
    assert len(caplog.messages) == 1 and "format 2" in caplog.text


def test_files_of_others_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_entries(tmp_path, [0])
    for name in ("model.safetensors", ".hidden", "notes.txt"):
        (tmp_path / "shards" / name).write_text("x")
    (tmp_path / "shards" / "folder").mkdir()
    assert DatasetCache(tmp_path, "read").read(entry_key(0)) is not None
    assert caplog.messages == []


def test_a_folder_that_cannot_be_listed_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "shards").write_text("a file")
    cache = DatasetCache(tmp_path, "write")
    assert cache.read(entry_key(0)) is None
    cache.write(entry_key(0), entry_tensors(0))
    cache.close()
    assert len(caplog.messages) == 2
    assert "cannot be listed" in caplog.messages[0]
    assert "nothing more is cached" in caplog.messages[1]


def test_other_rows_of_the_index_say_what_they_did(tmp_path: Path) -> None:
    # A header of safetensors that was changed by hand, with offsets of another entry.
    [path] = write_entries(tmp_path, range(2))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    names = [f"{entry_key(n).digest}-fp32/values" for n in range(2)]
    header[names[0]], header[names[1]] = header[names[1]], header[names[0]]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(content[:8] + text + content[8 + length :])
    folder = ShardFolder(tmp_path)
    assert len(folder.find(f"{entry_key(0).digest}-fp32")) == 1
    cache = DatasetCache(tmp_path, "read")
    assert [cache.read(entry_key(n)) for n in range(2)] == [None, None]
    assert cache.counts["text"] == store.Counts(misses=2, damaged=2)
