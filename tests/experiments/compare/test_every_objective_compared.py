"""One comparison with a variant for each registered objective, three steps long."""

from pathlib import Path

import pytest

from alignlab.experiments import load_comparison
from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.compare.run import compare
from alignlab.losses.registry import BUILT_IN
from objective_settings import FEATURES, SETTINGS, teacher_of
from small_recipes import comparison_recipe
from untrained_stage1 import write_untrained

pytestmark = pytest.mark.usefixtures("shared_clips")


@pytest.mark.slow
def test_every_objective_is_a_variant_of_one_comparison(
    recipe_file: Path, wan_folder: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    wan, teacher = str(wan_folder), str(teacher_folder)
    stage1 = write_untrained(tmp_path, teacher=teacher, dim=24, wan=wan, text_dim=32)
    variants = ["cost: null", "baseline: none", "seeds: [0]", "variants:", "  none: {}"]
    for name in BUILT_IN:
        settings = SETTINGS[name].format(stage1=stage1)
        teacher_setting = teacher_of(name, settings)
        settings = f"{{name: {name}, {teacher_setting}{settings}}}"
        variants.append(f"  {name}: {{objectives.{name}: {settings}}}")
    recipe = comparison_recipe(recipe_file, tmp_path / "every.yaml", "\n".join(variants))
    others = [
        f"teachers.{alias}={{family: dinov2, path: {teacher}, feature: '{feature}'}}"
        for alias, feature in FEATURES.items()
    ]
    report = compare(load_compare(recipe, [f"output={tmp_path}", "steps=3", *others]))
    found = load_comparison(report.parent)
    assert found.variants == ("none", *BUILT_IN)
    frame = found.to_frame()
    for name in BUILT_IN:
        rows = frame[(frame["variant"] == name) & (frame["metric"] == "val/flow")]
        assert rows["value"].notna().all() and len(rows) > 0
        losses = frame[(frame["variant"] == name) & (frame["metric"] == f"loss/{name}")]
        assert losses["value"].notna().all() and len(losses) > 0
    html = report.read_text(encoding="utf-8")
    assert all(name in html for name in BUILT_IN)
