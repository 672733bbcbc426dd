"""Writers that are killed at any moment, and several of them at once."""

import os
import random
import select
import signal
import time
from pathlib import Path

import pytest

from alignlab.dataset_cache import store
from alignlab.dataset_cache.store import DatasetCache
from alignlab.dataset_cache.survey import damaged_entries, survey
from cache_entries import entry_key, entry_tensors, same_tensors
from processes import forked

MANY = 10_000


def write_and_confirm(path: Path, pipe: int, start: int) -> None:
    """Writes entries, and sends the number of each that flush() has confirmed."""
    with DatasetCache(path, "write") as cache:
        for first in range(start, MANY, 3):
            for number in range(first, first + 3):
                cache.write(entry_key(number), entry_tensors(number, 800))
            cache.flush()
            os.write(pipe, first.to_bytes(4, "little"))


def killed_writer(path: Path, start: int, seed: int) -> int:
    """Gives the number behind the last entry that a killed process had confirmed."""
    reading, writing = os.pipe()
    child = forked(lambda: write_and_confirm(path, writing, start))
    os.close(writing)
    rng = random.Random(seed)
    assert select.select([reading], [], [], 120)[0], "the writer has not begun"
    time.sleep(rng.random() * 0.03)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    sent = b""
    while chunk := os.read(reading, 2**16):
        sent += chunk
    os.close(reading)
    return int.from_bytes(sent[-4:], "little") + 3


def test_a_kill_loses_nothing_that_was_flushed(tmp_path: Path) -> None:
    end = 0
    for seed in range(10):
        end = killed_writer(tmp_path, end, seed)
        found = survey(tmp_path)
        assert found.damaged == {} and damaged_entries(found) == {}
        cache = DatasetCache(tmp_path, "require")
        for number in range(end):
            assert same_tensors(cache.read(entry_key(number)), entry_tensors(number, 800))
    assert end >= 30


@pytest.mark.parametrize("moment", ["sync_file", "_sync_folder"])
def test_a_kill_within_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def work() -> None:
        monkeypatch.setattr(
            f"alignlab.runs.atomic_files.{moment}", lambda _: os.kill(os.getpid(), signal.SIGKILL)
        )
        with DatasetCache(tmp_path, "write") as cache:
            cache.write(entry_key(0), entry_tensors(0))

    assert os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1]) == -signal.SIGKILL
    found = survey(tmp_path)
    is_renamed = moment == "_sync_folder"
    assert len(found.leftovers) == (not is_renamed) and len(found.indexes) == is_renamed
    assert (DatasetCache(tmp_path, "read").read(entry_key(0)) is not None) == is_renamed


def test_four_processes_write_the_same_keys(tmp_path: Path) -> None:
    def work(first: int) -> None:
        store.SHARD_ENTRIES = 7  # in this process alone
        with DatasetCache(tmp_path, "write") as cache:
            for number in range(first, first + 60):
                found = cache.read(entry_key(number))
                if found is None:
                    found = cache.write(entry_key(number), entry_tensors(number))
                assert same_tensors(found, entry_tensors(number))

    children = [forked(lambda first=first: work(first)) for first in (0, 10, 20, 30)]  # type: ignore[misc]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    found = survey(tmp_path)
    assert found.damaged == {} and damaged_entries(found) == {} and found.leftovers == []
    cache = DatasetCache(tmp_path, "require")
    for number in range(90):
        assert same_tensors(cache.read(entry_key(number)), entry_tensors(number))
