"""Digests of what files hold, remembered so that a second look reads no file.

A digest is remembered under the file's path with its size and its times of modification and of
change (mtime, ctime), one memory for each folder, in `cache_folder()`. The limit: a file with other
content whose size and both times are as they were passes for the same. So that no write within one
tick of the clock does, a file is not remembered before it is two seconds old.

Several processes may hash at once: memories are replaced whole, and the last one wins; what another
one has learnt meanwhile is hashed again.
"""

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from alignlab.errors import UserError
from alignlab.progress import Advance, step_progress, warn_once
from alignlab.runs.atomic_files import write_text
from alignlab.units import MIB

THREADS = 8
CHUNK = 2**22
AT_ONCE = 256  # files that a thread is given: handing out each by itself would cost more
SHOWN_FROM_MIB = 256  # less is done before anybody wonders
SAVE_EVERY_S = 60.0
SETTLED_NS = 2 * 10**9  # the coarsest clock of a filesystem in use, FAT's

MISSING = "missing"
UNREADABLE = "unreadable"
"""Stand in for a digest."""


def cache_folder() -> Path:
    """Where digests are remembered: `$ALIGNLAB_CACHE`, or `alignlab` in the user's cache folder."""
    own = os.environ.get("ALIGNLAB_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "alignlab"


def digest_files(root: Path, names: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of every file, or `MISSING` or `UNREADABLE`, by name.

    A folder counts as one file: its digest is that of the names and digests of the files in it.
    Long work shows its progress.

    Args:
        root: the folder that the files belong to, whose memory is used.
        names: their paths by names that are unique in `root`.

    Raises:
        UserError: a file changes while it is read.
    """
    memory = _Memory(root)
    looks = dict(zip(names, _looks(list(names.values())), strict=True))
    digests = {name: look for name, look in looks.items() if isinstance(look, str)}
    waiting: dict[str, _Look] = {}
    for name, look in looks.items():
        if isinstance(look, str):
            continue
        remembered = memory.get(name, look)
        if remembered is None:
            waiting[name] = look
        else:
            digests[name] = remembered
    if waiting:
        with memory.saved():
            for name, digest in _hashed(root, names, waiting):
                digests[name] = digest
                memory.put(name, waiting[name], digest)
    return {name: digests[name] for name in names}


def digest_folder(folder: Path, endings: Collection[str] | None) -> dict[str, str]:
    """`digest_files` of the files that lie in a folder, by their names.

    Args:
        folder: that may be missing, and has no files then.
        endings: of the files that count, without the dot; None: all do.
    """
    names = sorted(
        path.name
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_file() and (endings is None or path.suffix.removeprefix(".") in endings)
    )
    return digest_files(folder, {name: folder / name for name in names})


def folder_digest(folder: Path, endings: Collection[str] | None) -> str:
    """One digest of `digest_folder`.

    Raises:
        UserError: there are no such files, or one of them cannot be read.
    """
    digests = digest_folder(folder, endings)
    if not digests:
        raise UserError(f"{folder} has none of the files that it is read from: restore them")
    check_read(folder, digests)
    return combined(digests)


def check_unchanged(folder: Path, endings: Collection[str] | None, digest: object) -> None:
    """Refuses a folder that was loaded from after it was hashed, and had changed in between.

    Costs a look at the files where their digests are remembered.

    Args:
        folder, endings: as `folder_digest` was given them.
        digest: that it gave.

    Raises:
        UserError: it gives another one now.
    """
    if folder_digest(folder, endings) != digest:
        raise UserError(
            f"{folder} has changed since it was hashed: what was cached is of other files, start "
            "again"
        )


def check_read(root: Path, digests: Mapping[str, str]) -> None:
    """Refuses digests that say nothing of what is in a file, and so are no part of a key.

    Args:
        root: the folder that the names belong to.
        digests: of `digest_files`.

    Raises:
        UserError: a file is missing or unreadable.
    """
    for name, digest in digests.items():
        if digest in (MISSING, UNREADABLE):
            raise UserError(
                f"{root / name} is {digest}, so that nothing made of it can be told from what is "
                "made of other files: restore it or its permissions, and start again"
            )


def fresh_digests(root: Path, names: Mapping[str, Path]) -> dict[str, str]:
    """As `digest_files`, but every file is read: what damages a disk changes no time of a file."""
    looks = dict(zip(names, _looks(list(names.values())), strict=True))
    digests = {name: look for name, look in looks.items() if isinstance(look, str)}
    waiting = {name: look for name, look in looks.items() if not isinstance(look, str)}
    digests |= dict(_hashed(root, names, waiting))
    return {name: digests[name] for name in names}


def sizes_digest(names: Mapping[str, Path]) -> str:
    """Of names and sizes alone: reads no file, and is the same for copies."""
    looks = zip(names, _looks(list(names.values())), strict=True)
    return combined(
        {name: look if isinstance(look, str) else str(look.size) for name, look in looks}
    )


def combined(digests: Mapping[str, str]) -> str:
    """One digest of names and digests, whatever their order."""
    lines = "".join(f"{name}\0{digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class _Look:
    """What a file, or a folder of files, looks like from outside.

    Args:
        fingerprint: equal as long as it is the same.
        newest_ns: the latest of its times.
        size: bytes.
    """

    fingerprint: str
    newest_ns: int
    size: int


def _looks(paths: list[Path]) -> list["_Look | str"]:
    """Several at a time: on a network filesystem each takes a while."""
    parts = [paths[start : start + AT_ONCE] for start in range(0, len(paths), AT_ONCE)]
    with ThreadPoolExecutor(THREADS) as pool:
        looks = pool.map(lambda part: [_look(path) for path in part], parts)
        return [look for part in looks for look in part]


def _look(path: Path) -> _Look | str:
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            return _look_at_folder(path)
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    except (OSError, ValueError):  # also a name with a NUL
        return UNREADABLE
    if not stat.S_ISREG(found.st_mode):
        return UNREADABLE  # a pipe would never end
    times = (found.st_mtime_ns, found.st_ctime_ns)
    return _Look(f"{found.st_size}:{times[0]}:{times[1]}", max(times), found.st_size)


def _look_at_folder(folder: Path) -> _Look:
    looks = {path.name: _look(path) for path in _files_in(folder)}
    prints = {
        name: look if isinstance(look, str) else look.fingerprint for name, look in looks.items()
    }
    seen = [look for look in looks.values() if isinstance(look, _Look)]
    newest_ns = max((look.newest_ns for look in seen), default=0)
    return _Look(combined(prints), newest_ns, sum(look.size for look in seen))


def _files_in(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if not entry.is_dir())


def _hashed(
    root: Path, names: Mapping[str, Path], waiting: Mapping[str, _Look]
) -> Iterator[tuple[str, str]]:
    """Names and digests as they come."""
    total = sum(look.size for look in waiting.values()) // MIB
    read, lock = 0, Lock()
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(THREADS))
        # on an error or Ctrl-C, what waits is not read any more
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        advance: Advance | None = None
        if total >= SHOWN_FROM_MIB:
            label = f"digests of {root} (MiB)"
            advance = stack.enter_context(step_progress(label, total=total))

        def has_read(size: int) -> None:
            nonlocal read
            with lock:
                read += size
                if advance is not None and read // MIB > (read - size) // MIB:
                    advance(read // MIB, "")

        jobs = {
            pool.submit(_digest, names[name], look, has_read): name
            for name, look in waiting.items()
        }
        for job in as_completed(jobs):
            yield jobs[job], job.result()


def _digest(path: Path, look: _Look, has_read: Callable[[int], None]) -> str:
    try:
        if path.is_dir():
            digest = combined({p.name: _file_digest(p, has_read) for p in _files_in(path)})
        else:
            digest = _file_digest(path, has_read)
    except OSError:
        return UNREADABLE
    if _look(path) != look:
        raise UserError(f"{path} changes while it is read: wait until it is written")
    return digest


def _file_digest(path: Path, has_read: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            has_read(len(chunk))
    return digest.hexdigest()


class _Memory:
    """Digests of the files of one folder, by name and fingerprint."""

    def __init__(self, root: Path) -> None:
        key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
        self._path = cache_folder() / "digests" / f"{key}.json"
        self._known = self._read()
        self._new: dict[str, tuple[str, str]] = {}
        self._saved_at = time.monotonic()

    def get(self, name: str, look: _Look) -> str | None:
        """The digest, if the file is as it was."""
        fingerprint, digest = self._known.get(name, ("", ""))
        return digest if fingerprint == look.fingerprint else None

    def put(self, name: str, look: _Look, digest: str) -> None:
        """Remembers a digest, unless the file was written a moment ago."""
        if digest == UNREADABLE or time.time_ns() - look.newest_ns < SETTLED_NS:
            return
        self._new[name] = (look.fingerprint, digest)
        if time.monotonic() - self._saved_at > SAVE_EVERY_S:
            self._save()

    @contextlib.contextmanager
    def saved(self) -> Iterator[None]:
        """Saves at the end, also of work that was interrupted."""
        try:
            yield
        finally:
            self._save()

    def _save(self) -> None:
        if not self._new:
            return
        self._known = self._read() | self._new
        self._new, self._saved_at = {}, time.monotonic()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path, json.dumps(self._known), shared=True)
        except OSError as error:
            warn_once(
                f"digests of files cannot be remembered in {self._path.parent} ({error.strerror}): "
                "each start reads all files again, unless ALIGNLAB_CACHE names another folder"
            )

    def _read(self) -> dict[str, tuple[str, str]]:
        """What is remembered; nothing if the file is gone or damaged, for it is only a cache."""
        try:
            content = json.loads(self._path.read_bytes())
            return {name: (str(known[0]), str(known[1])) for name, known in content.items()}
        except (OSError, ValueError, AttributeError, TypeError, LookupError):
            return {}
