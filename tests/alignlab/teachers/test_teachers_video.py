"""Video teachers against transformers' models run by hand, at their own size and at others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BitImageProcessorPil,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEModel,
    VJEPA2Config,
    VJEPA2ForVideoClassification,
    VJEPA2Model,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from alignlab.errors import UserError
from alignlab.teachers import load_teacher
from alignlab.teachers.positions import interpolate_table

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
VIDEOMAE = VideoMAEConfig(
    **SMALL,
    intermediate_size=48,
    image_size=48,
    num_frames=4,
    use_mean_pooling=False,
    decoder_num_hidden_layers=1,
    decoder_hidden_size=12,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=12,
)
VJEPA2 = VJEPA2Config(
    **SMALL,
    crop_size=48,
    frames_per_clip=4,
    mlp_ratio=2,
    num_pooler_layers=1,
    pred_hidden_size=12,
    pred_num_attention_heads=2,
    pred_num_hidden_layers=1,
)
MODELS: dict[str, Callable[[], Any]] = {
    "videomae": lambda: VideoMAEModel(VIDEOMAE),
    "vjepa2": lambda: VJEPA2Model(VJEPA2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    paths = {}
    for name, build in MODELS.items():
        paths[name] = str(tmp_path_factory.mktemp(name))
        _save(build, paths[name])
    return paths


def _save(build: Callable[[], Any], folder: str | Path) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        # transformers' initial weights are tiny: make features depend on the video
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    return model.eval()


def _clips(frames: int, grid: tuple[int, int], *, clips: int = 2, scale: int = 16) -> Tensor:
    """Smooth clips of `scale` pixels per patch."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(clips * frames, 3, 4, 4, generator=rng)
    size = (grid[0] * scale, grid[1] * scale)
    pixels = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
    images = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return images.reshape(clips, frames, *size, 3)


def _pixels(clips_BTHWC: Tensor, **resize: Any) -> Tensor:
    """transformers' image processor on PIL images, (B, T, C, H, W)."""
    processor = BitImageProcessorPil(
        do_center_crop=False,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        **({"do_resize": False} | resize),
    )
    images = [Image.fromarray(image.numpy()) for image in clips_BTHWC.flatten(0, 1)]
    pixels: Tensor = processor(images, return_tensors="pt")["pixel_values"]
    return pixels.reshape(*clips_BTHWC.shape[:2], *pixels.shape[1:])


@torch.no_grad()
def _by_hand(model: Any, pixels_BTCHW: Tensor) -> Any:
    """transformers' model without the clips' first frames, with all hidden states."""
    if isinstance(model, VideoMAEModel):
        return model(pixels_BTCHW[:, 1:], output_hidden_states=True)
    return model(pixels_BTCHW[:, 1:], output_hidden_states=True, skip_predictor=True)


def _own(name: str, folder: str, **changes: Any) -> Any:
    """transformers' model of a folder, with changes to its config."""
    kind, config = (VideoMAEModel, VIDEOMAE) if name == "videomae" else (VJEPA2Model, VJEPA2)
    changed = type(config)(**(config.to_dict() | changes))
    return kind.from_pretrained(folder, config=changed).eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("feature", ["pre_norm", "post_norm", "layer:0", "layer:2"])
def test_features_are_those_of_transformers(
    folders: dict[str, str], name: str, feature: str
) -> None:
    clips = _clips(5, (3, 3))
    out = _by_hand(_own(name, folders[name]), _pixels(clips))
    expected = {
        "pre_norm": out.hidden_states[3],
        "post_norm": out.last_hidden_state,
        "layer:0": out.hidden_states[1],
        "layer:2": out.hidden_states[3],
    }[feature].unflatten(1, (2, 9))
    teacher = load_teacher(name, path=folders[name], feature=feature)
    found = teacher.encode(clips, (3, 3))
    assert found.grid == (2, 3, 3)
    assert (teacher.dim, teacher.patch_size, teacher.tubelet, teacher.is_video) == (24, 16, 2, True)
    assert found.tokens_BTPD.dtype == torch.float32
    torch.testing.assert_close(found.tokens_BTPD, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_features_before_and_after_the_norm_differ(folders: dict[str, str], name: str) -> None:
    clips = _clips(5, (3, 3))
    before, after = (
        load_teacher(name, path=folders[name], feature=f).encode(clips, (3, 3)).tokens_BTPD
        for f in ("pre_norm", "post_norm")
    )
    model = _own(name, folders[name])
    norm = model.layernorm if name == "videomae" else model.encoder.layernorm
    with torch.no_grad():
        torch.testing.assert_close(norm(before), after, rtol=1e-4, atol=1e-4)
    assert (before - after).abs().max() > 0.1
    default = load_teacher(name, path=folders[name]).encode(clips, (3, 3)).tokens_BTPD
    assert torch.equal(default, before if name == "videomae" else after)


@pytest.mark.parametrize("name", MODELS)
def test_the_first_frame_is_dropped_and_tubelets_keep_their_order(
    folders: dict[str, str], name: str
) -> None:
    teacher = load_teacher(name, path=folders[name], feature="layer:0")
    clips = _clips(9, (2, 3))
    plain = teacher.encode(clips, (2, 3)).tokens_BTPD
    other_first = clips.clone()
    other_first[:, 0] = 255 - other_first[:, 0]
    assert torch.equal(teacher.encode(other_first, (2, 3)).tokens_BTPD, plain)
    changed = clips.clone()
    changed[1, 5:7, 16:, 32:] = 255 - changed[1, 5:7, 16:, 32:]  # tubelet 2, row 1, column 2
    moved = (teacher.encode(changed, (2, 3)).tokens_BTPD - plain).norm(dim=-1)
    assert moved.shape == (2, 4, 6)
    assert moved[1].argmax() == 2 * 6 + 1 * 3 + 2
    assert moved[0].max() < 1e-4


def test_videomae_positions_are_interpolated_in_space_then_in_time(folders: dict[str, str]) -> None:
    clips, grid = _clips(9, (2, 5)), (4, 2, 5)
    trained = _own("videomae", folders["videomae"])
    table_THWD = trained.embeddings.position_embeddings.reshape(2, 3, 3, 24)
    space = torch.nn.functional.interpolate(
        table_THWD.permute(0, 3, 1, 2), (2, 5), mode="bicubic"
    ).permute(0, 2, 3, 1)
    # Linear between the centres of two frames that become four.
    parts = [1.0, 0.75, 0.25, 0.0]
    table = torch.stack([part * space[0] + (1 - part) * space[1] for part in parts])
    torch.testing.assert_close(interpolate_table(table_THWD, grid), table)
    assert torch.equal(interpolate_table(table_THWD, (2, 3, 3)), table_THWD)
    sized = _own("videomae", folders["videomae"], image_size=[32, 80], num_frames=8)
    sized.embeddings.position_embeddings = table.reshape(1, 40, 24)
    expected = _by_hand(sized, _pixels(clips)).hidden_states[-1].unflatten(1, (4, 10))
    found = load_teacher("videomae", path=folders["videomae"]).encode(clips, (2, 5))
    assert found.grid == grid
    torch.testing.assert_close(found.tokens_BTPD, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", [(2, 2), (2, 3), (3, 1)])
def test_vjepa2_positions_are_true_rows_and_columns(
    folders: dict[str, str], grid: tuple[int, int]
) -> None:
    height, width = grid
    clips = _clips(9, grid)
    side = max(grid)
    sized = _own("vjepa2", folders["vjepa2"], crop_size=side * 16, frames_per_clip=8)
    # transformers numbers tokens on a square grid; leave out the places that are not there
    number = torch.arange(4 * side * side).reshape(4, side, side)[:, :height, :width]
    for layer in sized.encoder.layer:
        layer.attention.register_forward_pre_hook(
            lambda module, args, kwargs: (
                args,
                kwargs | {"position_mask": number.reshape(1, -1).expand(2, -1)},
            ),
            with_kwargs=True,
        )
    expected = _by_hand(sized, _pixels(clips)).last_hidden_state.unflatten(1, (4, height * width))
    found = load_teacher("vjepa2", path=folders["vjepa2"]).encode(clips, grid)
    assert found.grid == (4, *grid)
    torch.testing.assert_close(found.tokens_BTPD, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_another_grid_in_between_changes_nothing(folders: dict[str, str], name: str) -> None:
    teacher = load_teacher(name, path=folders[name])
    clips = _clips(5, (2, 3))
    first = teacher.encode(clips, (2, 3)).tokens_BTPD
    teacher.encode(clips, (3, 3))
    teacher.encode(_clips(9, (2, 3)), (2, 3))
    assert torch.equal(teacher.encode(clips, (2, 3)).tokens_BTPD, first)


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_gives_nearly_the_same(folders: dict[str, str], name: str) -> None:
    clips = _clips(9, (2, 3))
    teacher = load_teacher(name, path=folders[name])
    exact = teacher.encode(clips, (2, 3)).tokens_BTPD
    teacher._model.bfloat16()  # what it is on a GPU
    half = teacher.encode(clips, (2, 3)).tokens_BTPD
    assert half.dtype == torch.float32
    assert 0 < (half - exact).norm() / exact.norm() < 0.1


def test_vjepa2s_predictor_is_not_run(folders: dict[str, str]) -> None:
    teacher = load_teacher("vjepa2", path=folders["vjepa2"])
    calls: list[Any] = []
    teacher._model.predictor.register_forward_pre_hook(lambda module, args: calls.append(args))
    teacher.encode(_clips(5, (2, 2)), (2, 2))
    assert not calls


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("slice_size", "largest"), [(1, 1), (8, 2), (11, 2), (100, 3)])
def test_slices_are_whole_clips_and_change_nothing(
    folders: dict[str, str], name: str, slice_size: int, largest: int
) -> None:
    clips = _clips(5, (2, 3), clips=3)
    teacher = load_teacher(name, path=folders[name], slice_size=slice_size)
    calls: list[tuple[int, int]] = []
    teacher._model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple(next(iter(kwargs.values())).shape[:2])),
        with_kwargs=True,
    )
    whole = load_teacher(name, path=folders[name], slice_size=12).encode(clips, (2, 3))
    found = teacher.encode(clips, (2, 3))
    torch.testing.assert_close(found.tokens_BTPD, whole.tokens_BTPD, rtol=1e-4, atol=1e-4)
    assert max(calls) == (largest, 4) and sum(count for count, _ in calls) == 3


@pytest.mark.parametrize(
    ("name", "resample"),
    [("videomae", Image.Resampling.BICUBIC), ("vjepa2", Image.Resampling.BILINEAR)],
)
def test_frames_are_resized_to_whole_patches(
    folders: dict[str, str], name: str, resample: Image.Resampling
) -> None:
    rng = torch.Generator().manual_seed(0)
    big = torch.randint(0, 256, (1, 5, 100, 130, 3), generator=rng, dtype=torch.uint8)
    size = {"height": 48, "width": 48}
    pixels = _pixels(big, do_resize=True, size=size, resample=resample)
    expected = _by_hand(_own(name, folders[name]), pixels).hidden_states[-1].unflatten(1, (2, 9))
    teacher = load_teacher(name, path=folders[name], feature="pre_norm")
    found = teacher.encode(big, (3, 3)).tokens_BTPD
    # PIL rounds to whole grey values
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())


def test_encoders_are_taken_out_of_larger_models(folders: dict[str, str], tmp_path: Path) -> None:
    clips = _clips(5, (3, 3))
    larger = {
        "videomae": _save(lambda: VideoMAEForPreTraining(VIDEOMAE), tmp_path / "videomae").videomae,
        "vjepa2": _save(lambda: VJEPA2ForVideoClassification(VJEPA2), tmp_path / "vjepa2").vjepa2,
    }
    for name, model in larger.items():
        expected = _by_hand(model, _pixels(clips)).hidden_states[-1].unflatten(1, (2, 9))
        teacher = load_teacher(name, path=str(tmp_path / name), feature="pre_norm")
        found = teacher.encode(clips, (3, 3)).tokens_BTPD
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_suit_is_refused_in_one_line(folders: dict[str, str], tmp_path: Path) -> None:
    pooled = VideoMAEConfig(**(VIDEOMAE.to_dict() | {"use_mean_pooling": True}))
    _save(lambda: VideoMAEModel(pooled), tmp_path)
    assert load_teacher("videomae", path=str(tmp_path)).dim == 24
    refused: list[tuple[str, str, str | None, str]] = [
        ("videomae", str(tmp_path), "post_norm", "no final norm"),
        ("videomae", folders["videomae"], "layer:3", "0 to 2"),
        ("videomae", folders["videomae"], "stage:1", "'stage:1' is not a feature of videomae"),
        ("videomae", folders["vjepa2"], None, "holds a vjepa2 model"),
        ("dinov2", folders["videomae"], None, "holds a videomae model"),
    ]
    for family, path, feature, message in refused:
        with pytest.raises(UserError, match=message) as error:
            load_teacher(family, path=path, feature=feature)
        assert str(error.value).startswith("teachers") and "\n" not in str(error.value)


@pytest.mark.parametrize("frames", [1, 4, 6])
def test_clips_without_whole_tubelets_after_the_first_frame_are_refused(
    folders: dict[str, str], frames: int
) -> None:
    teacher = load_teacher("vjepa2", path=folders["vjepa2"])
    with pytest.raises(UserError, match=rf"1 \+ 2n frames, not {frames}: change data.frames"):
        teacher.encode(_clips(frames, (2, 2)), (2, 2))


def test_another_architecture_under_the_same_name_is_refused(
    folders: dict[str, str], tmp_path: Path
) -> None:
    state = load_file(Path(folders["vjepa2"]) / "model.safetensors")
    state = {name: value for name, value in state.items() if not name.startswith("predictor.")}
    _write(tmp_path, folders["vjepa2"], state)
    load_teacher("vjepa2", path=str(tmp_path))  # only the encoder is run
    # V-JEPA 2.1 tells images from videos by a learned vector
    _write(tmp_path, folders["vjepa2"], state | {"encoder.modality": torch.zeros(24)})
    with pytest.raises(UserError, match=r"VJEPA2Model does not know, e\.g\. encoder\.modality"):
        load_teacher("vjepa2", path=str(tmp_path))
    _write(tmp_path, folders["vjepa2"], state | {"encoder.layernorm.bias": torch.zeros(25)})
    with pytest.raises(UserError, match=r"lacks 1 weights, e\.g\. encoder\.layernorm\.bias"):
        load_teacher("vjepa2", path=str(tmp_path))


def _write(folder: Path, source: str, state: dict[str, Tensor]) -> None:
    (folder / "config.json").write_text((Path(source) / "config.json").read_text())
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
