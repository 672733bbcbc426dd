"""The files that a comparison leaves in its folder: written with checksums, and read again."""

from contextlib import AbstractContextManager
from pathlib import Path

from alignlab.errors import UserError
from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.report.write import write_report
from alignlab.runs.checksums import (
    DamagedError,
    damaged_files,
    forget_checksums,
    read_checksums,
    write_checksums,
)
from alignlab.runs.file_lock import file_lock

COMPARISON = "comparison.json"
OUTPUTS = (
    COMPARISON,
    "report.html",
    "report.md",
    "table.csv",
    "table.tex",
    "steps.csv",
    "noise_floor.csv",
    "progress.json",
)


def write_outputs(comparison: Comparison, folder: Path) -> Path:
    """Writes a comparison and its report, with their checksums, into its folder.

    Processes that share the folder do so one after another: no checksum is of a file that another
    one replaces.

    Returns:
        The report.
    """
    with only_one(folder):
        return _written(comparison, folder)


def rewrite_outputs(folder: Path) -> tuple[Comparison, Path]:
    """Writes the report of a folder anew, from its comparison.json; nothing is trained.

    Returns:
        The comparison and the report.

    Raises:
        UserError: as `read_comparison`.
    """
    with only_one(folder):  # what is read is not older than what another process has written
        comparison, _ = read_comparison(folder)
        return comparison, _written(comparison, folder)


def read_comparison(path: Path) -> tuple[Comparison, Path]:
    """The comparison of a folder, or of the comparison.json in it, and that folder.

    Raises:
        UserError: there is none, it cannot be read, or it is not what was written.
    """
    file = path / COMPARISON if path.is_dir() else path
    if not file.exists():
        raise UserError(f"{path}: {_why_none(path)}")
    comparison = Comparison.load(file)
    digests = read_checksums(file.parent) or {}
    written = {name: digest for name, digest in digests.items() if name == file.name}
    for problem in damaged_files(file.parent, written).values():
        fix = (
            "give the command of the comparison again, which writes it anew, or remove "
            "checksums.json beside it to read it as it is"
        )
        raise DamagedError(file, problem, fix)
    return comparison, file.parent


def _why_none(path: Path) -> str:
    """Why a folder has no comparison.json, and what to do."""
    runs = list(path.glob("*/seed-*/recipe.yaml"))
    if not runs or (path / "recipe.yaml").exists():  # no comparison, or a sweep
        return f"no comparison there: alignlab compare writes {COMPARISON} when it ends"
    finished = sum((recipe.parent / "result.json").is_file() for recipe in runs)
    return (
        f"{finished} of {len(runs)} runs finished, so there is no {COMPARISON} yet: give its "
        f"`alignlab compare` again, which resumes the others (`alignlab runs {path}` lists them)"
    )


def only_one(folder: Path) -> AbstractContextManager[None]:
    """Waits until no other process writes what is the comparison's."""
    lock = folder / ".report.lock"
    return file_lock(lock, waiting=lambda: f"waiting for the process that writes {folder}")


def _written(comparison: Comparison, folder: Path) -> Path:
    forget_checksums(folder)
    comparison.save(folder / COMPARISON)
    report = write_report(comparison, folder)
    write_checksums(folder, [name for name in OUTPUTS if (folder / name).is_file()])
    return report
