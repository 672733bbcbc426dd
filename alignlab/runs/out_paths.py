"""Whether a command can write where the user says, seen before its work is done.

What is wrong with a path that the user named is a UserError, and so is what is wrong with the place
of a run where a command writes if none is named: then the line has no setting at its head. A disk
that is full is not the user's words' fault: that stays the OSError that it is.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignlab.config.written_names import is_kept
from alignlab.errors import UserError
from alignlab.runs.disk_errors import FULL
from alignlab.runs.file_lock import file_lock

_OF_ALIGNLAB = (  # where one of these is, a run, a comparison, a sweep or a Stage 1 network is
    *(".writer.lock", ".report.lock", "inputs.json", "metrics.jsonl", "result.json"),
    *("comparison.json", "study.db", "trials.csv", "stage1.json"),
)


OUT = "--out"


@contextmanager
def out_file(out: Path, suffix: str, *, is_default: bool = False) -> Iterator[None]:
    """Held while a command makes the file that it writes at `out`.

    Args:
        out: the file.
        suffix: the ending of the only format that is written, such as `.mp4`.
        is_default: no `--out` was given.

    Raises:
        UserError: as `check_out_file`, or another command is about to write it.
    """
    check_out_file(out, suffix, None if is_default else OUT)
    with _only_writer(out, is_default):
        yield


@contextmanager
def out_folder(out: Path, *, is_default: bool = False) -> Iterator[None]:
    """Held while a command makes the folder, or the files in it, that it writes at `out`.

    Args:
        out: the folder.
        is_default: no `--out` was given.

    Raises:
        UserError: as `check_out_folder`, a run or the like keeps something there, or another
            command is about to write it.
    """
    check_out_folder(out, None if is_default else OUT)
    _refuse_kept(out)
    with _only_writer(out, is_default):
        yield


def check_out_file(out: Path, suffix: str, setting: str | None = OUT) -> None:
    """For a file that will be written at `out`.

    Args:
        out: the file.
        suffix: the ending of the only format that is written, such as `.mp4`.
        setting: that names it, for the message; None: it is where the command writes without one.

    Raises:
        UserError: `out` is a folder or has another ending, its folder cannot be made or
            written to, or it is a file of a run, a comparison or the like.
    """
    if _exists(out, setting) and out.is_dir():
        raise UserError(f"{OUT}: {out} is a folder: name a {suffix} file in it")
    if out.suffix.lower() != suffix:
        raise UserError(f"--out: {out} must end in {suffix}, the only format that is written")
    _check_parent(out, setting)
    _refuse_kept(out)


def check_out_folder(out: Path, setting: str | None = OUT) -> None:
    """For a folder that will be written, or written into, at `out`.

    Args:
        out: the folder.
        setting: as `check_out_file` takes it.

    Raises:
        UserError: `out` is no folder, or cannot be made or written to.
    """
    if _exists(out, setting) and not out.is_dir():
        raise _refusal(setting, f"{out} is a file")
    _check_parent(out / "file", setting)


def make_output_folder(output: Path, name: str) -> Path:
    """Makes `<output>/<name>`, as the recipe names them.

    Raises:
        UserError: it cannot be made or written to.
    """
    folder = output / name
    check_out_folder(folder, "output")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _only_writer(out: Path, is_default: bool) -> Iterator[None]:
    def held() -> str:
        blamed = "" if is_default else f"{OUT}: "
        return f"{blamed}another process writes {out}: wait for it, or choose another {OUT}"

    made = [folder for folder in out.absolute().parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.absolute().with_name(f".{out.absolute().name}.lock")
    try:
        with file_lock(lock, waiting=held, refused=held, remove=True):
            yield
    finally:
        for folder in made:  # of work that failed
            if any(folder.iterdir()):
                break
            folder.rmdir()


def _refusal(setting: str | None, problem: str) -> UserError:
    if setting is None:
        return UserError(f"{problem}: name another place with {OUT}")
    return UserError(f"{setting}: {problem}: choose another {setting}")


def _check_parent(out: Path, setting: str | None) -> None:
    """Sees that the nearest folder above `out` that exists takes new files."""
    parent = next(folder for folder in out.absolute().parents if _exists(folder, setting))
    if not parent.is_dir():
        raise _refusal(setting, f"{parent} is a file, so {out} cannot be made")
    try:  # what the rights say is not all: root has them in /proc too, where nothing can be made
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        if error.errno in FULL:
            error.filename = str(parent)
            raise
        raise _refusal(setting, f"{parent} cannot be written to ({error.strerror})") from error


def _refuse_kept(out: Path) -> None:
    """Refuses a place in a run or the like that alignlab reads again."""
    whole = out.parent.resolve() / out.name
    for folder in whole.parents:
        kept = whole.relative_to(folder).parts[0]
        if is_kept(kept) and any((folder / name).is_file() for name in _OF_ALIGNLAB):
            raise UserError(
                f"--out: {out} is where alignlab itself keeps {kept} of {folder}: choose another "
                "--out"
            )


def _exists(path: Path, setting: str | None) -> bool:
    """Whether something is there; a link to nothing is something that is in the way."""
    try:
        os.lstat(path.with_name(f".{path.name}.lock") if path.name else path)  # a longer name
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise _refusal(setting, f"{path}: {error.strerror}") from error
    try:
        os.stat(path)
    except NotADirectoryError:
        return False
    except FileNotFoundError:
        if path.is_symlink():
            raise _refusal(setting, f"{path} is a link to nothing") from None
        return False
    except OSError as error:
        raise _refusal(setting, f"{path}: {error.strerror}") from error
    return True
