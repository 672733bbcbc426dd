"""One line over all sweeps and the comparison: steps done of all, and the time that is left."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from alignlab.config.run import RunConfig
from alignlab.experiments.launchers.run_progress import RunKey, steps_done
from alignlab.experiments.sweep.study import sweep_folder
from alignlab.experiments.tune.plan import TunePlan
from alignlab.progress import step_progress
from alignlab.runs.run_folder import RunFolder

_TRIAL_RUN = re.compile(r"trial-(\d+)/seed-(\d+)")


class TuneProgress:
    """Steps of everything that is tuned and compared.

    It is shown while something trains, and not while reports are written: they print tables.
    """

    def __init__(self, plan: TunePlan) -> None:
        self._plan = plan
        self._done = {variant: self._steps_of_sweep(variant) for variant in plan.sweeps}

    @contextmanager
    def sweeping(self, variant: str) -> Iterator[None]:
        """While the trials of a variant are trained."""
        sweep, others = self._plan.sweeps[variant], self._others(variant)

        def part(label: str, done: int, note: str) -> tuple[int, str] | None:
            steps = self._steps_in_sweep(variant, label, done)
            if steps is None:
                return None  # an evaluation
            self._done[variant] = steps
            what = f"tuning {variant}"
            if label != sweep.name:
                number = int(label.removeprefix(f"{sweep.name}/trial-").split("/")[0])
                what += f", trial {number + 1} of {sweep.trials}"
            return others + steps, f"{what}, {note}" if note else what

        total = self._plan.tuning_steps + self._plan.compared_steps
        done = others + self._done[variant]
        with step_progress(self._label, total=total, done=done, part=part):
            yield
        self._done[variant] = self._plan.trial_steps(variant)

    @contextmanager
    def comparing(self, missing: Mapping[RunKey, RunConfig]) -> Iterator[None]:
        """While runs of the comparison are trained: those that are not finished."""
        config = self._plan.config
        ended = [
            config.run(variant, seed).steps
            for variant in config.trained
            for seed in config.seeds
            if (variant, seed) not in missing
        ]
        before = self._plan.tuning_steps + sum(ended)

        def part(label: str, done: int, note: str) -> tuple[int, str] | None:
            if label != config.name:
                return None
            return before + done, f"comparing, {note}" if note else "comparing"

        total = before + sum(run.steps for run in missing.values())
        with step_progress(self._label, total=total, done=before, part=part):
            yield

    @property
    def _label(self) -> str:
        return f"tune {self._plan.config.name}"

    def _others(self, variant: str) -> int:
        return sum(steps for other, steps in self._done.items() if other != variant)

    def _steps_in_sweep(self, variant: str, label: str, done: int) -> int | None:
        """Steps of a variant's sweep: by a run of this process, or by trials that are finished."""
        sweep = self._plan.sweeps[variant]
        a_trial = len(sweep.seeds) * sweep.base.steps
        if label == sweep.name:  # several workers; what they train has folders
            return max(done * a_trial, self._steps_of_sweep(variant))
        place = _TRIAL_RUN.fullmatch(label.removeprefix(f"{sweep.name}/"))
        if place is None:
            return None
        seeds = sweep.seeds.index(int(place[2]))
        return int(place[1]) * a_trial + seeds * sweep.base.steps + min(done, sweep.base.steps - 1)

    def _steps_of_sweep(self, variant: str) -> int:
        """By the folders of its runs; trials that took another's result have none."""
        sweep = self._plan.sweeps[variant]
        folders = map(RunFolder, sweep_folder(sweep).glob("trial-*/seed-*"))
        return sum(
            sweep.base.steps
            if folder.result.exists()
            else min(steps_done(folder), sweep.base.steps - 1)
            for folder in folders
        )
