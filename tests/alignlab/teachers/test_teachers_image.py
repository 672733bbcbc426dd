"""SigLIP 2, CLIP, Qwen2.5-VL's tower and Depth Anything against their own classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionModel,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from alignlab.errors import UserError
from alignlab.teachers import load_teacher
from meta_dinov2 import with_meta_positions

GRID = (4, 6)
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = {**SIZES, "intermediate_size": 48, "patch_size": 14, "image_size": 56}
TEXT = {**SIZES, "intermediate_size": 48, "vocab_size": 64}
QWEN_VISION = {
    "hidden_size": 32,
    "depth": 3,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 40,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}
QWEN_TEXT = {**TEXT, "hidden_size": 40, "num_key_value_heads": 2, "rope_scaling": None}


def _qwen() -> Any:
    text = QWEN_TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 4, 4]}}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(vision_config=QWEN_VISION, text_config=text)
    )


def _depth() -> Any:
    backbone = Dinov2Config(
        **SIZES | {"num_hidden_layers": 4},
        patch_size=14,
        image_size=56,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=32,
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
        )
    )


WHOLE: dict[str, Callable[[], Any]] = {
    "siglip2": lambda: SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)),
    "clip": lambda: CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT)),
    "qwen2_5_vl": _qwen,
    "depth_anything": _depth,
}
TOWERS: dict[str, Callable[[Any], Any]] = {
    "siglip2": lambda whole: whole.vision_model,
    "clip": lambda whole: whole.vision_model,
    "qwen2_5_vl": lambda whole: whole.model.visual,
    "depth_anything": lambda whole: with_meta_positions(whole.backbone),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, str]]:
    """Family -> a whole model of it and its folder."""
    made = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for family, build in WHOLE.items():
            model = build().eval()
            # transformers' initial weights are tiny: make features depend on the image
            for weight in model.parameters():
                torch.nn.init.normal_(weight, std=0.2)
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            made[family] = (model, str(folder))
    return made


def _frames(height: int, width: int, count: int = 3) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, count, height, width, 3), generator=rng, dtype=torch.uint8)


def _images(frames_BTHWC: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.numpy()) for image in frames_BTHWC.flatten(0, 1)]


def _processed(family: str, frames_BTHWC: Tensor) -> Any:
    """Pixels of the family's own processor, without resizing."""
    plain = {"do_resize": False, "return_tensors": "pt"}
    images = _images(frames_BTHWC)
    if family == "siglip2":
        return SiglipImageProcessor()(images, **plain)["pixel_values"]
    if family == "clip":
        return CLIPImageProcessor()(images, do_center_crop=False, **plain)["pixel_values"]
    if family == "depth_anything":  # released folders have ImageNet's
        numbers = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
        return DPTImageProcessor(**numbers)(images, **plain)["pixel_values"]
    return Qwen2VLImageProcessor()(images, **plain)


def _expected(family: str, tower: Any, pixels: Any, feature: str) -> Tensor:
    """Images' tokens by the family's own class, by rows and columns."""
    with torch.no_grad():
        if family == "qwen2_5_vl":
            return _expected_of_qwen(tower, pixels, feature)
        fit = {"interpolate_pos_encoding": True} if family in ("siglip2", "clip") else {}
        out = tower(pixel_values=pixels, output_hidden_states=True, **fit)
    prefix = 0 if family == "siglip2" else 1
    if feature == "post_norm" and family == "depth_anything":
        normed: Tensor = tower.layernorm(out.hidden_states[-1])
        return normed[:, prefix:]
    tokens: Tensor = {
        "pre_norm": lambda: out.hidden_states[-1],
        "post_norm": lambda: out.last_hidden_state,
        "layer:1": lambda: out.hidden_states[2],
    }[feature]()
    return tokens[:, prefix:]


def _expected_of_qwen(tower: Any, inputs: Any, feature: str) -> Tensor:
    """One image at a time, its tokens put to the places that rotary embeddings turn them by."""
    grids = inputs["image_grid_thw"]
    images = zip(inputs["pixel_values"].chunk(len(grids)), grids, strict=True)
    return torch.stack([_of_one_image(tower, *image, feature) for image in images])


def _of_one_image(tower: Any, patches: Tensor, grid: Tensor, feature: str) -> Tensor:
    places: list[Tensor] = []
    orders: list[Tensor] = []
    permute = tower.permute_input_for_window_attn

    def noted(tokens: Tensor, window_index: Tensor, seq_len: int) -> Any:
        orders.append(window_index)
        return permute(tokens, window_index, seq_len=seq_len)

    hook = tower.rotary_pos_emb.register_forward_pre_hook(lambda _, args: places.append(args[1]))
    tower.permute_input_for_window_attn = noted
    out = tower(patches, grid_thw=grid[None], output_hidden_states=True)
    hook.remove()
    del tower.permute_input_for_window_attn
    if feature == "merged":
        merged: Tensor = out.pooler_output
        return merged
    rows, columns = permute(places[0], orders[0], seq_len=len(patches)).T
    found: Tensor = out.last_hidden_state if feature == "pre_norm" else out.hidden_states[2]
    in_rows = torch.empty_like(found)
    in_rows[rows * int(grid[2]) + columns] = found
    return in_rows


FEATURES = [
    *[("siglip2", feature) for feature in ("post_norm", "pre_norm", "layer:1")],
    *[("clip", feature) for feature in ("pre_norm", "layer:1")],
    *[("qwen2_5_vl", feature) for feature in ("merged", "pre_norm", "layer:1")],
    *[("depth_anything", feature) for feature in ("post_norm", "pre_norm", "layer:1")],
]


@pytest.mark.parametrize(("family", "feature"), FEATURES)
@pytest.mark.parametrize("grid", [(4, 4), (4, 6), (10, 4)])
def test_features_are_those_of_the_familys_own_processor_and_class(
    whole: dict[str, tuple[Any, str]], family: str, feature: str, grid: tuple[int, int]
) -> None:
    model, folder = whole[family]
    teacher = load_teacher(family, path=folder, feature=feature)
    frames = _frames(14 * grid[0], 14 * grid[1])
    expected = _expected(family, TOWERS[family](model), _processed(family, frames), feature)
    asked = (grid[0] // 2, grid[1] // 2) if feature == "merged" else grid
    found = teacher.encode(frames, asked)
    assert found.grid == (3, *asked)
    assert teacher.dim == expected.shape[-1]
    torch.testing.assert_close(found.tokens_BTPD[0], expected, rtol=1e-4, atol=1e-4)


def test_defaults_are_the_features_that_papers_name(whole: dict[str, tuple[Any, str]]) -> None:
    widths = {family: load_teacher(family, path=whole[family][1]) for family in WHOLE}
    assert {family: (teacher.feature, teacher.dim) for family, teacher in widths.items()} == {
        "siglip2": ("post_norm", 32),
        "clip": ("pre_norm", 32),
        "qwen2_5_vl": ("merged", 40),
        "depth_anything": ("post_norm", 32),
    }


@pytest.mark.parametrize(
    ("family", "build"),
    [
        ("siglip2", lambda model: SiglipVisionModel(model.config.vision_config)),
        ("clip", lambda model: CLIPVisionModel(model.config.vision_config)),
    ],
)
def test_a_folder_of_the_vision_model_alone_gives_the_same(
    whole: dict[str, tuple[Any, str]], family: str, build: Callable[[Any], Any], tmp_path: Path
) -> None:
    model, folder = whole[family]
    alone = build(model)
    alone.load_state_dict(TOWERS[family](model).state_dict())
    alone.save_pretrained(tmp_path)
    frames = _frames(56, 56)
    tokens = [
        load_teacher(family, path=path).encode(frames, (4, 4)).tokens_BTPD
        for path in (folder, str(tmp_path))
    ]
    assert torch.equal(*tokens)


def test_frames_of_other_sizes_become_whole_blocks_of_patches(
    whole: dict[str, tuple[Any, str]],
) -> None:
    teacher = load_teacher("qwen2_5_vl", path=whole["qwen2_5_vl"][1])
    one = teacher.encode(_frames(61, 47, count=1), (3, 2))
    assert one.tokens_BTPD.shape == (1, 1, 6, 40) and one.tokens_BTPD.isfinite().all()


def test_tokens_of_a_packed_tower_do_not_depend_on_the_images_beside_them(
    whole: dict[str, tuple[Any, str]],
) -> None:
    frames = _frames(56, 84)
    tokens = [
        load_teacher("qwen2_5_vl", path=whole["qwen2_5_vl"][1], feature="pre_norm", slice_size=size)
        .encode(frames, GRID)
        .tokens_BTPD
        for size in (1, 2, 16)
    ]
    for other in tokens[1:]:
        torch.testing.assert_close(other, tokens[0], rtol=1e-4, atol=1e-4)


def test_wrong_folders_and_grids_are_refused_in_one_line(
    whole: dict[str, tuple[Any, str]], tmp_path: Path
) -> None:
    naflex = Siglip2VisionModel(Siglip2VisionConfig(**SIZES, intermediate_size=48))
    naflex.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "siglip2"}')
    clip, qwen = whole["clip"][1], whole["qwen2_5_vl"][1]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"family": "siglip2", "path": clip}, "holds a clip model, family siglip2 loads siglip"),
        ({"family": "siglip2", "path": str(tmp_path)}, "NaFlex.*of a fixed size"),
        ({"family": "clip", "path": clip, "feature": "post_norm"}, "is not a feature of clip"),
        ({"family": "clip", "path": clip, "feature": "layer:3"}, "0 to 2"),
        ({"family": "qwen2_5_vl", "path": whole["siglip2"][1]}, "holds a siglip model"),
    ]
    for settings, message in refused:
        with pytest.raises(UserError, match=message) as error:
            load_teacher(**settings)
        assert "\n" not in str(error.value)
    teacher = load_teacher("qwen2_5_vl", path=qwen, feature="pre_norm")
    with pytest.raises(UserError, match="multiples of 2, not 3x4"):
        teacher.encode(_frames(42, 56), (3, 4))
