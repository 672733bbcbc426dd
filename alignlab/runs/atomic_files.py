"""Files and folders that are there whole or not at all, also after a power failure."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from alignlab.runs.disk_errors import as_os_error


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Writes a file so that it is there whole or not at all.

    Args:
        path: of the file.
        text: what it holds then.
        shared: several processes may write it at once; the last one wins.
    """
    write_bytes(path, text.encode(), shared=shared)


def write_bytes(path: Path, content: bytes, *, shared: bool = False) -> None:
    """As `write_text`."""
    mark = f".{uuid.uuid4().hex}" if shared else ""
    temporary = path.with_name(f".{path.name}{mark}.tmp")
    with _becoming(path, temporary):
        temporary.write_bytes(content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path of the same ending, for a library to write, that becomes `path`.

    It goes away on an error, and `path` stays as it was.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    with _becoming(path, temporary):
        yield temporary


@contextmanager
def _becoming(path: Path, temporary: Path) -> Iterator[None]:
    try:
        with named_errors(path):
            yield
            sync_file(temporary)
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder that becomes `path` at the end, and goes away on an error.

    An existing `path` is replaced. What a killed process left behind is cleared first.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    remove_folder(temporary)
    temporary.mkdir(parents=True)
    try:
        with named_errors(path):
            yield temporary
            _sync_tree(temporary)
            remove_folder(path)
            os.replace(temporary, path)
            _sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sync_file(path: Path) -> None:
    """Waits until what was written to a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            sync_file(Path(folder, name))
        _sync_folder(Path(folder))


def _sync_folder(folder: Path) -> None:
    """Puts the names in a folder on the disk, where its filesystem can."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(number)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Makes the OSError of a failed write say where, in `filename`.

    Python leaves the name out where a file could be opened but not written; safetensors and
    `shutil.copytree` have the error number in their message alone.
    """
    try:
        yield
    except (SafetensorError, shutil.Error) as error:
        known = as_os_error(error, path)
        if known is None:
            raise
        raise known from error
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def clear_leftovers(parent: Path) -> None:
    """Removes folders that a killed process left half written or half removed in `parent`."""
    for ending in ("tmp", "removed"):
        for leftover in parent.glob(f".*.{ending}"):
            if leftover.is_dir():
                shutil.rmtree(leftover)


def remove_folder(path: Path) -> None:
    """Removes a folder that may be gone; renamed first, so that none is ever half there.

    A file in its place is removed as well.
    """
    if path.is_file() or path.is_symlink():
        path.unlink()
    if not path.exists():
        return
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)
