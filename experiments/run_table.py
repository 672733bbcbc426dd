"""The runs below a folder and how far each is, by what their files say.

Files are read and nothing is written, no model and no study is opened: a run that trains on this
machine or another one is not disturbed. A damaged file is said in the row of its run.
"""

import csv
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alignlab.config.written_names import ERROR
from alignlab.errors import UserError, one_line
from alignlab.runs.checksums import DamagedError, read_json, without_checksum_line
from alignlab.runs.file_lock import WRITER, is_held
from alignlab.runs.metric_rows import last_rows

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MARKS = ("recipe.yaml", "result.json", "metrics.jsonl")
NO_RUNS = ("cache", "mlartifacts", "mlruns")  # MLflow's folders hold copies of runs' files
ENDED = ("complete", "pruned", "fail")  # in trials.csv
_IS_SWEEP = re.compile(r"^space:", flags=re.M)


@dataclass(frozen=True)
class RunRow:
    """A run.

    Args:
        name: its folder, relative to the one that was asked for.
        state: `running`, `finished`, `diverged` (finished, and its loss was lost), `interrupted`
            (no process trains it: it was stopped or killed), `error` (an error ended it),
            `not begun`, `unfinished` (whether somebody trains it is not known on this filesystem),
            `damaged`; in a sweep also `pruned` and `failed`.
        step: the last one that the log or the result names.
        steps: of the recipe.
        loss: of the last row that has one.
        left_s: seconds until the last step, of a running one.
        problem: what is damaged, or the error.
    """

    name: str
    state: str
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    left_s: float | None = None
    problem: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to train of it."""
        return self.state in ("finished", "diverged", "pruned", "failed")

    def as_json(self) -> dict[str, Any]:
        """Plain values; a loss that is not finite is None."""
        loss = self.loss if self.loss is not None and math.isfinite(self.loss) else None
        fields: dict[str, Any] = {"name": self.name, "kind": "run", "state": self.state}
        fields |= {"step": self.step, "steps": self.steps, "loss": loss, "left_s": self.left_s}
        return fields | {"problem": self.problem or None}


@dataclass(frozen=True)
class GroupRow:
    """A comparison or a sweep.

    Args:
        name: its folder, relative to the one that was asked for.
        kind: `comparison` or `sweep`.
        state: `running` if one of its runs is, else `error` if one of them is that; `no report` if
            all have ended and the report is not written.
        runs: those whose folders are there; their names are relative to the group's folder.
        planned: how many there will be; a sweep trains fewer where trials are pruned.
        left_s: seconds until the last step of all, while runs are running.
    """

    name: str
    kind: str
    state: str
    runs: tuple[RunRow, ...]
    planned: int
    left_s: float | None

    @property
    def num_ended(self) -> int:
        """How many of its runs are finished."""
        return sum(run.has_ended for run in self.runs)

    def as_json(self) -> dict[str, Any]:
        """Plain values, all runs among them."""
        fields = {"name": self.name, "kind": self.kind, "state": self.state}
        counts = {"finished": self.num_ended, "planned": self.planned, "left_s": self.left_s}
        return fields | counts | {"runs": [run.as_json() for run in self.runs]}


def runs_below(folder: Path) -> list[RunRow | GroupRow]:
    """Every run, comparison and sweep in a folder and below, by name.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {what}: name the one that runs lie in (their recipe's output)")
    return list(_found(folder, folder, set()))


def _found(folder: Path, top: Path, seen: set[Path]) -> Iterator[RunRow | GroupRow]:
    if folder.resolve() in seen:  # a link that leads up again
        return
    seen.add(folder.resolve())
    name = folder.resolve().name if folder == top else folder.relative_to(top).as_posix()
    runs = sorted(path for path in folder.glob("*/seed-*") if _is_run(path))
    is_sweep = _is_sweep(folder)
    if runs or is_sweep:
        yield _group(folder, name, runs, is_sweep=is_sweep)
        if not is_sweep and (folder / "tuning").is_dir():
            yield from _found(folder / "tuning", top, seen)
    elif _is_run(folder):
        yield _run(folder, name)
    else:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.name.startswith(".") and path.name not in NO_RUNS:
                yield from _found(path, top, seen)


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in MARKS)


def _is_sweep(folder: Path) -> bool:
    """Whether a sweep was begun here; one on a shared storage may have no study.db."""
    if any((folder / name).is_file() for name in ("study.db", "trials.csv")):
        return True
    recipe = folder / "recipe.yaml"
    try:
        return recipe.is_file() and bool(_IS_SWEEP.search(recipe.read_text("utf-8")))
    except (OSError, ValueError):
        return False  # its row says that it is damaged


def _run(folder: Path, name: str) -> RunRow:
    """A run's row."""
    steps = None
    try:
        steps = _recipe_steps(folder / "recipe.yaml")
        rows = last_rows(folder / "metrics.jsonl")
        result = _result(folder / "result.json")
        error = read_json(folder / ERROR, fix="") if (folder / ERROR).exists() else None
    except DamagedError as error:
        problem = f"{error.path.name}: {error.problem}"
        return RunRow(name, "damaged", steps=steps, problem=problem)
    except OSError as error:
        file = Path(error.filename).name if error.filename else folder.name
        return RunRow(name, "damaged", steps=steps, problem=f"{file}: {error.strerror}")
    losses = [row["loss/total"] for row in rows if "loss/total" in row]
    loss = losses[-1] if losses else None
    step = int(rows[-1]["step"]) if rows else None
    if result is not None and result["steps"] >= steps:
        state = "diverged" if result.get("diverged") is True else "finished"
        return RunRow(name, state, result["steps"], steps, loss)
    held = is_held(folder / WRITER)
    if held:
        return RunRow(name, "running", step or 0, steps, loss, _seconds_left(folder, rows, steps))
    if error is not None and held is False:
        return RunRow(name, "error", step, steps, loss, problem=str(error.get("error", "")))
    has_begun = bool(rows) or result is not None or any(folder.glob("checkpoints/step-*"))
    state = "interrupted" if has_begun else "not begun"
    return RunRow(name, "unfinished" if held is None else state, step, steps, loss)


def _recipe_steps(recipe: Path) -> int:
    fix = ""  # the row says what is damaged; what to do is said by whoever trains it
    if not recipe.is_file():
        raise DamagedError(recipe, "it is missing", fix)
    try:
        content = yaml.load(without_checksum_line(recipe.read_text("utf-8")), LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DamagedError(recipe, one_line(error), fix) from error
    steps = content.get("steps") if isinstance(content, dict) else None
    if type(steps) is not int:
        raise DamagedError(recipe, "it has no steps", fix)
    return steps


def _result(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    result = read_json(path, fix="")
    if type(result.get("steps")) is not int:
        raise DamagedError(path, "it has no steps", "")
    return result


def _seconds_left(folder: Path, rows: list[dict[str, float]], steps: int) -> float | None:
    """By the rows since the process that trains it began; None where they do not say."""
    begun = folder / "environment.json"  # is written at each start
    since = begun.stat().st_mtime if begun.is_file() else 0.0
    new = [row for row in rows if row.get("time", 0.0) >= since and row["step"] > 0]
    if not new or new[-1]["step"] >= steps:  # the last step is done: it is evaluated
        return None
    first, last = new[0], new[-1]
    if last["step"] > first["step"]:
        step_s = (last["time"] - first["time"]) / (last["step"] - first["step"])
    elif "time/step" in last:
        step_s = last["time/step"]
    else:
        return None
    return max(0.0, step_s * (steps - last["step"]) - max(0.0, time.time() - last["time"]))


def _group(folder: Path, name: str, paths: list[Path], *, is_sweep: bool) -> GroupRow:
    runs = [_run(path, path.relative_to(folder).as_posix()) for path in paths]
    planned = len(runs)
    is_written = (folder / "comparison.json").is_file()
    if is_sweep:
        trials = _trials(folder / "trials.csv")
        runs = [_judged(run, trials) for run in runs]
        planned = max(planned, _planned(folder / "recipe.yaml"))
        is_written = bool(trials) and all(state in ENDED for state in trials.values())
    if any(run.state == "running" for run in runs):
        state = "running"
    elif runs and all(run.has_ended for run in runs) and (is_written or len(runs) == planned):
        state = "finished" if is_written else "no report"
    elif any(run.state == "error" for run in runs):
        state = "error"
    elif all(run.state == "not begun" for run in runs):
        state = "not begun"
    else:
        state = "interrupted"
    kind = "sweep" if is_sweep else "comparison"
    return GroupRow(name, kind, state, tuple(runs), planned, _left_of_all(runs, planned))


def _judged(run: RunRow, trials: Mapping[str, str]) -> RunRow:
    """A trial's run whose training ended early for good."""
    trial = trials.get(run.name.split("/")[0])
    if run.state not in ("interrupted", "error") or trial not in ("pruned", "fail"):
        return run
    return RunRow(run.name, {"fail": "failed"}.get(trial, trial), run.step, run.steps, run.loss)


def _trials(path: Path) -> dict[str, str]:
    """How the trials ended, by folder, as of the last time a worker ended; a repeated one's is
    that of the trial whose folder it is. Nothing where the file is gone or is no table."""
    states: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if not row.get("same_as"):
                    states[row.get("folder") or ""] = row.get("state") or ""
    except (OSError, ValueError, csv.Error):
        return {}
    return states


def _planned(recipe: Path) -> int:
    """How many runs a sweep's recipe asks for; 0 where that is not known."""
    try:
        content = yaml.load(without_checksum_line(recipe.read_text("utf-8")), LOADER)
        return int(content["trials"]) * len(content["seeds"])
    except (OSError, ValueError, yaml.YAMLError, RecursionError, KeyError, TypeError):
        return 0


def _left_of_all(runs: list[RunRow], planned: int) -> float | None:
    """Of a group whose other runs take as long per step as those that are running."""
    running = [run for run in runs if run.left_s and run.steps and run.step is not None]
    if not running:
        return None
    step_s = [(run.left_s or 0.0) / max(1, (run.steps or 0) - (run.step or 0)) for run in running]
    steps = max(run.steps or 0 for run in running)
    open_steps = sum(
        (run.steps or steps) - (run.step or 0) for run in runs if not run.has_ended
    ) + steps * (planned - len(runs))
    return open_steps * sum(step_s) / len(step_s) / len(running)
