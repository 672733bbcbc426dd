"""A real comparison finds a planted difference, and claims none where there is none."""

import csv
from pathlib import Path

import pytest

from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.compare.run import compare
from alignlab.experiments.report.summary import SummaryRow, summary_rows
from alignlab.experiments.report.verdict import verdict
from small_recipes import comparison_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

# `again` is the baseline under another name; `still` has a rate at which it hardly learns.
VARIANTS = """
cost: null
baseline: none
seeds: [0, 1, 2, 3, 4]
variants:
  none: {}
  again: {}
  still: {optim.lr: 1e-6}
"""


@pytest.fixture(scope="module")
def report(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen runs of two steps."""
    folder = tmp_path_factory.mktemp("planted")
    recipe = comparison_recipe(recipe_file, folder / "planted.yaml", VARIANTS)
    return compare(load_compare(recipe, [f"output={folder}"]))


@pytest.fixture(scope="module")
def found(report: Path) -> Comparison:
    return Comparison.load(report.parent / "comparison.json")


def row(found: Comparison, variant: str, metric: str) -> SummaryRow:
    (one,) = (r for r in summary_rows(found) if (r.variant, r.metric) == (variant, metric))
    return one


def test_the_baseline_under_another_name_gets_no_verdict(found: Comparison) -> None:
    rows = [r for r in summary_rows(found) if r.variant == "again" and not r.quantity.cost]
    assert len(rows) >= 11, "flow loss and its ten bins"
    for one in rows:
        assert one.paired is not None
        assert set(one.differences.values()) == {0.0}
        assert (one.paired.low, one.paired.high, one.paired.holm_p) == (0.0, 0.0, 1.0)
        assert (one.change, one.diff_text) == ("", "0")
    said = verdict(found, summary_rows(found)).variants["again"]
    assert said.startswith("again (5 seeds): exactly the baseline's validation flow loss; ")
    assert "raises" not in said and "lowers" not in said


def test_a_planted_difference_is_claimed(found: Comparison) -> None:
    one = row(found, "still", "val/flow")
    assert one.paired is not None and one.paired.low is not None
    assert one.change == "worse" and one.paired.low > 0.0
    words = verdict(found, summary_rows(found))
    assert words.lead == "Against the baseline none, over 5 seeds: worse on something: still."
    assert words.variants["still"].startswith("still (5 seeds): raises validation flow loss by ")
    assert "] (worse)" in words.variants["still"]


def test_the_written_table_says_the_same(report: Path) -> None:
    table = csv.DictReader((report.parent / "table.csv").read_text().splitlines())
    changes = {line["variant"]: line["change"] for line in table if line["metric"] == "val/flow"}
    assert changes == {"none": "", "again": "", "still": "worse"}
