"""One process at a time: the lock of a file, whatever it guards.

The lock is the kernel's (flock), so that it ends with the process that holds it, however that ends.
A marker that is merely there would outlive a killed process.
"""

import errno
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from alignlab.errors import UserError

log = logging.getLogger(__name__)

NOTE_EVERY_S = 60.0
WRITER = ".writer.lock"
"""In the folder of a run; whoever trains it holds it."""


class HeldError(UserError):
    """Another process holds a lock that is not waited for."""


@contextmanager
def file_lock(
    path: Path,
    *,
    waiting: Callable[[], str],
    refused: Callable[[], str] | None = None,
    remove: bool = False,
) -> Iterator[None]:
    """Holds a lock.

    Args:
        path: of the file that is locked, made if it is missing; its folder exists.
        waiting: what the log says, every minute, while another process holds it.
        refused: the message that ends the wait at once; None: wait.
        remove: the file goes away with the lock.

    Raises:
        HeldError: it is `refused`.
        UserError: the filesystem has no locks.
    """
    lock = FileLock(path, fallback_to_soft=False)
    while True:
        try:
            lock.acquire(timeout=NOTE_EVERY_S if refused is None else 0)
            break
        except Timeout:
            if refused is not None:
                raise HeldError(refused()) from None
            log.info("%s", waiting())
        except OSError as error:
            if error.errno != errno.ENOSYS:
                error.filename = error.filename or str(path)
                raise
            raise UserError(
                f"{path.parent} is on a filesystem without file locks: mount it with flock, or "
                "choose another output"
            ) from error
    try:
        yield
    finally:
        if remove:  # while it is held: whoever waits sees that the file is gone, and makes another
            path.unlink(missing_ok=True)
        lock.release()


def is_held(path: Path) -> bool | None:
    """Whether a process holds the lock at this moment; None where the filesystem does not say.

    Nothing is written. A shared lock is taken for an instant, and another process that asks in that
    instant without waiting is refused.

    Args:
        path: of the file; one that is missing is not held.
    """
    try:
        number = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(number)
    return False
