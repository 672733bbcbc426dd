"""A comparison reuses no run that used another Stage 1 network than the recipe's folder holds."""

from pathlib import Path

import pytest

from alignlab.errors import UserError
from alignlab.experiments.compare.config import load_compare
from alignlab.experiments.compare.run import compare
from alignlab.experiments.launchers import local
from alignlab.losses.stage1.folder import Stage1Info, Stage1Teacher, save_stage1
from alignlab.losses.stage1.motion_head import MotionHead, MotionHeadConfig
from small_recipes import comparison_recipe

pytestmark = pytest.mark.usefixtures("shared_clips")

VARIANTS = """
cost: null
baseline: none
seeds: [0]
variants:
  none: {{}}
  moalign:
    objectives.mo: {{name: moalign, teacher: dino, blocks: [1], projector_dim: 8, head: {head}}}
"""


def write_head(folder: Path, teacher: str, seed: int) -> None:
    folder.mkdir(exist_ok=True)
    head = MotionHead(MotionHeadConfig(teacher_dim=24, width=6, hidden=8, decoder=4), seed=seed)
    info = Stage1Info(
        kind="moalign",
        teacher=Stage1Teacher(family="dinov2", path=teacher, feature="post_norm"),
        teacher_dim=24,
        grid=(3, 3),
        module=head.config,
    )
    save_stage1(folder, head, info)


def no_training(*_: object, **__: object) -> None:
    raise AssertionError("trained again")


def test_runs_with_another_stage1_network_are_refused_before_anything_is_trained(
    recipe_file: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = tmp_path / "head"
    recipe = comparison_recipe(recipe_file, tmp_path / "pair.yaml", VARIANTS.format(head=head))
    write_head(head, str(teacher_folder), seed=0)
    report = compare(load_compare(recipe, [f"output={tmp_path}"]))
    monkeypatch.setattr(local, "train", no_training)
    assert compare(load_compare(recipe, [f"output={tmp_path}"])) == report

    write_head(head, str(teacher_folder), seed=1)
    with pytest.raises(UserError) as refused:
        compare(load_compare(recipe, [f"output={tmp_path}", "seeds=[1,0]"]))
    assert str(refused.value) == (
        f"{report.parent}/moalign/seed-0: objectives.mo.head changed since this run began "
        "(model.safetensors): restore it, or choose another name=..."
    )
    # older runs have the digest of the network in their result alone
    for record in report.parent.glob("*/seed-*/inputs.json"):
        record.rename(record.with_suffix(".kept"))
    with pytest.raises(UserError) as refused:
        compare(load_compare(recipe, [f"output={tmp_path}"]))
    text = str(refused.value)
    assert "moalign/seed-0 holds a run with another Stage 1 network" in text and "\n" not in text
    for record in report.parent.glob("*/seed-*/inputs.kept"):
        record.rename(record.with_suffix(".json"))

    write_head(head, str(teacher_folder), seed=0)
    assert compare(load_compare(recipe, [f"output={tmp_path}"])) == report
