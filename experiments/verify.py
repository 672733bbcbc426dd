"""Whether a run, a Stage 1 network, a comparison or a sweep is as it was written."""

import csv
from pathlib import Path

from alignlab.errors import UserError
from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.sweep.storage_check import FIX as STUDY_FIX
from alignlab.experiments.sweep.storage_check import study_problem
from alignlab.losses.stage1.folder import INFO, WEIGHTS
from alignlab.runs.checksums import (
    CHECKSUMS,
    DamagedError,
    damaged_files,
    read_checksums,
    read_json,
)
from alignlab.runs.run_folder import RunFolder
from alignlab.runs.verify import Findings, looks_like_run, verify_run, verify_stage1

SEALED = ("budget.json", "progress.json", "inputs.json", "cost.json")
SAME_COMMAND = "give the command that wrote it again"
STUDY = "study.db"
COMPARISON = "comparison.json"
TRIALS = "trials.csv"
KINDS = (COMPARISON, TRIALS, STUDY, *SEALED, "report.html", "sweep.html", ".report.lock")


def verify_folder(folder: Path) -> Findings:
    """Reads every file of a folder that alignlab wrote, and of the runs in it.

    Raises:
        UserError: there is nothing of alignlab's.
    """
    if any((folder / name).exists() for name in (INFO, WEIGHTS)):
        return verify_stage1(folder)
    if looks_like_run(folder):
        return _with_stage1(folder)
    below = sorted({path.parent for path in folder.rglob("*")} - {folder})
    runs = [path for path in below if looks_like_run(path)]
    others = [path for path in below if _is_of_several(path) and path not in runs]
    if any((folder / name).exists() for name in KINDS):
        others.insert(0, folder)
    if not runs and not others:
        raise UserError(f"{folder}: no run, Stage 1 network, comparison or sweep there")
    found = Findings()
    for path in others:
        found.add(_outputs(path))
    for run in runs:
        found.add(_with_stage1(run))
    return found


def _is_of_several(folder: Path) -> bool:
    """Whether it is of a comparison or a sweep; a run that never began has inputs as well."""
    return any((folder / name).exists() for name in KINDS if name != "inputs.json")


def _is_copy(folder: Path) -> bool:
    """Whether results lie there as they are passed on: without what a command keeps beside them."""
    kept = (CHECKSUMS, STUDY, *SEALED)
    return (folder / COMPARISON).is_file() and not any((folder / name).exists() for name in kept)


def _pruned(run: Path) -> str:
    """Of a run of a sweep that has ended, why it is not finished, as far as the sweep says it."""
    table = run.parent.parent / TRIALS
    if not table.is_file():
        return ""
    try:
        with table.open(encoding="utf-8", newline="") as file:
            states = {row["folder"]: row["state"] for row in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, csv.Error):
        return ""  # a damaged table is told by itself
    pruned = states.get(run.parent.name) == "pruned"
    return "its trial was pruned, so the run has no result.json" if pruned else ""


def _with_stage1(run: Path) -> Findings:
    found = verify_run(run, pruned=_pruned(run))
    stage1 = RunFolder(run).stage1
    if stage1.is_dir():
        found.add(verify_stage1(stage1))
    return found


def _outputs(folder: Path) -> Findings:
    """Of a comparison or a sweep, what lies beside its runs."""
    found = Findings()
    for name in SEALED:
        if (folder / name).exists():
            try:
                read_json(folder / name, fix=SAME_COMMAND)
            except DamagedError as error:
                found.check(folder / name, error.problem, error.fix)
            else:
                found.files.add(folder / name)
    try:
        expected = read_checksums(folder)
    except DamagedError as error:
        found.check(error.path, error.problem, error.fix)
        expected = {}
    if expected is None and not _is_copy(folder):
        found.unknown.append(
            f"{folder}: has no checksums: its command did not end, or is older than they are"
        )
    wrong = damaged_files(folder, expected or {})
    for name in expected or {}:
        if name != STUDY:
            found.check(folder / name, wrong.get(name), SAME_COMMAND)
    if (folder / STUDY).exists() or STUDY in (expected or {}):
        found.check(folder / STUDY, study_problem(folder / STUDY) or wrong.get(STUDY), STUDY_FIX)
    if COMPARISON not in wrong and (folder / COMPARISON).is_file():
        _check_runs_are_there(folder, found)
    return found


def _check_runs_are_there(folder: Path, found: Findings) -> None:
    """Of a comparison whose file is whole, as far as is known."""
    try:
        comparison = Comparison.load(folder / COMPARISON)
    except UserError as error:
        found.say(folder / COMPARISON, f"{error}; {SAME_COMMAND}")
        return
    results = (*comparison.results, *comparison.again)
    if _is_copy(folder) and not any((folder / result.run_dir).exists() for result in results):
        found.files.add(folder / COMPARISON)
        found.unknown.append(
            f"{folder}: is a copy without the folders of its runs: {COMPARISON} alone was read"
        )
        return
    for result in results:
        run = RunFolder(folder / result.run_dir)
        if run.result.exists():
            continue
        if run.earlier_result(result.steps).exists():
            found.unknown.append(
                f"{run.path}: is being prolonged, and {folder} reports its {result.steps} steps: "
                "give the command with more steps again"
            )
            continue
        found.say(run.result, f"{run.result} is missing: {SAME_COMMAND}")
