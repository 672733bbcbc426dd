"""The check of media files before training: what it remembers, and for whom."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from alignlab.data.check import MEMORY, MediaCheck, check_media
from alignlab.data.decode import ClipError


class Reader:
    """Checks that count how often each file was read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reads: list[str] = []

    def check(self, name: str, *others: str) -> MediaCheck:
        paths = tuple(self.folder / n for n in (name, *others))
        return MediaCheck(f"reading {name}", paths, lambda: self._read(name))

    def _read(self, name: str) -> str | None:
        self.reads.append(name)
        text = (self.folder / name).read_text()
        if text == "bad":
            raise ClipError(f"{name}: is bad", kind="bad")
        return text or None


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    for name, text in {"a": "", "b": "bad", "c": "a remark"}.items():
        (tmp_path / name).write_text(text)
    return Reader(tmp_path)


def test_verdicts_are_remembered_until_a_file_changes(reader: Reader, tmp_path: Path) -> None:
    memory = tmp_path / "runs" / "deep"
    checks = [reader.check("a"), reader.check("b"), reader.check("c", "a"), reader.check("a")]
    first = check_media(checks, memory, stop_at_error=False)
    assert sorted(reader.reads) == ["a", "b", "c"]
    assert [(v.error, v.kind, v.remark) for v in first.values()] == [
        (None, "", None),
        ("b: is bad", "bad", None),
        (None, "", "a remark"),
    ]
    assert check_media(checks, memory, stop_at_error=False) == first
    assert len(reader.reads) == 3
    (tmp_path / "a").write_text("new")  # one of the files of the third check, too
    again = check_media(checks, memory, stop_at_error=False)
    assert sorted(reader.reads[3:]) == ["a", "c"] and again["reading a"].remark == "new"
    stat = (tmp_path / "b").stat()
    (tmp_path / "b").write_text("yes")  # of the same size
    os.utime(tmp_path / "b", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert check_media(checks, memory, stop_at_error=False)["reading b"].error is None
    assert check_media(checks, None, stop_at_error=False)["reading b"].remark == "yes"
    assert len(reader.reads) == 3 + 2 + 1 + 3


def test_it_stops_at_the_first_error_and_keeps_what_was_found(reader: Reader) -> None:
    memory = reader.folder / "runs"
    checks = [reader.check(name) for name in "abc"]
    verdicts = check_media(checks, memory, stop_at_error=True)
    assert list(verdicts) == ["reading a", "reading b"]
    reader.reads.clear()
    assert check_media(checks, memory, stop_at_error=True) == verdicts
    assert reader.reads == []
    (reader.folder / "a").write_text("new")
    check_media(checks, memory, stop_at_error=True)
    assert reader.reads == ["a"]


def test_trouble_of_the_machine_is_not_remembered(reader: Reader) -> None:
    """Too many open files, a lack of permission: the next start looks again."""
    memory, states = reader.folder / "runs", [24, 13]

    def run() -> None:
        if states:
            raise ClipError("a: cannot be read") from OSError(states.pop(), "busy")

    checks = [MediaCheck("opening a", (reader.folder / "a",), run)]
    assert check_media(checks, memory, stop_at_error=False)["opening a"].error is not None
    assert check_media(checks, memory, stop_at_error=False)["opening a"].error is not None
    assert check_media(checks, memory, stop_at_error=False)["opening a"].error is None


@pytest.mark.parametrize("contents", ["", "{", "[]", '{"made_by": 3}', "\0"])
def test_a_broken_memory_is_told_and_made_anew(
    reader: Reader, contents: str, caplog: pytest.LogCaptureFixture
) -> None:
    check_media([reader.check("a")], reader.folder, stop_at_error=False)
    (reader.folder / MEMORY).write_text(contents)
    check_media([reader.check("a")], reader.folder, stop_at_error=False)
    assert "the data is checked anew" in caplog.text and reader.reads == ["a", "a"]
    check_media([reader.check("a")], reader.folder, stop_at_error=False)
    assert reader.reads == ["a", "a"]


def test_another_version_of_the_decoder_checks_anew(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_media([reader.check("a")], reader.folder, stop_at_error=False)
    monkeypatch.setattr("av.__version__", "0")
    check_media([reader.check("a")], reader.folder, stop_at_error=False)
    assert reader.reads == ["a", "a"]


def _slow_reads(folder: Path, log: Path, names: list[str]) -> None:
    def read(name: str) -> None:
        time.sleep(0.02)
        with log.open("a") as file:
            file.write(f"{name}\n")

    checks = [MediaCheck(n, (folder / n,), lambda n=n: read(n)) for n in names]  # type: ignore[misc]
    verdicts = check_media(checks, folder / "runs", stop_at_error=False)
    assert list(verdicts) == names


def test_processes_that_start_at_once_check_once(tmp_path: Path) -> None:
    names = [f"file{number}" for number in range(30)]
    for name in names:
        (tmp_path / name).write_text(name)
    log = tmp_path / "log"
    fork = multiprocessing.get_context("fork")
    parts = [names, names[10:], names[:20], list(reversed(names))]
    processes = [fork.Process(target=_slow_reads, args=(tmp_path, log, part)) for part in parts]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(log.read_text().split()) == sorted(names)
