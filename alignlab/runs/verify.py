"""Whether what lies in a run folder is what was written there."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from alignlab.environment import read_environment
from alignlab.errors import UserError
from alignlab.losses.stage1.folder import INFO, WEIGHTS
from alignlab.runs.checkpoint_folders import (
    ASIDE,
    log_mark,
    problem,
    step_folders,
    step_of,
    weight_copies,
)
from alignlab.runs.checksums import (
    CHECKSUMS,
    DamagedError,
    damaged_files,
    files_below,
    read_checksums,
    read_json,
)
from alignlab.runs.code_record import RECORD, check_diffs
from alignlab.runs.metric_rows import check_log, read_rows
from alignlab.runs.run_folder import FILES, RunFolder

TRAIN_AGAIN = "copy it back from elsewhere, or remove the folder and train again"


@dataclass
class Findings:
    """What was looked at in a folder.

    Args:
        files: all that were compared with a checksum, or read where there is none.
        damaged: by file or checkpoint a line: what is wrong, what to do.
        unknown: a line each: what cannot be told.
    """

    files: set[Path] = field(default_factory=set)
    damaged: dict[Path, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def add(self, other: "Findings") -> None:
        """Takes over what was found elsewhere."""
        self.files |= other.files
        self.damaged = other.damaged | self.damaged
        self.unknown += other.unknown

    def check(self, path: Path, problem: str | None, fix: str) -> None:
        """Notes a file, and what is wrong with it, if anything."""
        self.files.add(path)
        if problem is not None:
            self.say(path, f"{path} is damaged ({problem}): {fix}")

    def say(self, path: Path, line: str) -> None:
        """Notes that a file is damaged, if that is not known yet."""
        self.files.add(path)
        self.damaged.setdefault(path, line)


OTHERS = {
    "evaluations/*.json": "evaluate the checkpoint again",
    "history.json": "copy it back from elsewhere: it says how schedules were planned",
    "result-*.json": "copy it back from elsewhere, or remove it and, if there is one, result.json, "
    "which has its checksum: it is the result of the steps before the run was prolonged",
}


def looks_like_run(folder: Path) -> bool:
    """Whether a run has been here, also one of whose files some are gone."""
    return any((folder / n).exists() for n in ("checkpoints", "metrics.jsonl", "environment.json"))


def verify_run(path: Path, *, pruned: str = "") -> Findings:
    """Reads every file of a run, finished or not, of any training.

    Args:
        path: its folder.
        pruned: why it will not be finished, in words; empty: it may be.
    """
    folder, found = RunFolder(path), Findings()
    for name, error in _alone(folder):
        found.files.add(path / name)
        if error is not None:
            found.say(path / name, error)
        elif not (path / name).exists():
            found.say(path / name, f"{path / name} is missing: {TRAIN_AGAIN}")
    if folder.has_begun and not (path / RECORD).exists():
        what = (
            "the run is older than it, or it was removed; `alignlab repro` does not know the code"
        )
        found.unknown.append(f"{path / RECORD} is missing: {what}")
    _verify_checkpoints(folder, found)
    for pattern, fix in OTHERS.items():
        for other in sorted(path.glob(pattern)):
            try:
                read_json(other, fix=fix)
            except DamagedError as error:
                found.check(other, error.problem, error.fix)
            else:
                found.files.add(other)
    try:
        result = folder.read_result()
    except DamagedError as error:
        found.check(folder.result, error.problem, error.fix)
        return found
    if result is None:
        why = pruned or "the run is not finished (it has no result.json)"
        found.unknown.append(f"{path}: {why}")
        return found
    found.files.add(folder.result)
    expected = result.get(FILES)
    if expected is None:
        found.unknown.append(f"{path}: finished before checksums were kept")
        return found
    wrong = damaged_files(path, expected)
    for name in expected:
        found.check(path / name, wrong.get(name), folder.file_fix())
    return found


def _alone(folder: RunFolder) -> Iterator[tuple[str, str | None]]:
    """Files that say by themselves whether they are whole, and the message if they are not."""
    checks: dict[str, Callable[[], object]] = {
        "recipe.yaml": folder.check_recipe_file,
        "environment.json": lambda: read_environment(folder.path / "environment.json"),
        "inputs.json": lambda: read_json(folder.path / "inputs.json", fix=TRAIN_AGAIN),
        "metrics.jsonl": lambda: read_rows(folder.metrics),
    }
    if (folder.path / RECORD).exists():  # older runs have none
        checks[RECORD] = lambda: check_diffs(folder.path)
    is_begun = folder.has_begun
    for name, check in checks.items():
        if not (folder.path / name).exists():
            if is_begun:
                yield name, None
            continue
        try:
            check()
        except (UserError, OSError) as error:
            yield name, str(error)
        else:
            yield name, None


def _verify_checkpoints(folder: RunFolder, found: Findings) -> None:
    checkpoints = step_folders(folder.checkpoints)
    problems = {checkpoint: problem(checkpoint) for checkpoint in checkpoints}
    whole = [checkpoint for checkpoint, what in problems.items() if what is None]
    for checkpoint, what in problems.items():
        found.files |= {checkpoint / name for name in files_below(checkpoint)}
        if what is not None:
            fix = _checkpoint_fix(folder, checkpoint, whole[-1] if whole else None)
            found.say(checkpoint, f"{checkpoint} is damaged ({what}): {fix}")
            continue
        if not (checkpoint / CHECKSUMS).exists():
            found.unknown.append(f"{checkpoint}: written before checksums were kept")
            continue
        found.files.add(checkpoint / CHECKSUMS)
        try:
            check_log(folder.metrics, log_mark(checkpoint))
        except DamagedError as error:
            found.say(folder.metrics, str(error))
    for copy in weight_copies(folder.checkpoints):
        found.files |= {copy / name for name in (*files_below(copy), CHECKSUMS)}
        what = problem(copy)
        if what is not None:
            fix = "remove it, or copy it back from elsewhere"
            found.say(copy, f"{copy} is damaged ({what}): {fix}")
    for aside in folder.checkpoints.glob(f"step-*{ASIDE}"):
        found.unknown.append(f"{aside}: a damaged checkpoint that was renamed; remove it")


def _checkpoint_fix(folder: RunFolder, damaged: Path, whole: Path | None) -> str:
    """What to do about a damaged checkpoint.

    Args:
        folder: of the run.
        damaged: the checkpoint.
        whole: the newest that is whole, if there is one.
    """
    if whole is None:
        return f"copy it back from elsewhere, or remove {folder.path} to train from the start"
    if step_of(whole) < step_of(damaged):
        return "the older one is resumed in its place, or copy it back from elsewhere"
    return f"{whole.name} is newer and whole: remove this one, or copy it back from elsewhere"


def verify_stage1(folder: Path) -> Findings:
    """Reads every file of a Stage 1 folder."""
    found = Findings()
    try:
        expected = read_checksums(folder)
    except DamagedError as error:
        found.check(error.path, error.problem, error.fix)
        return found
    if expected is None:
        for name in (INFO, WEIGHTS):
            found.check(
                folder / name, None if (folder / name).is_file() else "it is missing", TRAIN_AGAIN
            )
        found.unknown.append(f"{folder}: written before checksums were kept")
        return found
    wrong = damaged_files(folder, expected)
    found.files.add(folder / CHECKSUMS)
    for name in expected:
        found.check(folder / name, wrong.get(name), TRAIN_AGAIN)
    return found
