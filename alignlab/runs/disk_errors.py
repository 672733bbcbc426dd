"""What libraries raise where a disk is full or a file cannot be written, as the OSError it is."""

import errno
import os
import re
from pathlib import Path

from alignlab.errors import first_line, printable

# What SQLite says, in whatever library's exception.
_SQLITE = {
    "database or disk is full": errno.ENOSPC,
    "attempt to write a readonly database": errno.EROFS,
    "unable to open database file": errno.EACCES,
    "disk I/O error": errno.EIO,
}
FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or the user's share of it


def as_os_error(error: BaseException, path: Path | None = None) -> OSError | None:
    """The OSError that an exception is, has in its text, or was raised from; None for none.

    Args:
        error: of Python, safetensors, shutil, SQLAlchemy, Optuna or MLflow.
        path: of what was written, where the exception does not say.
    """
    found: BaseException | None = error
    while found is not None:
        number = getattr(found, "errno", None) or _number(str(found))
        if number is not None:
            name = getattr(found, "filename", None) or (None if path is None else str(path))
            return OSError(number, os.strerror(number), name)
        if isinstance(found, OSError):
            return found
        found = found.__cause__ or found.__context__
    return None


def _number(text: str) -> int | None:
    named = re.search(r"(?:os error |Errno )(\d+)", text)  # safetensors, shutil
    if named is not None:
        return int(named[1])
    return next((number for said, number in _SQLITE.items() if said in text), None)


def shown(error: OSError) -> str:
    """One line: where, why, and what helps."""
    name = error.filename
    where = printable(os.fsdecode(name)) if isinstance(name, str | bytes) else ""
    if error.errno in FULL:
        place = f" ({where})" if where else ""
        return (
            f"the disk is full{place}: free some space (or files, where `df -i` says that its "
            "inodes are used up), or write elsewhere, and run the same command again"
        )
    reason = error.strerror or first_line(error) or type(error).__name__
    if error.errno == errno.EFBIG:
        reason += " (`ulimit -f` limits it): raise that, and run the same command again"
    return f"{where}: {printable(reason)}" if where else printable(reason)
