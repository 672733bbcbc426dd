"""SAM 2's image encoder as a teacher, out of each kind of folder it comes in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BitImageProcessorPil,
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2HieraDetModel,
    Sam2MaskDecoderConfig,
    Sam2Model,
    Sam2PromptEncoderConfig,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam2VisionConfig,
    Sam2VisionModel,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from alignlab.errors import UserError
from alignlab.teachers import load_teacher

HIERA = Sam2HieraDetConfig(
    hidden_size=8,
    blocks_per_stage=[1, 1, 2, 1],
    embed_dim_per_stage=[8, 16, 32, 64],
    num_attention_heads_per_stage=[1, 2, 2, 4],
    window_size_per_stage=[8, 4, 4, 2],
    global_attention_blocks=[3],
)
VISION = Sam2VisionConfig(
    backbone_config=HIERA, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=16
)
DECODER = {"hidden_size": 16, "mlp_dim": 16, "iou_head_hidden_dim": 16, "num_attention_heads": 2}
MEMORY = {
    "memory_attention_hidden_size": 16,
    "memory_attention_feed_forward_hidden_size": 16,
    "memory_attention_num_layers": 1,
    "memory_encoder_hidden_size": 16,
    "memory_encoder_output_channels": 8,
    "mask_downsampler_embed_dim": 16,
    "memory_fuser_embed_dim": 16,
    "memory_fuser_intermediate_dim": 16,
}
MODELS: dict[str, Callable[[], Any]] = {
    "sam2": lambda: Sam2Model(
        Sam2Config(
            vision_config=VISION,
            prompt_encoder_config=Sam2PromptEncoderConfig(hidden_size=16),
            mask_decoder_config=Sam2MaskDecoderConfig(**DECODER),
        )
    ),
    "sam2_video": lambda: Sam2VideoModel(
        Sam2VideoConfig(
            vision_config=VISION,
            prompt_encoder_config={"hidden_size": 16},
            mask_decoder_config=DECODER,
            **MEMORY,
        )
    ),
    "sam2_vision_model": lambda: Sam2VisionModel(VISION),
    "sam2_hiera_det_model": lambda: Sam2HieraDetModel(HIERA),
}


def _backbone(model: Any) -> Any:
    vision = getattr(model, "vision_encoder", model)
    return getattr(vision, "backbone", vision).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Any]]:
    """Kind of folder -> the folder and the encoder that was saved in it."""
    saved = {}
    for kind, build in MODELS.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build()
            # transformers' initial weights are tiny: make features depend on the image
            for weight in model.parameters():
                torch.nn.init.normal_(weight, std=0.2)
        folder = str(tmp_path_factory.mktemp(kind))
        model.save_pretrained(folder)
        saved[kind] = (folder, _backbone(model))
    return saved


def _frames(height: int, width: int) -> Tensor:
    """Two clips of three frames."""
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, height, width, 3), generator=rng, dtype=torch.uint8)


@torch.no_grad()
def _by_hand(backbone: Any, frames_BTHWC: Tensor, **resize: Any) -> tuple[Tensor, ...]:
    """SAM 2's normalisation on PIL images, then the four stages, (B T, H, W, D) each."""
    processor = BitImageProcessorPil(
        do_center_crop=False,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        **({"do_resize": False} | resize),
    )
    images = [Image.fromarray(image.numpy()) for image in frames_BTHWC.flatten(0, 1)]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    stages: tuple[Tensor, ...] = backbone(pixels).intermediate_hidden_states
    return stages


@pytest.mark.parametrize("kind", MODELS)
def test_the_third_stage_is_read_from_every_kind_of_folder(
    models: dict[str, tuple[str, Any]], kind: str
) -> None:
    folder, backbone = models[kind]
    frames = _frames(64, 96)
    teacher = load_teacher("sam2", path=folder)
    assert (teacher.dim, teacher.patch_size, teacher.is_video) == (32, 16, False)
    assert not any(name.startswith("neck") for name, _ in teacher._model.named_parameters())
    found = teacher.encode(frames, (4, 6))
    assert found.grid == (3, 4, 6)
    expected = _by_hand(backbone, frames)[2].reshape(2, 3, 24, 32)
    torch.testing.assert_close(found.tokens_BTPD, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("stage", "stride"), [(1, 4), (2, 8), (3, 16), (4, 32)])
def test_stages_are_counted_from_one(
    models: dict[str, tuple[str, Any]], stage: int, stride: int
) -> None:
    folder, backbone = models["sam2_hiera_det_model"]
    frames = _frames(32, 96)
    teacher = load_teacher("sam2", path=folder, feature=f"stage:{stage}")
    assert (teacher.dim, teacher.patch_size) == (2 ** (stage + 2), stride)
    expected = _by_hand(backbone, frames)[stage - 1]
    found = teacher.encode(frames, (32 // stride, 96 // stride))
    torch.testing.assert_close(found.tokens_BTPD.reshape(expected.shape), expected)


def test_frames_are_resized_like_sam2s_images(models: dict[str, tuple[str, Any]]) -> None:
    folder, backbone = models["sam2_vision_model"]
    big = _frames(100, 130)
    size = {"height": 64, "width": 64}
    resize = {"do_resize": True, "size": size, "resample": Image.Resampling.BILINEAR}
    expected = _by_hand(backbone, big, **resize)[2].reshape(2, 3, 16, 32)
    found = load_teacher("sam2", path=folder).encode(big, (4, 4)).tokens_BTPD
    # PIL rounds to whole grey values
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())


def test_half_precision_gives_nearly_the_same(models: dict[str, tuple[str, Any]]) -> None:
    teacher = load_teacher("sam2", path=models["sam2"][0])
    exact = teacher.encode(_frames(32, 64), (2, 4)).tokens_BTPD
    teacher._model.bfloat16()  # what it is on a GPU
    half = teacher.encode(_frames(32, 64), (2, 4)).tokens_BTPD
    assert half.dtype == torch.float32
    assert 0 < (half - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize("slice_size", [1, 4, 100])
def test_slicing_changes_nothing(models: dict[str, tuple[str, Any]], slice_size: int) -> None:
    folder, _ = models["sam2"]
    frames = _frames(32, 64)
    teacher = load_teacher("sam2", path=folder, slice_size=slice_size)
    calls: list[int] = []
    teacher._model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    whole = load_teacher("sam2", path=folder, slice_size=6).encode(frames, (2, 4))
    found = teacher.encode(frames, (2, 4))
    torch.testing.assert_close(found.tokens_BTPD, whole.tokens_BTPD, rtol=1e-4, atol=1e-4)
    assert max(calls) <= slice_size and sum(calls) == 6


@pytest.mark.parametrize(
    ("stage", "grid", "sides"), [(3, (3, 4), 2), (3, (4, 5), 2), (1, (8, 12), 8), (2, (6, 8), 4)]
)
def test_grids_that_cut_a_window_are_refused(
    models: dict[str, tuple[str, Any]], stage: int, grid: tuple[int, int], sides: int
) -> None:
    teacher = load_teacher("sam2", path=models["sam2"][0], feature=f"stage:{stage}")
    message = rf"stage:{stage} needs .* multiples of {sides}, not {grid[0]}x{grid[1]}: set teachers"
    with pytest.raises(UserError, match=message):
        teacher.encode(_frames(64, 64), grid)


def test_transformers_itself_fails_at_a_refused_size(models: dict[str, tuple[str, Any]]) -> None:
    _, backbone = models["sam2_hiera_det_model"]
    with pytest.raises(RuntimeError):
        _by_hand(backbone, _frames(48, 64))


def test_what_does_not_fit_is_refused_in_one_line(
    models: dict[str, tuple[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "never_heard_of"}')
    folder = models["sam2"][0]
    refused: list[tuple[str, str, str | None, str]] = [
        ("sam2", folder, "stage:5", "stages 1 to 4"),
        ("sam2", folder, "pre_norm", "'pre_norm' is not a feature of sam2: stage:k"),
        ("dinov2", folder, None, "holds a sam2 model"),
        ("sam2", str(tmp_path), None, "holds a never_heard_of model"),
    ]
    for family, path, feature, message in refused:
        with pytest.raises(UserError, match=message) as error:
            load_teacher(family, path=path, feature=feature)
        assert str(error.value).startswith("teachers") and "\n" not in str(error.value)


def test_loading_a_part_tells_nothing_of_the_rest(
    models: dict[str, tuple[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    load_teacher("sam2", path=models["sam2_video"][0])
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
