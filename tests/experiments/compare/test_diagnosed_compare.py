"""What a diagnosis logged is drawn in a comparison's report."""

from pathlib import Path

from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.compare.result import Comparison
from alignlab.experiments.compare.run import compare
from small_recipes import comparison_recipe

VARIANTS = """
cost: null
baseline: none
seeds: [0]
variants:
  none: {}
  aligned:
    objectives.ra: {name: refalign, teacher: dino, blocks: [0, 2]}
"""


def test_every_variant_is_diagnosed_in_the_same_blocks(recipe_file: Path, tmp_path: Path) -> None:
    recipe = comparison_recipe(recipe_file, tmp_path / "pair.yaml", VARIANTS)
    settings = ["steps=1", "tracking.diagnose_every=1", "data.references=[3,3]"]
    report = compare(load_compare(recipe, [f"output={tmp_path}", *settings]))
    curves = {
        run.variant: set(run.curves)
        for run in Comparison.load(report.with_name("comparison.json")).results
    }
    ranks = {f"diag/rank/{kind}/block{b}" for kind in ("video", "reference") for b in (0, 2)}
    for names in curves.values():
        assert {name for name in names if name.startswith("diag/rank")} == ranks
    own = {"grad/ra/ratio", "grad/ra/cosine", "sim/ra/block0", "sim/ra/block2"}
    assert curves["aligned"] - curves["none"] >= own
    page = report.read_text()
    assert all(name in page for name in ranks | own)
