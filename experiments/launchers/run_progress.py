"""How far the runs of a launch are, in one line: those of other processes by their folders."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from alignlab.config.paths import user_path
from alignlab.config.run import RunConfig
from alignlab.progress import step_progress
from alignlab.runs.metric_rows import last_lines
from alignlab.runs.run_folder import RunFolder

RunKey = tuple[str, int]  # variant, seed


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
        with step_progress(self._name(), total=self._total(), done=self._steps()) as advance:
            yield lambda: advance(self._steps(), self._count())

    @contextmanager
    def shown_here(self) -> Iterator[Callable[[RunKey], None]]:
        """As `shown`, for runs of this process: whenever one of them shows its own steps.

        Yields:
            What is to be told which run has ended.
        """
        keys = {run.name: key for key, run in self._runs.items()}
        steps = {key: steps_done(folder) for key, folder in self.folders.items()}

        def part(label: str, done: int, note: str) -> tuple[int, str] | None:
            if label not in keys:
                return None  # an evaluation
            key = keys[label]
            steps[key] = min(done, self._runs[key].steps - 1)
            return sum(steps.values()), f"{self._count()}, {note}" if note else self._count()

        total, done = self._total(), sum(steps.values())
        with step_progress(self._name(), total=total, done=done, part=part) as advance:

            def ended(key: RunKey) -> None:
                self.finished.add(key)
                steps[key] = self._runs[key].steps
                advance(sum(steps.values()), self._count())

            yield ended

    def _name(self) -> str:
        return next(iter(self._runs.values())).name.rsplit("/", 2)[0]

    def _total(self) -> int:
        return sum(run.steps for run in self._runs.values())

    def _count(self) -> str:
        return f"{len(self.finished)} of {len(self._runs)} runs finished"

    def _steps(self) -> int:
        # a run whose last step is done is still evaluated
        return sum(
            run.steps if key in self.finished else min(steps_done(self.folders[key]), run.steps - 1)
            for key, run in self._runs.items()
        )


def steps_done(folder: RunFolder) -> int:
    """The step of the last whole row in `metrics.jsonl`; 0 without one."""
    lines = last_lines(folder.metrics)
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (ValueError, KeyError, TypeError):
        return 0  # of a damaged row the run itself speaks
