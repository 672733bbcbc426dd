"""What runs logged of themselves while they trained is drawn in a comparison's report."""

from pathlib import Path

import pytest

from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.compare.run import compare
from small_recipes import comparison_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

VARIANTS = """
cost: null
baseline: none
seeds: [0]
variants:
  none: {}
  aligned:
    objectives.ra: {name: refalign, teacher: dino, blocks: [0, 2]}
"""


@pytest.fixture(scope="module", autouse=True)
def few_charts() -> None:
    """Here a report has all its charts."""


@pytest.fixture(scope="module")
def report(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of runs that diagnosed and evaluated themselves."""
    folder = tmp_path_factory.mktemp("diagnosed")
    recipe = comparison_recipe(recipe_file, folder / "pair.yaml", VARIANTS)
    settings = ["steps=2", "tracking.diagnose_every=1", "data.references=[3,3]", "eval.every=1"]
    return compare(load_compare(recipe, [f"output={folder}", *settings]))


def test_every_variant_is_diagnosed_in_the_same_blocks(report: Path) -> None:
    curves = {
        run.variant: set(run.curves)
        for run in Comparison.load(report.with_name("comparison.json")).results
    }
    ranks = {f"diag/rank/{kind}/block{b}" for kind in ("video", "reference") for b in (0, 2)}
    for names in curves.values():
        assert {name for name in names if name.startswith("diag/rank")} == ranks
    own = {"grad/ra/ratio", "grad/ra/cosine", "sim/ra/block0", "sim/ra/block2"}
    assert curves["aligned"] - curves["none"] >= own | {"sim/ra/centered"}
    page = report.read_text()
    assert all(name in page for name in ranks | own)


def test_what_was_measured_ends_with_the_numbers_of_the_summary(report: Path) -> None:
    found = Comparison.load(report.with_name("comparison.json"))
    for run in found.results:
        assert {"val/flow", "val/flow/t0", "cknna/block0"} <= run.measured.keys()
        for name, curve in run.measured.items():
            assert [step for step, _ in curve] == [1, 2]
            assert curve[-1][1] == run.metrics[name]
        assert run.measured["val/flow"][0][1] != run.metrics["val/flow"]
        assert not any(name.startswith(("val/", "cknna/")) for name in run.curves)
    assert "Metrics during training" in report.read_text()
    assert (report.parent / "steps.csv").exists()
