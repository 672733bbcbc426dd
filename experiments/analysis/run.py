"""One run as data: its recipe, its log and its result."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from alignlab.config.parts import TrainingConfig
from alignlab.config.paths import user_path
from alignlab.experiments.analysis.tidy import PARTS, check_folder, frame, metric_rows
from alignlab.recipe import load_training
from alignlab.runs.metric_rows import is_last, read_rows
from alignlab.runs.run_folder import FILES, RunFolder

COLUMNS = ("metric", *PARTS, "step", "value", "final")
_LOG = "metrics.jsonl"


def load_run(path: str | os.PathLike[str]) -> "RunData":
    """What a run, or a Stage 1 training, has left in its folder, finished or not.

    `alignlab.recipe.load_run` is another function: it reads a recipe that is to be trained.

    Args:
        path: the folder, such as `runs/tiny`.

    Raises:
        UserError: there is no run, or its recipe, log or result is damaged.
    """
    folder = user_path(str(path))
    check_folder(folder, "load_run")
    run = RunFolder.open(folder)
    result = run.read_result()
    if result is not None:
        digests = result.get(FILES, {})
        run.check_files({FILES: {name: digests[name] for name in (_LOG,) if name in digests}})
    return RunData(folder, load_training(run.recipe), read_rows(run.metrics), result)


@dataclass(frozen=True)
class RunData:
    """A run.

    Args:
        folder: where it lies.
        config: its recipe, resolved.
        log: the rows of metrics.jsonl: `step`, `time` and what was logged or measured there.
        result: what result.json says; None while the run is not finished.
    """

    folder: Path
    config: TrainingConfig
    log: list[dict[str, float]]
    result: dict[str, Any] | None

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers at the end of the run, by name; empty while it is not finished."""
        return {} if self.result is None else dict(self.result["metrics"])

    def log_frame(self) -> pd.DataFrame:
        """metrics.jsonl as it is: a row per line, a column per name, NaN where a line lacks it."""
        return pd.DataFrame(self.log)

    def to_frame(self) -> pd.DataFrame:
        """Every number of the run, one a row, as a comparison's frame has it.

        Returns:
            A frame with the columns `metric`, `quantity`, `block`, `noise_bin`, `step`, `value`
            and `final`: whether it is of the result. `time/step` and `memory/peak_mib` are logged
            by that name as well.
        """
        return frame(self._rows(), COLUMNS)

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        for row in self.log:
            if self.result is not None and is_last(row):
                continue  # the result has these, and maybe blocks that were measured later
            found = {name: value for name, value in row.items() if name not in ("step", "time")}
            yield from metric_rows(found, int(row["step"]), final=False)
        if self.result is not None:
            yield from metric_rows(self.metrics, int(self.result["steps"]), final=True)
