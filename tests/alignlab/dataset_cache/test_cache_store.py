"""What is written is read, bit for bit, by this process and by others; modes, buffer, disks."""

import errno
import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from alignlab.dataset_cache import store
from alignlab.dataset_cache.disk_room import size_text
from alignlab.dataset_cache.key import CacheKey
from alignlab.dataset_cache.storage_dtypes import STORABLE
from alignlab.dataset_cache.store import DatasetCache
from alignlab.errors import UserError
from alignlab.units import GIB
from cache_entries import (
    entry_key,
    entry_tensors,
    same_bits,
    same_tensors,
    shards_of,
    write_entries,
)

KEY = entry_key(0)
TENSORS = entry_tensors(0)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Of any dtype and shape, with any bits, contiguous or not."""
    dtype = draw(st.sampled_from(sorted(STORABLE, key=str)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    size = torch.Size(shape).numel()
    if dtype == torch.bool:
        tensor = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    else:
        held = draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
        tensor = torch.frombuffer(bytearray(held or b"0" * 16), dtype=dtype)[:size]
    tensor = tensor.to(dtype).reshape(shape)
    is_turned = draw(st.booleans())
    return tensor.transpose(0, -1) if is_turned and len(shape) > 1 else tensor


@given(
    st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=9), tensors(), max_size=4),
    st.sampled_from(["fp32", "bf16", "fp8", "int8"]),
)
@settings(max_examples=30, deadline=None)
def test_any_tensors_come_back(
    tmp_path_factory: pytest.TempPathFactory, written: dict[str, Tensor], dtype: Any
) -> None:
    path = tmp_path_factory.mktemp("cache")
    key = CacheKey("video", {"n": 1})
    with DatasetCache(path, "write", dtype) as cache:
        assert same_tensors(cache.write(key, written), written)
        assert same_tensors(cache.read(key), written)  # from the buffer
    assert same_tensors(cache.read(key), written)
    assert same_tensors(DatasetCache(path, "read").read(key), written)


def test_shards_are_safetensors_files(tmp_path: Path) -> None:
    [shard] = write_entries(tmp_path, range(2))
    with safe_open(shard, "pt") as file:
        assert len(file.keys()) == 4
        name = f"{KEY.digest}-fp32/values"
        assert same_bits(file.get_tensor(name), TENSORS["values"])
        assert file.metadata()["version"] == "1"


def test_what_is_read_is_the_readers_own(tmp_path: Path) -> None:
    with DatasetCache(tmp_path, "write") as cache:
        given = {name: tensor.clone() for name, tensor in TENSORS.items()}
        cache.write(KEY, given)
        given["values"].zero_()
        for _ in range(2):
            found = cache.read(KEY)
            assert found is not None and same_tensors(found, TENSORS)
            found["values"].zero_()
            cache.flush()
            found = cache.read(KEY)
            assert found is not None and same_tensors(found, TENSORS)
            found["values"].zero_()


@pytest.mark.parametrize("mode", ["off", "read", "require"])
def test_nothing_is_written_in_other_modes(tmp_path: Path, mode: Any) -> None:
    with DatasetCache(tmp_path / "cache", mode) as cache:
        cache.write(KEY, TENSORS)
    assert not (tmp_path / "cache").exists()
    assert cache.counts["text"].written == 0


def test_off_reads_nothing(tmp_path: Path) -> None:
    write_entries(tmp_path, [0])
    cache = DatasetCache(tmp_path, "off")
    assert cache.read(KEY) is None
    assert cache.counts["text"] == store.Counts()


def test_counts(tmp_path: Path) -> None:
    with DatasetCache(tmp_path, "write") as cache:
        assert cache.read(KEY) is None
        cache.write(KEY, TENSORS)
        cache.write(KEY, TENSORS)
        assert cache.counts["text"] == store.Counts(misses=1)
        cache.flush()
        cache.read(KEY)
    assert cache.counts["text"] == store.Counts(hits=1, misses=1, written=1, written_bytes=99)
    assert cache.counts["video"] == store.Counts()


def test_a_required_entry_that_is_missing_is_explained(tmp_path: Path) -> None:
    cache = DatasetCache(tmp_path, "require")
    with pytest.raises(UserError, match="no text entry at all that can be read"):
        cache.read(KEY)
    write_entries(tmp_path, [1, 7])
    assert same_tensors(cache.read(entry_key(1)), entry_tensors(1))
    with pytest.raises(UserError) as refused:
        cache.read(CacheKey("text", {"caption": "clip 7", "frames": (7, 9), "fps": 8}))
    assert "of frames=(7, 9), fps=8 (the nearest has frames=(7, 8), no fps)" in str(refused.value)
    assert "alignlab cache build" in str(refused.value)


def test_a_required_entry_of_another_dtype_is_explained(tmp_path: Path) -> None:
    write_entries(tmp_path, [1], "teacher", dtype="fp8")
    with pytest.raises(UserError, match=r"stored as bf16 \(there is one as fp8"):
        DatasetCache(tmp_path, "require", "bf16").read(entry_key(1, "teacher"))


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        DatasetCache(tmp_path / "file", "write")


def test_entries_of_other_processes_are_found(tmp_path: Path) -> None:
    cache = DatasetCache(tmp_path, "write")
    for number in range(5):  # within a tick of the clock
        assert cache.read(entry_key(number)) is None
        write_entries(tmp_path, [number])
        assert same_tensors(cache.read(entry_key(number)), entry_tensors(number))


def test_many_entries_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD_ENTRIES", 3)
    cache = DatasetCache(tmp_path, "write")
    for number in range(7):
        cache.write(entry_key(number), entry_tensors(number))
    assert len(shards_of(tmp_path)) == 2 and cache.counts["text"].written == 6


def test_large_entries_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD_BYTES", 4000)
    cache = DatasetCache(tmp_path, "write")
    cache.write(entry_key(0), entry_tensors(0, 800))
    assert len(shards_of(tmp_path)) == 0
    cache.write(entry_key(1), entry_tensors(1, 800))
    assert len(shards_of(tmp_path)) == 1


def test_entries_that_wait_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("alignlab.dataset_cache.store.time.monotonic", lambda: clock[0])
    cache = DatasetCache(tmp_path, "write")
    cache.write(entry_key(0), entry_tensors(0))
    for now, shards in ((29.0, 0), (31.0, 1), (10_031.0, 1)):
        clock[0] = now
        cache.read(entry_key(9))
        assert len(shards_of(tmp_path)) == shards
    cache.write(entry_key(1), entry_tensors(1))  # from 10,031 s on: a twentieth is 500 s
    for now, shards in ((10_500.0, 1), (10_600.0, 2)):
        clock[0] = now
        cache.read(entry_key(9))
        assert len(shards_of(tmp_path)) == shards


def test_threads_read_and_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD_ENTRIES", 5)
    cache = DatasetCache(tmp_path, "write")
    wrong: list[int] = []

    def work(first: int) -> None:
        for number in range(first, first + 40):
            found = cache.read(entry_key(number))
            if found is None:
                found = cache.write(entry_key(number), entry_tensors(number))
            if not same_tensors(found, entry_tensors(number)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.close()
    assert wrong == []
    fresh = DatasetCache(tmp_path, "require")
    assert all(same_tensors(fresh.read(entry_key(n)), entry_tensors(n)) for n in range(70))
    assert cache.counts["text"].written >= 70


def test_a_forked_process_writes_what_is_its_own(tmp_path: Path) -> None:
    cache = DatasetCache(tmp_path, "write")
    cache.write(entry_key(0), entry_tensors(0))
    with cache._lock:  # as if another thread of the parent held it
        child = os.fork()
        if child == 0:
            cache.write(entry_key(1), entry_tensors(1))
            cache.close()
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    other = DatasetCache(tmp_path, "read")
    assert other.read(entry_key(0)) is None and other.read(entry_key(1)) is not None
    cache.close()
    assert len(shards_of(tmp_path)) == 2 and other.read(entry_key(0)) is not None


def test_an_interrupted_flush_is_done_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    cache = DatasetCache(tmp_path, "write")
    cache.write(KEY, TENSORS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "write_shard", interrupted)
        cache.flush()
    assert same_tensors(cache.read(KEY), TENSORS)
    cache.close()
    assert same_tensors(DatasetCache(tmp_path, "read").read(KEY), TENSORS)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
READ_ONLY = OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(
    ("error", "reason"), [(FULL, "the disk is full"), (READ_ONLY, "Read-only file system")]
)
def test_a_disk_that_takes_nothing_is_one_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: OSError,
    reason: str,
) -> None:
    def refusing(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr("alignlab.dataset_cache.shard.write_bytes", refusing)
    with caplog.at_level(logging.INFO), DatasetCache(tmp_path, "write") as cache:
        for number in range(3):
            assert same_tensors(
                cache.write(entry_key(number), entry_tensors(number)), entry_tensors(number)
            )
            cache.flush()
    assert caplog.messages == [
        f"nothing more is cached in {tmp_path} ({reason}): all else goes on, and what is not "
        "there is computed each time"
    ]
    assert cache.write_error is error and cache.counts["text"].written == 0
    assert list((tmp_path / "shards").iterdir()) == []


@pytest.mark.parametrize(
    ("total", "free", "is_kept"),
    [
        (4 * GIB, 1.1 * GIB, True),
        (4 * GIB, 0.9 * GIB, False),
        (100 * GIB, 5.1 * GIB, True),
        (100 * GIB, 4.9 * GIB, False),
        (10_000 * GIB, 51 * GIB, True),
        (10_000 * GIB, 49 * GIB, False),
        (0, 0, True),
    ],
)
def test_some_of_the_disk_is_left_to_checkpoints(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    total: float,
    free: float,
    is_kept: bool,
) -> None:
    disk = SimpleNamespace(total=total, free=free)
    monkeypatch.setattr("alignlab.dataset_cache.disk_room.shutil.disk_usage", lambda path: disk)
    path = tmp_path / "not/there"
    with caplog.at_level(logging.INFO), DatasetCache(path, "write") as cache:
        for number in range(2):
            cache.write(entry_key(number), entry_tensors(number))
            cache.flush()
    assert cache.counts["text"].written == (2 if is_kept else 0)
    assert len(shards_of(path)) == (2 if is_kept else 0)
    assert len(caplog.messages) == (0 if is_kept else 1)
    if not is_kept:
        assert f"({free / GIB:.1f} GiB of its disk are free, of which" in caplog.text
        assert "left to checkpoints): all else goes on" in caplog.text


def test_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # A real one, as far as a limit on the size of files goes.
    child = os.fork()
    if child == 0:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with DatasetCache(tmp_path, "write") as cache:
            cache.write(entry_key(0), entry_tensors(0, 4000))
            cache.flush()
            cache.write(entry_key(1), entry_tensors(1))
        is_told = cache.write_error is not None and cache.write_error.errno == errno.EFBIG
        os._exit(0 if is_told else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert list((tmp_path / "shards").iterdir()) == []


def test_unknown_dtypes_are_refused_where_they_are_written(tmp_path: Path) -> None:
    cache = DatasetCache(tmp_path, "write")
    with pytest.raises(TypeError, match="complex128"):
        cache.write(KEY, {"a": torch.zeros(2, dtype=torch.complex128)})


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (8.1e6, "8.1 MB"),
        (999_600, "1 MB"),
        (2e15, "2,000 TB"),
    ],
)
def test_sizes_are_told_in_three_digits(size: float, text: str) -> None:
    assert size_text(size) == text
