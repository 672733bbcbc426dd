"""Checksums (SHA-256) by which damage to what was written is seen when it is read.

What they are of:

a folder that is written once     `checksums.json` in it: every file by its name
a JSON file by itself             its key `checksum`, of all other keys
a recipe by itself                its first line, a comment, of all that follows

Files of older versions have none: they are read, and nothing is known of them.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from alignlab.errors import UserError, one_line
from alignlab.runs.atomic_files import remove_folder, write_text
from alignlab.runs.file_digests import MISSING, UNREADABLE, fresh_digests

CHECKSUMS = "checksums.json"
KEY = "checksum"
_FIRST_LINE = re.compile(r"# sha256 of what follows: ([0-9a-f]{64})\n")


class DamagedError(UserError):
    """A file does not hold what was written.

    Args:
        path: of the file.
        problem: what is wrong with it.
        fix: the end of the message.
    """

    def __init__(self, path: Path, problem: str, fix: str) -> None:
        super().__init__(f"{path} is damaged ({problem}): {fix}")
        self.path = path
        self.problem = problem
        self.fix = fix


def write_checksums(folder: Path, names: Iterable[str] | None = None) -> None:
    """Writes `checksums.json` into a folder.

    Args:
        folder: of the files.
        names: of the files, relative to it; None: all in it and below.
    """
    if names is None:
        names = files_below(folder)
    write_json(folder / CHECKSUMS, {"files": file_checksums(folder, names)})


def forget_checksums(folder: Path) -> None:
    """Removes `checksums.json` before its files are written anew, whatever it is."""
    path = folder / CHECKSUMS
    if path.is_dir():
        remove_folder(path)
    path.unlink(missing_ok=True)


def files_below(folder: Path) -> list[str]:
    """Names of all files in a folder, relative to it, but for its checksums and hidden files."""
    names = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return sorted(
        name.as_posix()
        for name in names
        if name.as_posix() != CHECKSUMS and not any(part.startswith(".") for part in name.parts)
    )


def file_checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of every file by its name in the folder."""
    return fresh_digests(folder, {name: folder / name for name in names})


def read_checksums(folder: Path) -> dict[str, str] | None:
    """What `checksums.json` of a folder says; None if the folder is older than checksums.

    Raises:
        DamagedError: the file itself is damaged.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return None
    fix = "remove it; whether the files beside it are whole is then not known"
    files = read_json(path, fix=fix).get("files")
    if not isinstance(files, dict):
        raise DamagedError(path, "it names no files", fix)
    return {str(name): str(digest) for name, digest in files.items()}


def damaged_files(folder: Path, expected: Mapping[str, str]) -> dict[str, str]:
    """Which files do not hold what they should, by name, in words.

    Args:
        folder: where they lie.
        expected: SHA-256 by name.
    """
    problems = {}
    digests = file_checksums(folder, (n for n in expected if not (folder / n).is_dir()))
    for name, digest in expected.items():
        found = digests.get(name)
        if found is None:
            problems[name] = "it is a folder"
        elif found == MISSING:
            problems[name] = "it is missing"
        elif found == UNREADABLE:
            problems[name] = "it cannot be read"
        elif found != digest:
            empty = (folder / name).stat().st_size == 0
            problems[name] = "it is empty" if empty else "its checksum is another"
    return problems


def write_json(path: Path, content: Mapping[str, Any], *, shared: bool = False) -> None:
    """Writes a JSON object with its checksum; see `write_text` for `shared`."""
    assert KEY not in content
    write_text(path, json.dumps({**content, KEY: _digest_of(content)}, indent=1), shared=shared)


def read_json(path: Path, *, fix: str) -> dict[str, Any]:
    """What `write_json` wrote, or an older version without a checksum.

    Args:
        path: of a file that exists.
        fix: what to do if it is damaged.

    Raises:
        DamagedError: it is no file, no JSON object, or not what was written.
    """
    if path.is_dir():
        raise DamagedError(path, "it is a folder", fix)
    text = path.read_bytes()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is empty" if not text.strip() else f"no JSON: {one_line(error)}"
        raise DamagedError(path, reason, fix) from error
    if not isinstance(content, dict):
        raise DamagedError(path, "it holds no JSON object", fix)
    digest = content.pop(KEY, None)
    if digest is not None and digest != _digest_of(content):
        raise DamagedError(path, "its checksum is another: it was changed since", fix)
    return content


def _digest_of(content: Mapping[str, Any]) -> str:
    """Of keys and values, whatever their order and the white space between them."""
    plain = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def with_checksum_line(text: str) -> str:
    """The text below a comment with its checksum."""
    return f"# sha256 of what follows: {hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def without_checksum_line(text: str) -> str:
    """What `with_checksum_line` was given; a text without that line is returned as it is.

    Raises:
        ValueError: the text is another.
    """
    line = _FIRST_LINE.match(text)
    if line is None:
        return text
    rest = text[line.end() :]
    if hashlib.sha256(rest.encode()).hexdigest() != line[1]:
        raise ValueError("its checksum is another: it was changed since")
    return rest
