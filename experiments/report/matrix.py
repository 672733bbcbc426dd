"""All verdicts at once: variants by metrics, each better, worse, changed or not told apart."""

from collections.abc import Sequence
from dataclasses import dataclass

from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.report.statistics import MIN_PAIRS
from alignlab.experiments.report.summary import SummaryRow, by_metric

SIGNS = {
    "better": "✓",  # an arrow would be read as up or down
    "worse": "✗",
    "changed": "◆",
    "not told apart": "·",
    "no verdict": "\N{EN DASH}",
}
_ORDER = {"better": 2, "changed": 1, "not told apart": 0, "worse": -1}


@dataclass(frozen=True)
class Cell:
    """One variant in one metric.

    Args:
        kind: a key of `SIGNS`; "no verdict" where nothing can be said: not measured, too few seeds,
            no spread, or a run diverged.
        text: the difference as the tables have it.
    """

    kind: str
    text: str

    @property
    def amount(self) -> str:
        """The difference without its interval."""
        return self.text.split(" [")[0]

    @property
    def sign(self) -> str:
        """Says the same without colour."""
        return SIGNS[self.kind]

    @property
    def order(self) -> int | None:
        """By which a column is sorted; what is not known comes last."""
        return _ORDER.get(self.kind)


@dataclass(frozen=True)
class Matrix:
    """The table: a name and a cell per metric for each variant but the baseline.

    Args:
        metrics: one row of each, which names it.
        cells: by variant, in the order of `metrics`.
    """

    metrics: tuple[SummaryRow, ...]
    cells: dict[str, tuple[Cell, ...]]

    def count(self, variant: str, kind: str) -> int:
        """In how many metrics of quality, costs left out, a variant is of this kind."""
        pairs = zip(self.metrics, self.cells[variant], strict=True)
        return sum(cell.kind == kind for row, cell in pairs if not row.quantity.cost)


def matrix_of(comparison: Comparison, rows: Sequence[SummaryRow]) -> Matrix | None:
    """The metrics of the summary table, costs last; None where no variant can be told anything."""
    groups = [group for group in by_metric(rows) if group[0].headline]
    others = [variant for variant in comparison.variants if variant != comparison.baseline]
    if not groups or not others or len(comparison.seeds) < MIN_PAIRS:
        return None
    cells = {
        variant: tuple(_cell(row) for group in groups for row in group if row.variant == variant)
        for variant in others
    }
    return Matrix(tuple(group[0] for group in groups), cells)


def _cell(row: SummaryRow) -> Cell:
    return Cell(kind_of(row), row.diff_text)


def kind_of(row: SummaryRow) -> str:
    """What is said of a row: a key of `SIGNS`.

    A cost that differs by the same amount with every seed is counted, not estimated: it is better
    or worse without a test.
    """
    if row.change:
        return row.change
    paired = row.paired
    if row.ratio is not None:
        is_known = row.ratio.low is not None or row.ratio.value == 1.0
    elif row.target is not None:
        is_known = row.target.is_undetected
    elif paired is None or not row.is_claimable:
        is_known = False
    elif row.quantity.cost and paired.std == 0.0 and paired.num_pairs >= MIN_PAIRS:
        if paired.mean != 0.0:
            is_better = (paired.mean > 0.0) == (row.quantity.better == "higher")
            return "better" if is_better else "worse"
        is_known = True
    else:
        is_known = paired.low is not None or (paired.is_equal and paired.num_pairs >= MIN_PAIRS)
    return "not told apart" if is_known else "no verdict"
