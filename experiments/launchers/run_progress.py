"""How far runs are that other processes train, by what their folders hold."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from alignlab.config.paths import user_path
from alignlab.config.run import RunConfig
from alignlab.experiments.launchers.local import RunKey
from alignlab.progress import step_progress
from alignlab.runs.run_folder import RunFolder

TAIL = 2**16  # bytes; the last row of a log is shorter


class RunsProgress:
    """The runs of one launch.

    Args:
        runs: by variant and seed; none is finished, and their folders exist.
    """

    def __init__(self, runs: Mapping[RunKey, RunConfig]) -> None:
        self._runs = runs
        self.folders = {k: RunFolder(user_path(run.output) / run.name) for k, run in runs.items()}
        self.finished: set[RunKey] = set()

    def left(self) -> list[RunKey]:
        """Runs that were not seen finished."""
        return [key for key in self._runs if key not in self.finished]

    def newly_finished(self) -> list[RunKey]:
        """Runs whose result has come since."""
        keys = [k for k in self.left() if self.folders[k].is_finished_at(self._runs[k].steps)]
        self.finished.update(keys)
        return keys

    @contextmanager
    def shown(self) -> Iterator[Callable[[], None]]:
        """Shows steps done of all runs together, at each call of what it gives."""
        name = next(iter(self._runs.values())).name.split("/")[0]
        total = sum(run.steps for run in self._runs.values())
        with step_progress(name, total=total, done=self._steps()) as advance:
            yield lambda: advance(
                self._steps(), f"{len(self.finished)} of {len(self._runs)} runs finished"
            )

    def _steps(self) -> int:
        # a run whose last step is done is still evaluated
        return sum(
            run.steps if key in self.finished else min(steps_done(self.folders[key]), run.steps - 1)
            for key, run in self._runs.items()
        )


def steps_done(folder: RunFolder) -> int:
    """The step of the last whole row in `metrics.jsonl`; 0 without one."""
    if not folder.metrics.is_file():
        return 0
    with folder.metrics.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        lines = file.read().split(b"\n")[:-1]
    whole = lines[1:] if size > TAIL else lines
    try:
        return int(json.loads(whole[-1])["step"]) if whole else 0
    except (ValueError, KeyError, TypeError):
        return 0  # of a damaged row the run itself speaks
