"""From a row of `metrics.jsonl` to what trackers take: the one place that says so for all of them.

So a metric has the same name, step and time in MLflow, W&B and TensorBoard.
"""

from collections.abc import Mapping
from typing import NamedTuple

from alignlab.tracking.names import tracked_name

ABOUT_A_ROW = ("step", "time")
"""What a row says of itself; all else in it are metrics."""


class Point(NamedTuple):
    """A metric at a step.

    Args:
        name: as trackers have it (`names.tracked_name`).
        value: of the metric.
        step: finished optimizer steps.
        time_s: seconds since 1970 at which the row was written; 0 where it does not say.
    """

    name: str
    value: float
    step: int
    time_s: float


def metric_names(row: Mapping[str, float], last: str | None = None) -> list[str]:
    """Names of a row's metrics, as the file has them, in its order; one may be put last."""
    names = [name for name in row if name not in ABOUT_A_ROW]
    return names if last is None else [*(name for name in names if name != last), last]


def points(row: Mapping[str, float], last: str | None = None) -> list[Point]:
    """The metrics of a row, as every tracker gets them.

    Args:
        row: of the file.
        last: name of the metric that comes last.
    """
    step, time_s = int(row["step"]), row.get("time", 0.0)
    names = metric_names(row, last)
    return [Point(tracked_name(name), row[name], step, time_s) for name in names]
