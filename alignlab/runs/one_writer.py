"""A run folder has one writer at a time.

A launcher that takes a node for dead starts the run elsewhere, while the process on that node may
still live: behind a broken network, say. The lock is the kernel's (flock), so that it ends with the
process that holds it, however that ends. On NFS the server keeps it: for a node that is gone, until
its lease has run out (NFSv4, 90 s unless configured).
"""

import errno
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from alignlab.errors import UserError
from alignlab.runs.run_folder import write_text

log = logging.getLogger(__name__)

LOCK = ".writer.lock"
HOLDER = ".writer"
NOTE_EVERY_S = 60.0


@contextmanager
def only_writer(folder: Path, *, wait: bool) -> Iterator[None]:
    """Holds the lock of a run folder.

    Args:
        folder: of the run; it exists.
        wait: wait while another process holds it; a line in the log says so every minute.

    Raises:
        UserError: another process holds it and `wait` is false, or the filesystem has no locks.
    """
    # no soft lock: its marker would outlive a killed process
    lock = FileLock(folder / LOCK, fallback_to_soft=False)
    while True:
        try:
            lock.acquire(timeout=NOTE_EVERY_S if wait else 0)
            break
        except Timeout:
            if not wait:
                raise UserError(
                    f"{folder} is being trained by another process ({_holder(folder)}): "
                    "wait for it, or end it"
                ) from None
            log.info("waiting for the process that trains here (%s)", _holder(folder))
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            raise UserError(
                f"{folder} is on a filesystem without file locks: mount it with flock, or choose "
                "another output"
            ) from error
    try:
        write_text(folder / HOLDER, f"{platform.node()}, process {os.getpid()}")
        yield
    finally:
        lock.release()


def _holder(folder: Path) -> str:
    known = folder / HOLDER
    return known.read_text() if known.exists() else "unknown"
