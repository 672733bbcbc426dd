"""Attention maps of image teachers: those of transformers' classes, in recipes and own loops."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from alignlab import attach
from alignlab.config.parts import TeacherConfig
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.losses.objective import Grid
from alignlab.teachers import TEACHERS, Teacher, attention_families
from alignlab.teachers.attention import recorded_attention
from alignlab.teachers.registry import TeacherRow, _problem
from alignlab.training.teacher_features import teacher_features
from attached_objectives import Colours
from made_clips import pixel_batch
from own_loops import own_transformer

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 24,
}
# family -> the model, tokens before the patches
MODELS: dict[str, tuple[Any, int]] = {
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**SIZES)), 1),
    "tiny-dino": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)),
        4,
    ),
    "dinov3": (lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZES, num_register_tokens=2)), 3),
    "siglip2": (lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES)), 0),
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES)), 1),
}
GRID = (2, 3)
FRAMES = torch.randint(0, 256, (2, 2, 16, 24, 3), generator=torch.Generator().manual_seed(0)).byte()


def made(family: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[family][0]().eval()
        for weight in model.parameters():  # transformers' initial weights are tiny
            torch.nn.init.normal_(weight, std=0.2)
    return model


def patch_maps(maps_NHLL: Tensor, prefix: int) -> Tensor:
    """Rows and columns of patches, the columns made to sum to 1."""
    maps = maps_NHLL[:, :, prefix:, prefix:]
    return maps / maps.sum(-1, keepdim=True)


@pytest.mark.parametrize("family", MODELS)
def test_maps_are_those_of_the_transformers_class(family: str) -> None:
    """Of two blocks at once, with positions, class token and registers left out."""
    model = made(family)
    teacher = Teacher(model, family, "attention:1-2", slice_size=3)
    features = teacher.encode(FRAMES, GRID)
    assert features.heads == (2, 2) == teacher.heads and features.grid == (2, *GRID)
    assert features.tokens_BTPD.shape == (2, 2, 6, teacher.dim) and teacher.dim == 2 * 2 * 24

    model.set_attn_implementation("eager")
    row, pixels = TEACHERS[family], FRAMES.flatten(0, 1).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (row.mean, row.std))
    with torch.no_grad():
        out = model((pixels - mean) / std, output_attentions=True, **row.options)
    layers = features.tokens_BTPD.flatten(0, 1).chunk(2, -1)
    for tokens_NPD, expected in zip(layers, out.attentions[1:], strict=True):
        query, key = tokens_NPD.unflatten(-1, (2, 2, 12)).movedim(1, 3).unbind(1)
        maps = (query @ key.mT / 12**0.5).softmax(-1)
        torch.testing.assert_close(maps, patch_maps(expected, MODELS[family][1]))


def test_every_family_of_plain_attention_was_compared_with_its_class() -> None:
    """Depth Anything's encoder is a DINOv2."""
    assert sorted(attention_families().split(", ")) == sorted([*MODELS, "depth_anything"])
    assert TEACHERS["depth_anything"].classes == {"depth_anything": "Dinov2Model"}


def test_recording_changes_no_bit_and_leaves_no_hook() -> None:
    model = made("dinov3")
    plain = Teacher(model, "dinov3", "pre_norm").encode(FRAMES, GRID).tokens_BTPD
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    Teacher(model, "dinov3", "attention:0").encode(FRAMES, GRID)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    pixels = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        before = model(pixels).last_hidden_state
        with recorded_attention(model, [2]) as caught:
            assert torch.equal(model(pixels).last_hidden_state, before)
    assert caught[0].projected.keys() == {"q_proj", "k_proj"}
    again = Teacher(model, "dinov3", "pre_norm").encode(FRAMES, GRID).tokens_BTPD
    assert torch.equal(again, plain)


@pytest.mark.parametrize(
    ("feature", "layers"),
    [("attention:0", (0,)), ("attention:8-11", (8, 9, 10, 11)), ("post_norm", ())],
)
def test_a_feature_names_a_block_or_blocks_in_a_row(feature: str, layers: tuple[int, ...]) -> None:
    assert TeacherConfig(family="dinov2", feature=feature).attention_layers == layers


@pytest.mark.parametrize(
    "feature", ["attention", "attention:2-1", "attention:1000", "attention:1-"]
)
def test_a_feature_that_names_no_block_is_refused(feature: str) -> None:
    with pytest.raises(ValidationError, match=f"'{feature}' is not a feature of dinov2: pre_norm"):
        TeacherConfig(family="dinov2", feature=feature)


@pytest.mark.parametrize("family", ["videomae", "qwen2_5_vl", "sam2", "diffusion"])
def test_a_family_without_maps_names_those_that_have_them(family: str) -> None:
    known = ", ".join(TEACHERS[family].features)
    expected = (
        rf"'attention:8-11' is not a feature of {family}: {known} \(k a number\); attention:k is "
        "a feature of dinov2, dinov3, siglip2, clip, depth_anything, tiny-dino"
    )
    with pytest.raises(ValidationError, match=expected):
        TeacherConfig(family=family, feature="attention:8-11")


def test_a_block_that_there_is_not_and_another_transformers_are_refused() -> None:
    with pytest.raises(UserError, match=r"^teachers feature: no attention:2-3; the model has 0 to"):
        Teacher(made("dinov2"), "dinov2", "attention:2-3")
    expected = r"^teachers feature: queries and keys of Linear cannot be read in this version of"
    with pytest.raises(UserError, match=expected), recorded_attention(torch.nn.Linear(1, 1), [0]):
        pass


def test_a_row_of_a_package_with_clips_has_no_maps() -> None:
    row = TeacherRow({"x": "X"}, path="x", feature="pre_norm", features=("pre_norm", "attention:k"))
    assert _problem(row) is None
    assert "take images one by one" in str(_problem(TeacherRow(**(vars(row) | {"video": True}))))


def test_features_of_a_batch_say_their_heads(teacher_folder: Path) -> None:
    teacher = Teacher(Dinov2Model.from_pretrained(teacher_folder), "dinov2", "attention:0-1")
    grid: Grid = (2, 3, 3)
    video = torch.zeros(5, 48, 48, 3, dtype=torch.uint8)
    features = teacher_features(
        teacher, pixel_batch([video], sigma_B=torch.zeros(1)), "video", grid
    )
    assert features.heads == (2, 2) and features.grid == (5, 3, 3)


def recipe(objective: dict[str, Any], **changes: Any) -> RunConfig:
    maps = {"family": "tiny-dino", "feature": "attention:0-1"}
    return RunConfig.model_validate(
        {
            "name": "x",
            "steps": 1,
            "model": {"path": "assets/tiny-wan"},
            "data": {"name": "shapes"},
            "teachers": {"maps": maps, "dino": {"family": "tiny-dino"}},
            "objectives": {"a": {"name": "haste_attention", "teacher": "maps"} | objective},
        }
        | changes
    )


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        (
            {"teacher": "dino"},
            {},
            r"objectives\.a\.teacher: dino gives hidden tokens, and haste_attention compares "
            r"attention maps: set its feature to attention:k, which is a feature of dinov2, ",
        ),
        (
            {"blocks": [0, 1, 2]},
            {},
            r"objectives\.a\.blocks: names 3 blocks, and the teacher's feature 2 layers: give as "
            "many, or one of either",
        ),
        ({"blocks": [3]}, {"eval": {"teacher": "maps"}}, "eval.teacher: maps gives attention maps"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    objective: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe(objective, **changes)


def test_nothing_is_measured_against_maps() -> None:
    run = recipe({"blocks": [1, 3]})
    assert run.measured_against == "dino"
    alone = recipe({"blocks": [1, 3]}, teachers={"maps": run.teachers["maps"]})
    assert alone.measured_against is None


def test_an_own_loop_takes_maps_of_a_teacher_and_refuses_a_teacher_of_its_own(
    wan_folder: Path, teacher_folder: Path
) -> None:
    model = own_transformer(wan_folder)
    objective = {"name": "haste_attention", "teacher": "dino", "blocks": [1]}
    loaded = Teacher(Dinov2Model.from_pretrained(teacher_folder), "dinov2", "attention:0-1")
    alignment = attach(model, objectives={"a": objective}, teachers={"dino": loaded})
    assert alignment.kinds == {1: {"attention"}}
    alignment.detach()
    for teacher in (Colours(), Teacher(loaded._model, "dinov2", "post_norm")):
        expected = (
            r"^objectives\.a\.teacher: dino gives hidden tokens, and haste_attention compares"
        )
        with pytest.raises(UserError, match=expected):
            attach(model, objectives={"a": objective}, teachers={"dino": teacher})
