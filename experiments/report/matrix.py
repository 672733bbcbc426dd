"""All verdicts at once: variants by metrics, each better, worse, changed or not told apart."""

from collections.abc import Sequence
from dataclasses import dataclass

from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.report.statistics import MIN_PAIRS
from alignlab.experiments.report.summary import SummaryRow, by_metric

SIGNS = {
    "better": "▲",
    "worse": "▼",
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
    return Cell(row.change or ("not told apart" if _is_known(row) else "no verdict"), row.diff_text)


def _is_known(row: SummaryRow) -> bool:
    if row.ratio is not None:
        return row.ratio.low is not None or row.ratio.value == 1.0
    if row.target is not None and not row.target.is_undetected:
        return False
    paired = row.paired
    return row.is_claimable and paired is not None and (paired.low is not None or paired.is_equal)
