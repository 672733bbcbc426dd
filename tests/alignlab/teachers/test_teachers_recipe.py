"""What a recipe says of teachers, and what the harness asks of them."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import VJEPA2Config, VJEPA2Model

from alignlab.config.parts import TeacherConfig
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.teachers import TEACHERS, Teacher, parse_feature
from alignlab.training.batches import Batch
from alignlab.training.teacher_features import teacher_features
from made_clips import pixel_batch


@pytest.mark.parametrize("family", TEACHERS)
def test_every_family_takes_its_own_default(family: str) -> None:
    config = TeacherConfig(family=family)
    assert (config.path, config.feature) == (TEACHERS[family].path, TEACHERS[family].feature)
    assert config.grid is None


@pytest.mark.parametrize(
    ("family", "feature", "parsed"),
    [
        ("sam2", "stage:3", ("stage:k", 3)),
        ("vjepa2", "layer:0", ("layer:k", 0)),
        ("videomae", "pre_norm", ("pre_norm", 0)),
    ],
)
def test_features_have_a_kind_and_a_number(
    family: str, feature: str, parsed: tuple[str, int]
) -> None:
    assert parse_feature(family, feature) == parsed
    assert TeacherConfig(family=family, feature=feature).feature == feature


@pytest.mark.parametrize(
    ("family", "feature"),
    [
        ("sam2", "post_norm"),
        ("sam2", "stage:0"),
        ("sam2", "stage"),
        ("dinov2", "stage:3"),
        ("dinov2", "layer:"),
        ("vjepa2", "pre_norm:1"),
        ("videomae", "layer:-1"),
        ("videomae", "post_norm2"),
    ],
)
def test_a_recipe_is_told_the_features_of_the_family(family: str, feature: str) -> None:
    known = ", ".join(TEACHERS[family].features)
    with pytest.raises(ValidationError, match=f"{feature}' is not a feature of {family}: {known}"):
        TeacherConfig(family=family, feature=feature)


@pytest.mark.parametrize("grid", [[0, 4], [4], [4, 4, 4]])
def test_a_grid_is_a_height_and_a_width(grid: list[int]) -> None:
    assert TeacherConfig.model_validate({"family": "sam2", "grid": [10, 15]}).grid == (10, 15)
    with pytest.raises(ValidationError, match="grid"):
        TeacherConfig.model_validate({"family": "sam2", "grid": grid})


def _run(frames: int = 9, **objective: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "x",
            "steps": 1,
            "model": {"path": "assets/tiny-wan"},
            "data": {"name": "shapes", "frames": frames},
            "teachers": {"clip": {"family": "videomae"}, "dino": {"family": "tiny-dino"}},
            "objectives": {"a": {"name": "repa", "teacher": "clip", "blocks": [0]} | objective},
        }
    )


def test_video_teachers_need_clips_and_no_references() -> None:
    assert _run(9).teachers["clip"].feature == "pre_norm"
    assert _run(name="refalign", teacher="dino").objectives["a"].teacher == "dino"
    with pytest.raises(ValidationError, match=r"objectives\.a\.teacher: clip takes whole clips"):
        _run(name="refalign")
    with pytest.raises(
        ValidationError, match=r"teachers\.clip: .* data\.frames of 9 or more, not 5"
    ):
        _run(5)


def _teacher(**options: Any) -> Teacher:
    config = VJEPA2Config(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        crop_size=32,
        pred_hidden_size=12,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    )
    return Teacher(VJEPA2Model(config).eval(), "vjepa2", "post_norm", **options)


def _batch() -> Batch:
    video = torch.randint(0, 256, (2, 9, 48, 48, 3), dtype=torch.uint8)
    return pixel_batch(list(video), sigma_B=torch.ones(2))


def test_a_teacher_may_have_its_own_grid_for_video() -> None:
    batch = _batch()
    assert teacher_features(_teacher(), batch, "video", (3, 3, 3)).grid == (4, 3, 3)
    assert teacher_features(_teacher(grid=(1, 2)), batch, "video", (3, 3, 3)).grid == (4, 1, 2)


def test_reference_images_are_no_clips() -> None:
    with pytest.raises(UserError, match=r"^teachers: .* image teacher") as error:
        teacher_features(_teacher(), _batch(), "reference", (2, 3, 3))
    assert "\n" not in str(error.value)
