"""How far runs are that other processes train, as their folders say."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from alignlab.config.run import RunConfig
from alignlab.experiments.launchers.one_run import RunKey
from alignlab.progress import Advance, step_progress
from alignlab.runs.run_folder import RunFolder

TAIL = 2**16  # bytes; the last row of a log is shorter


class RunsProgress:
    """One bar, or a line every 20 seconds, for the steps of all runs together.

    Args:
        runs: to be trained.
        folders: of the runs.
    """

    def __init__(
        self, runs: Mapping[RunKey, RunConfig], folders: Mapping[RunKey, RunFolder]
    ) -> None:
        self._runs = runs
        self._folders = folders
        self._done: set[RunKey] = set()
        self._advance: Advance | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows it for a while."""
        name = next(iter(self._runs.values())).name.split("/")[0]
        total = sum(run.steps for run in self._runs.values())
        with step_progress(name, total=total, done=self._steps()) as advance:
            self._advance = advance
            yield

    def finish(self, key: RunKey) -> None:
        """Counts a run as finished."""
        self._done.add(key)

    def look(self) -> None:
        """Reads the folders again."""
        assert self._advance is not None, "not shown"
        note = f"{len(self._done)} of {len(self._runs)} runs finished"
        self._advance(self._steps(), note)

    def _steps(self) -> int:
        # a run whose last step is done is still evaluated
        return sum(
            run.steps if key in self._done else min(steps_done(self._folders[key]), run.steps - 1)
            for key, run in self._runs.items()
        )


def steps_done(folder: RunFolder) -> int:
    """The step of the last whole row in `metrics.jsonl`; 0 without one."""
    if not folder.metrics.exists():
        return 0
    with folder.metrics.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        lines = file.read().split(b"\n")[:-1]
    whole = lines[1:] if size > TAIL else lines
    return int(json.loads(whole[-1])["step"]) if whole else 0
