"""Digests of files: what they name, when a file is read again, and what many processes do."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from alignlab.errors import UserError
from alignlab.runs import file_digests
from alignlab.runs.file_digests import MISSING, UNREADABLE, combined, digest_files, sizes_digest
from alignlab.units import MIB


class Reads(list[str]):
    """Names of the files that were read, in order."""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Reads:
    """Watches what is read; memories lie in the test's folder, and files need not age."""
    seen = Reads()
    read = file_digests._file_digest

    def watched(path: Path, has_read: Any) -> str:
        seen.append(path.name)
        return read(path, has_read)

    monkeypatch.setattr(file_digests, "_file_digest", watched)
    monkeypatch.setattr(file_digests, "SETTLED_NS", 0)
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    return seen


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data" / "masks").mkdir(parents=True)
    for name in ("a", "b", "masks/0.png", "masks/1.png"):
        (tmp_path / "data" / name).write_bytes(name.encode() * 100)
    return tmp_path / "data"


def digests(root: Path, *names: str) -> dict[str, str]:
    return digest_files(root, {name: root / name for name in names or ("a", "b")})


def test_a_digest_is_the_sha256_of_the_content(root: Path, reads: Reads) -> None:
    assert digests(root)["a"] == hashlib.sha256(b"a" * 100).hexdigest()
    first = digests(root, "masks")["masks"]
    (root / "masks" / "1.png").write_bytes(b"other")
    second = digests(root, "masks")["masks"]
    (root / "masks" / "1.png").rename(root / "masks" / "2.png")
    assert len({first, second, digests(root, "masks")["masks"]}) == 3


def test_what_is_no_readable_file_has_a_word_for_a_digest(root: Path, reads: Reads) -> None:
    os.mkfifo(root / "pipe")  # which would never end
    (root / "loop").symlink_to(root / "loop")
    names = {"gone": root / "gone", "pipe": root / "pipe", "nul": root / "n\0", "a/x": root / "a/x"}
    found = digest_files(root, names | {"loop": root / "loop"})
    assert found == {
        "gone": MISSING,
        "pipe": UNREADABLE,
        "nul": UNREADABLE,
        "a/x": MISSING,
        "loop": UNREADABLE,
    }
    assert reads == []


def test_a_second_look_reads_nothing_and_a_changed_file_is_read_again(
    root: Path, reads: Reads
) -> None:
    first = digests(root, "a", "b", "masks")
    assert sorted(reads) == ["0.png", "1.png", "a", "b"]
    reads.clear()
    assert digests(root, "a", "b", "masks") == first and reads == []
    # same size and time of modification: the time of change is another
    before = (root / "a").stat()
    (root / "a").write_bytes(b"c" * 100)
    os.utime(root / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = digests(root, "a", "b", "masks")
    assert reads == ["a"]
    assert {name for name in first if first[name] != changed[name]} == {"a"}


def test_a_file_is_not_remembered_before_it_has_settled(
    root: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_digests, "SETTLED_NS", 3600 * 10**9)
    digests(root, "a")
    digests(root, "a")
    assert reads == ["a", "a"]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 3}', '{"a": ["x"]}', "\0"])
def test_a_damaged_memory_is_made_again(root: Path, reads: Reads, content: str) -> None:
    expected = digests(root)
    (memory,) = (file_digests.cache_folder() / "digests").iterdir()
    memory.write_text(content)
    assert digests(root) == expected
    assert json.loads(memory.read_text()).keys() == {"a", "b"}


def test_a_memory_that_cannot_be_written_is_told(
    root: Path, reads: Reads, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    assert digests(root)["a"] == hashlib.sha256(b"a" * 100).hexdigest()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a").write_bytes(b"a")
    os.utime(tmp_path / "other" / "a", (1, 1))
    digests(tmp_path / "other")
    assert caplog.text.count("cannot be remembered") == 1 and "ALIGNLAB_CACHE" in caplog.text


def test_a_file_that_is_being_written_is_refused(
    root: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = file_digests._file_digest

    def growing(path: Path, has_read: Any) -> str:
        digest = read(path, has_read)
        with path.open("ab") as file:
            file.write(b"more")
        return digest

    monkeypatch.setattr(file_digests, "_file_digest", growing)
    with pytest.raises(UserError, match="a changes while it is read"):
        digests(root, "a")


def test_interrupted_work_is_remembered(
    root: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = file_digests._hashed

    def interrupted(*arguments: Any) -> Iterator[tuple[str, str]]:
        yield next(hashed(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(file_digests, "_hashed", interrupted)
        digests(root)
    (memory,) = (file_digests.cache_folder() / "digests").iterdir()
    (done,) = json.loads(memory.read_text())
    reads.clear()
    digests(root)
    assert sorted([*reads, done]) == ["a", "b"]


def test_long_work_shows_how_far_it_is(
    root: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    @contextmanager
    def progress(label: str, *, total: int) -> Iterator[Any]:
        assert str(root) in label and total == 6
        yield lambda done, note: seen.append(done)

    monkeypatch.setattr(file_digests, "step_progress", progress)
    digests(root)
    assert seen == []  # short
    monkeypatch.setattr(file_digests, "SHOWN_FROM_MIB", 1)
    for name in ("a", "b"):
        (root / name).write_bytes(b"x" * 3 * MIB)
    digests(root)
    assert seen and seen == sorted(seen) and seen[-1] == 6


WRITER = """
import sys
from pathlib import Path
from alignlab.runs import file_digests
from alignlab.units import MIB
file_digests.SETTLED_NS = 0
root = Path(sys.argv[1])
found = file_digests.digest_files(root, {n: root / n for n in sys.argv[2:]})
assert len(set(found.values())) == len(found)
"""


def test_many_processes_hash_at_once(root: Path, reads: Reads) -> None:
    names = [f"c{i}" for i in range(40)]
    for name in names:
        (root / name).write_text(name * 1000)
    parts = [names[i : i + 25] for i in (0, 5, 15)]
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, root, *part], stderr=subprocess.PIPE)
        for part in parts
    ]
    for writer in writers:
        _, errors = writer.communicate()
        assert writer.returncode == 0, errors.decode()
    (memory,) = (file_digests.cache_folder() / "digests").iterdir()  # and nothing half written
    known = json.loads(memory.read_text())
    assert set(known) <= set(names) and known
    for name, (_, digest) in known.items():
        assert digest == hashlib.sha256((name * 1000).encode()).hexdigest()


def test_a_writer_that_is_overtaken_leaves_a_whole_memory(
    root: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def overtaken(*arguments: Any) -> None:
        monkeypatch.setattr(os, "replace", replace)
        digests(root, "b")
        replace(*arguments)

    monkeypatch.setattr(os, "replace", overtaken)
    digests(root, "a")
    (memory,) = (file_digests.cache_folder() / "digests").iterdir()
    assert json.loads(memory.read_text()).keys() == {"a"}  # the last one wins


def test_sizes_are_told_apart_without_reading(root: Path, reads: Reads, tmp_path: Path) -> None:
    names = {name: root / name for name in ("a", "masks", "gone")}
    copy = {name: tmp_path / "copy" / name for name in names}
    before = sizes_digest(names)
    shutil.copytree(root, tmp_path / "copy")
    assert sizes_digest(copy) == before
    (tmp_path / "copy" / "masks" / "0.png").write_text("longer than it was " * 99)
    assert sizes_digest(copy) != before and reads == []


def test_a_combined_digest_depends_on_names_and_not_on_their_order() -> None:
    assert combined({"a": "1", "b": "2"}) == combined({"b": "2", "a": "1"})
    assert combined({"a": "1", "b": "2"}) != combined({"a": "2", "b": "1"})
    assert combined({"\ud83d": "1"}) != combined({"?": "1"})
