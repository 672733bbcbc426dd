"""Whether the storage of a study is damaged: SQLite files and journal files are looked at."""

import json
import shlex
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from optuna.exceptions import StorageInternalError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DatabaseError

from alignlab.errors import UserError, first_line, one_line
from alignlab.runs.disk_errors import as_os_error

FIX = (
    "copy it back from elsewhere, or remove it: the sweep then begins anew and takes the finished "
    "runs of trials that it draws again"
)
LOCK_WAIT_S = 60
CUT = "is cut"


def storage_file(url: str) -> Path | None:
    """The file of a storage; None for a server, and for what only SQLite reads (`file:...`).

    Args:
        url: as `alignlab.experiments.sweep.study.storage_url` gives it.
    """
    if "://" not in url:
        return Path(url)
    if not url.startswith("sqlite"):
        return None
    database = make_url(url).database
    return Path(database) if database and not database.startswith((":", "file:")) else None


def check_storage_file(path: Path) -> None:
    """Refuses a study's file that is damaged; one that is not there yet passes.

    Raises:
        UserError: it names the file.
    """
    if path.exists():
        problem = study_problem(path)
        if problem is not None and problem.endswith(CUT):  # another worker may be writing it
            time.sleep(1.0)
            problem = study_problem(path)
        if problem is not None:
            raise UserError(f"{path} is damaged ({problem}): {_fix(path, problem)}")


def _fix(path: Path, problem: str) -> str:
    whole = path.read_bytes().rfind(b"\n") + 1 if problem.endswith(CUT) else 0
    if not whole:
        return FIX
    cut_off = shlex.join(["truncate", "-s", str(whole), str(path.resolve())])
    return (
        "copy it back from elsewhere, or, once no worker runs, cut off its unfinished last line, "
        f"which loses nothing else: {cut_off}"
    )


def study_problem(path: Path) -> str | None:
    """What is wrong with a study's file, in words, or None."""
    if path.is_dir():
        return "it is a folder"
    if not path.exists():
        return "it is missing"
    if not path.stat().st_size:
        return "it is empty"
    return _journal_problem(path) if path.suffix != ".db" else _sqlite_problem(path)


def _sqlite_problem(path: Path) -> str | None:
    address = f"file:{quote(str(path.resolve()))}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=LOCK_WAIT_S)) as database:
            ((answer,),) = database.execute("PRAGMA quick_check(1)").fetchall()
    except sqlite3.DatabaseError as error:
        # of what is in use, or may not be read, its opening says more
        is_whole = "locked" in str(error) or as_os_error(error) is not None
        return None if is_whole else one_line(error)
    return None if answer == "ok" else one_line(answer)


def _journal_problem(path: Path) -> str | None:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            return f"line {number}: {one_line(error)}"
        if not isinstance(record, dict) or "op_code" not in record:
            return f"line {number} is no record of a study"
    return f"line {len(lines)} {CUT}" if lines[-1] else None


@contextmanager
def storage_errors(shown: str) -> Iterator[None]:
    """Makes one line of what a storage raises on records that fit nothing.

    Args:
        shown: the storage as messages name it.

    Raises:
        UserError: of such an error; what the machine refuses stays the error that it is.
    """
    try:
        yield
    except (DatabaseError, StorageInternalError, ValueError, KeyError, TypeError) as error:
        if as_os_error(error) is not None:
            raise
        reason = first_line(error.__cause__ or error) or type(error).__name__
        raise UserError(f"storage: {shown} is damaged ({reason}): {FIX}") from error
