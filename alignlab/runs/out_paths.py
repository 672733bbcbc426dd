"""Whether a command can write where `--out` says, seen before its work is done."""

import os
from pathlib import Path

from alignlab.errors import UserError


def check_out_file(out: Path, suffix: str) -> None:
    """For a file that will be written at `out`.

    Args:
        suffix: the ending of the only format that is written, such as `.mp4`.

    Raises:
        UserError: `out` is a folder or has another ending, or its folder cannot be made or
            written to.
    """
    if _exists(out) and out.is_dir():
        raise UserError(f"--out: {out} is a folder: name a {suffix} file in it")
    if out.suffix.lower() != suffix:
        raise UserError(f"--out: {out} must end in {suffix}, the only format that is written")
    _check_parent(out)


def check_out_folder(out: Path) -> None:
    """For a folder that will be written, or written into, at `out`.

    Raises:
        UserError: `out` is no folder, or cannot be made or written to.
    """
    if _exists(out) and not out.is_dir():
        raise UserError(f"--out: {out} is a file: choose another --out")
    _check_parent(out / "file")


def _check_parent(out: Path) -> None:
    """Sees that the nearest folder above `out` that exists takes new files."""
    parent = next(folder for folder in out.absolute().parents if _exists(folder))
    if not parent.is_dir():
        raise UserError(f"--out: {parent} is a file, so {out} cannot be made: choose another --out")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--out: {parent} cannot be written to: choose another --out")


def _exists(path: Path) -> bool:
    """Whether something is there; a link to nothing is something that is in the way."""
    try:
        if path.is_symlink() and not path.exists():
            raise UserError(f"--out: {path} is a link to nothing: choose another --out")
        return path.exists()
    except OSError as error:
        raise UserError(f"--out: {path}: {error.strerror}: choose another --out") from error
