"""A finished comparison as data: its numbers, what they say, and a plot of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from alignlab.config.paths import user_path
from alignlab.experiments.analysis.tidy import (
    PARTS,
    check_folder,
    frame,
    metric_rows,
    parts_of,
    with_floats,
)
from alignlab.experiments.compare.outputs import read_comparison
from alignlab.experiments.compare.result import Comparison, RunResult
from alignlab.experiments.report.power import seeds_needed
from alignlab.experiments.report.summary import SummaryRow, summary_rows
from alignlab.experiments.report.text import table_cells, table_columns
from alignlab.experiments.report.verdict import verdict

if TYPE_CHECKING:  # a second to import
    from matplotlib.axes import Axes

COLUMNS = ("variant", "seed", "metric", *PARTS, "step", "value", "final")
_TEXTS = ("metric", "better", "variant", "diff_scale", "method", "change", "never_reached_seeds")
_COUNTS = ("num_seeds", "num_pairs", "num_better")


def load_comparison(path: str | Path) -> "ComparisonData":
    """The results of a comparison that `alignlab compare` or `alignlab report` has written.

    Args:
        path: the folder, or the comparison.json in it.

    Raises:
        UserError: there is none, it is damaged, or a newer version of alignlab wrote it.
    """
    path = user_path(str(path))
    check_folder(path, "load_comparison")
    comparison, folder = read_comparison(path)
    return ComparisonData(comparison, folder)


@dataclass(frozen=True)
class ComparisonData:
    """The results of a comparison.

    Args:
        comparison: all that comparison.json holds (docs/results.md).
        folder: where it lies; the `run_dir` of its runs are relative to it.
    """

    comparison: Comparison
    folder: Path

    @property
    def baseline(self) -> str:
        """The variant that differences are taken to."""
        return self.comparison.baseline

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants, in order of the recipe."""
        return self.comparison.variants

    @property
    def seeds(self) -> tuple[int, ...]:
        """Every variant was trained with each of them."""
        return self.comparison.seeds

    @cached_property
    def rows(self) -> list[SummaryRow]:
        """The report's numbers: one row per metric and variant, statistics included."""
        return summary_rows(self.comparison)

    def to_frame(self) -> pd.DataFrame:
        """Every number of every run, one a row.

        Returns:
            A frame with the columns `variant`, `seed`, `metric` (as table.csv names it),
            `quantity`, `block` and `noise_bin` (what is in that name; <NA> where it has none),
            `step`, `value` and `final`: whether it is one of the numbers at the end of the run,
            which table.csv is made of. The others are of evaluations during the training and of
            the training's log (`loss/`, `sim/`, `grad/`, `diag/`). No row stands there twice.
        """
        return frame((row for run in self.comparison.results for row in _rows(run)), COLUMNS)

    def table(self) -> pd.DataFrame:
        """table.csv: a row per metric and variant, with the same numbers and column names.

        The columns `quantity`, `block` and `noise_bin` are added as in `to_frame`, and `claimed`:
        whether the report claims a change. Missing numbers are NaN or <NA>, missing texts empty.
        """
        columns = table_columns(self.comparison)
        made = frame(table_cells(self.comparison, self.rows), columns)
        texts = [name for name in columns if name in _TEXTS]
        numbers = [name for name in columns if name not in (*_TEXTS, *_COUNTS)]
        made = with_floats(made.fillna(dict.fromkeys(texts, "")), numbers)
        parts = [(*parts_of(row.metric), bool(row.change)) for row in self.rows]
        added = frame(parts, (*PARTS, "claimed"))
        return pd.concat([made, added], axis="columns")

    def differences(self) -> pd.DataFrame:
        """The rows of `table` without those of the baseline, which differs from nothing.

        `diff_mean` is the mean paired difference to the baseline, `diff_low` and `diff_high` its
        interval, `holm_p` the corrected p-value, `change` what is claimed: "better", "worse",
        "changed" or "".
        """
        made = self.table()
        return made[made["variant"] != self.baseline].reset_index(drop=True)

    def verdict(self) -> list[str]:
        """The verdict in full: every claim, and what could have been seen."""
        return verdict(self.comparison, self.rows).sentences

    def seeds_needed(self, difference: float, metric: str = "val/flow") -> pd.DataFrame:
        """How many seeds each variant needs for a true difference to be found with 80% power.

        Args:
            difference: in the unit of the metric; of `steps_to_target` the share of the baseline's
                steps that is saved.
            metric: as table.csv names it.

        Returns:
            A frame with the fields of `experiments.report.power.SeedsNeeded` as columns.

        Raises:
            UserError: no such metric or difference.
        """
        return pd.DataFrame([vars(one) for one in seeds_needed(self.rows, metric, difference)])

    def plot_forest(
        self, ax: "Axes | Sequence[Axes] | None" = None, metrics: Sequence[str] | None = None
    ) -> "list[Axes]":
        """Draws the paired differences to the baseline, one plot per metric, one line per variant.

        A point is the mean difference with its interval; it is filled where a change is claimed,
        hollow elsewhere. The shaded part of a line are the differences that so many seeds would
        not have found (with 80% power), which is not known of steps to target; these are in percent
        of the baseline's steps.

        Args:
            ax: a matplotlib Axes for each metric, one alone for a single metric; None: a new
                figure.
            metrics: as table.csv names them; None: those of the summary table that have
                differences, costs left out.

        Returns:
            The Axes, in the order of the metrics; `axes[0].figure` is the figure.

        Raises:
            UserError: a metric without differences, or another number of Axes.
        """
        from alignlab.experiments.analysis.plots import plot_forest

        return plot_forest(self.comparison, self.rows, ax, metrics)


def _rows(run: RunResult) -> Iterator[tuple[Any, ...]]:
    start = (run.variant, run.seed)
    for rows in (*map(_points, (run.curves, run.measured)), [(run.steps, run.metrics)]):
        for step, found in rows:
            is_final = found is run.metrics
            for row in metric_rows(found, step, final=is_final):
                # a curve ends with what is among the final numbers as well
                if is_final or step != run.steps or row[0] not in run.metrics:
                    yield *start, *row


def _points(curves: Any) -> Iterator[tuple[int, dict[str, float]]]:
    for name, curve in curves.items():
        for step, value in curve:
            yield step, {name: value}
