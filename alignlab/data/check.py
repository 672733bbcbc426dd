"""What a data set reads is decoded once before training, and what came out is remembered.

Damage inside a file shows when it is decoded, which would be in the middle of a run. Verdicts are
remembered in a file by path, size and time of change of what was read, so that later starts only
look at sizes and times. One process checks at a time; the others wait for it, and find its
verdicts. Trouble of the machine (permissions, too many open files) is no verdict on a file, and is
not remembered.
"""

import errno
import hashlib
import logging
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pydantic import BaseModel, ValidationError

from alignlab.data.decode import ClipError, media_libraries
from alignlab.progress import Advance, step_progress
from alignlab.runs.atomic_files import write_text
from alignlab.runs.file_lock import file_lock

VERSION = 1  # of the checks: another one forgets what was found
MEMORY = ".checked_media.json"
LOCK = ".checked_media.lock"
SAVE_EVERY_S = 30.0
QUIET_S = 3.0  # a check that is done sooner shows no progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MediaCheck:
    """One thing to be decoded.

    Args:
        key: says what is read and how; checks of the same key are one.
        files: what is read. A change of size or time of any of them makes it another check.
        run: decodes; gives a remark, or None.
    """

    key: str
    files: tuple[Path, ...]
    run: Callable[[], str | None]


class Verdict(BaseModel):
    """What a check found.

    Args:
        error: why it cannot be used, one line; None if it can.
        kind: of the error, for counting.
        remark: what the check said of media that can be used.
    """

    error: str | None = None
    kind: str = ""
    remark: str | None = None


class _Remembered(BaseModel):
    stamp: str
    verdict: Verdict


class _Memory(BaseModel):
    made_by: str
    verdicts: dict[str, _Remembered]


def check_media(
    checks: Iterable[MediaCheck], memory: Path | None, *, stop_at_error: bool
) -> dict[str, Verdict]:
    """Verdicts by key.

    Args:
        checks: each key is decoded once, in parallel threads.
        memory: folder that keeps verdicts, made if it is missing; None: they are not kept.
        stop_at_error: end at the first error, in the order of `checks`: those behind it are left
            out.
    """
    unique = {check.key: check for check in checks}
    with ThreadPoolExecutor() as pool:
        stamps = dict(zip(unique, pool.map(_stamp, unique.values()), strict=True))
    with ExitStack() as stack:
        known = _read(memory)
        if memory is not None and any(not _is_known(known, stamps, key) for key in unique):
            memory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_only_one(memory))
            known = _read(memory)  # another process may have checked meanwhile
        unknown = []
        for key, check in unique.items():
            if not _is_known(known, stamps, key):
                unknown.append(check)
            elif stop_at_error and known[key].verdict.error is not None:
                break  # nobody asks for what is behind it
        fresh = _run(unknown, stamps, known, memory, stop_at_error=stop_at_error)
    verdicts: dict[str, Verdict] = {}
    for key in unique:
        if key not in fresh and key not in known:
            break  # behind the first error
        verdict = fresh[key] if key in fresh else known[key].verdict
        verdicts[key] = verdict
        if stop_at_error and verdict.error is not None:
            break
    return verdicts


def _run(
    checks: list[MediaCheck],
    stamps: Mapping[str, str | None],
    known: dict[str, _Remembered],
    memory: Path | None,
    *,
    stop_at_error: bool,
) -> dict[str, Verdict]:
    """Fresh verdicts; those that last go into `known` and into the memory as well."""
    verdicts: dict[str, Verdict] = {}
    begin = saved = time.monotonic()
    advance: Advance | None = None
    with ExitStack() as stack:
        if memory is not None and checks:
            stack.callback(_write, memory, known)
        pool = stack.enter_context(ThreadPoolExecutor())
        mapped = cast(Generator[tuple[Verdict, bool], None, None], pool.map(_verdict, checks))
        results = stack.enter_context(closing(mapped))  # cancels the rest
        for check, (verdict, is_lasting) in zip(checks, results, strict=True):
            verdicts[check.key] = verdict
            stamp = stamps[check.key]
            if is_lasting and stamp is not None:
                known[check.key] = _Remembered(stamp=stamp, verdict=verdict)
            now = time.monotonic()
            if advance is None and now - begin > QUIET_S:
                progress = step_progress("check of the data", total=len(checks), done=len(verdicts))
                advance = stack.enter_context(progress)
            if advance is not None:
                advance(len(verdicts), "")
            if memory is not None and now - saved > SAVE_EVERY_S:
                _write(memory, known)
                saved = now
            if stop_at_error and verdict.error is not None:
                break
    return verdicts


def _verdict(check: MediaCheck) -> tuple[Verdict, bool]:
    """What the check says, and whether it would say so again of the same files."""
    try:
        return Verdict(remark=check.run()), True
    except ClipError as error:
        number = getattr(error.__cause__, "errno", None)
        return Verdict(error=str(error), kind=error.kind), number not in errno.errorcode


def _stamp(check: MediaCheck) -> str | None:
    """Digest of sizes and times of the files; None if one of them is not there."""
    digest = hashlib.sha256()
    for path in check.files:
        try:
            stat = path.stat()
        except OSError:  # the check itself will say why
            return None
        # the time of change sees what a copy with its old date does not show
        times = f"{stat.st_mtime_ns} {stat.st_ctime_ns}"
        digest.update(f"{path}\0{stat.st_size} {times}\0".encode(errors="replace"))
    return digest.hexdigest()[:16]


def _is_known(known: Mapping[str, _Remembered], stamps: Mapping[str, str | None], key: str) -> bool:
    return key in known and known[key].stamp == stamps[key]


def _made_by() -> str:
    return f"{VERSION}, {media_libraries()}"


def _read(memory: Path | None) -> dict[str, _Remembered]:
    path = None if memory is None else memory / MEMORY
    if path is None or not path.exists():
        return {}
    try:
        content = _Memory.model_validate_json(path.read_bytes())
    except ValidationError:
        log.warning("%s cannot be read: the data is checked anew", path)
        return {}
    return content.verdicts if content.made_by == _made_by() else {}


def _write(memory: Path, known: dict[str, _Remembered]) -> None:
    content = _Memory(made_by=_made_by(), verdicts=known)
    write_text(memory / MEMORY, content.model_dump_json(exclude_defaults=True))


def _only_one(memory: Path) -> AbstractContextManager[None]:
    """Waits until no other process checks data for this memory."""
    path = memory / LOCK
    return file_lock(path, waiting=lambda: f"waiting for the process that checks the data ({path})")
