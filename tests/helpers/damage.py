"""Six ways to damage a file."""

import os
import random
from collections.abc import Callable
from pathlib import Path


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Turns one bit around."""
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(max(64, path.stat().st_size)))


def delete(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


KINDS: tuple[Callable[[Path], None], ...] = (empty, cut, flip, garbage, delete, folder)


def pointer(path: Path) -> None:
    """Leaves what Git-LFS leaves where the file was not fetched."""
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n")


def a_list(path: Path) -> None:
    """Leaves JSON, but no object."""
    path.write_text("[1, 2]")
