"""V-JEPA 2.1 from Meta's checkpoints: the numbers are those of Meta's own code."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from alignlab.errors import UserError
from alignlab.models.model_files import NotLoadedError, load_nothing_here
from alignlab.runs.file_digests import digest_files
from alignlab.teachers import TEACHERS, Teacher, load_teacher
from alignlab.teachers.files import present_source, source_digests

WIDTH, INNER, DEPTH, PATCH = 128, 256, 12, 16


def _weights(width: int = WIDTH, depth: int = DEPTH) -> dict[str, Tensor]:
    """Random weights under Meta's names, drawn in the order of the names."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, 2, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        "patch_embed_img.proj.weight": (width, 3, 1, PATCH, PATCH),
        "patch_embed_img.proj.bias": (width,),
        "video_mod_embed": (1, 1, width),
        "img_mod_embed": (1, 1, width),
    }
    linear = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (INNER, width),
        "mlp.fc2": (width, INNER),
    }
    for i in range(depth):
        for name, shape in linear.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    norms = [f"blocks.{i}.{norm}" for i in range(depth) for norm in ("norm1", "norm2")]
    for name in norms + [f"norms_block.{i}" for i in range(4)]:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    rng = torch.Generator().manual_seed(0)
    drawn = {n: torch.randn(shape, generator=rng) * 0.1 for n, shape in sorted(shapes.items())}
    return {n: x + 1 if "norm" in n and n.endswith("weight") else x for n, x in drawn.items()}


def _clips(frames: int, height: int, width: int) -> Tensor:
    """Two clips of stripes that move, uint8 (B, T, H, W, C)."""
    t, y, x, c = torch.meshgrid(*map(torch.arange, (frames, height, width, 3)), indexing="ij")
    clip = 127.5 + 127 * torch.sin(0.11 * x + 0.07 * y * (1 + c) + 0.9 * t + c)
    return torch.stack([clip, clip.flip(2)]).to(torch.uint8)


def _save(path: Path, weights: dict[str, Tensor], key: str = "target_encoder") -> str:
    named = {f"module.backbone.{name}": value for name, value in weights.items()}
    torch.save({key: named, "encoder": {}, "epoch": 3, "opt": {"state": {0: 1.0}}}, path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _save(tmp_path_factory.mktemp("vjepa2_1") / "vjepa2_1_vitG_384.pt", _weights())


# Made by facebookresearch/vjepa2's VisionTransformer on these weights and clips: places (clip,
# token) and channels 0, 1, 2 and 127, after the last norm and after the norm of block 5.
GOLDEN: dict[tuple[int, int, int], dict[str, list[list[float]]]] = {
    (5, 3, 5): {
        "post_norm": [
            [0.12704, 0.7714, 0.90907, -0.10987],
            [-0.75164, -0.18436, 0.52643, 1.45522],
            [-1.7009, -1.22377, 1.24132, 0.48153],
            [-1.3132, 0.16627, 1.072, 0.85918],
        ],
        "stage:2": [
            [0.87972, 0.9629, 1.01806, -0.25547],
            [-0.07181, -0.3274, -0.05658, 1.15584],
            [-0.96816, -1.69974, 0.70488, -0.01076],
            [-0.03012, 0.45028, 0.54298, 0.46643],
        ],
    },
    (3, 16, 16): {
        "post_norm": [
            [-0.41164, 1.37299, 0.72989, 0.12864],
            [-1.3158, -1.49718, 0.64682, 1.04006],
            [-1.22434, -0.70239, 1.0631, 0.49243],
            [-0.41705, -0.27293, 1.66448, 0.3189],
        ],
        "stage:2": [
            [0.71986, 0.98443, 1.33604, -0.13245],
            [-0.5109, -1.77088, 0.09165, 0.81221],
            [-0.60341, -0.95178, 0.55022, 0.07163],
            [0.10046, -0.63539, 1.0527, 0.38371],
        ],
    },
    (1, 4, 3): {
        "post_norm": [
            [-0.98206, -0.55798, 1.35708, -0.19704],
            [-1.17655, -0.6333, 1.46415, -0.89981],
            [-2.7617, -0.28216, 1.7059, -0.29949],
            [-1.6632, -1.52873, -0.20316, -0.32164],
        ],
        "stage:2": [
            [0.47116, -0.10241, 0.99076, 0.15877],
            [-0.04695, 0.20592, 1.87739, -0.58129],
            [-1.2698, 0.4703, 2.00339, 0.17353],
            [-0.81985, -0.71226, -0.52912, 0.05647],
        ],
    },
}
READ = ([0, 0, 1, 1], [0, 5, 3, -1])


def _read(tokens_BTPD: Tensor) -> Tensor:
    clips, places = READ
    return tokens_BTPD.flatten(1, 2)[clips, places][:, [0, 1, 2, -1]]


@pytest.mark.parametrize(("frames", "height", "width"), [(5, 3, 5), (3, 16, 16), (1, 4, 3)])
@pytest.mark.parametrize("feature", ["post_norm", "stage:2"])
def test_features_are_those_of_metas_code(
    checkpoint: str, frames: int, height: int, width: int, feature: str
) -> None:
    teacher = load_teacher("vjepa2", path=checkpoint, feature=feature)
    found = teacher.encode(_clips(frames, height * PATCH, width * PATCH), (height, width))
    assert found.grid == (max(1, frames // 2), height, width)
    expected = torch.tensor(GOLDEN[frames, height, width][feature])
    torch.testing.assert_close(_read(found.tokens_BTPD), expected, rtol=1e-4, atol=1e-4)


def test_the_shape_is_read_from_the_weights(checkpoint: str) -> None:
    teacher = load_teacher("vjepa2", path=checkpoint, load=False)
    assert (teacher.dim, teacher.patch_size, teacher.tubelet) == (WIDTH, PATCH, 2)
    assert teacher.is_video
    assert teacher._config.num_attention_heads == 2
    assert teacher._config.norm_layers == (2, 5, 8, 11)


def test_the_last_stage_is_what_comes_after_the_final_norm(checkpoint: str) -> None:
    weights, clips = _weights(), _clips(3, 32, 48)

    def features(name: str) -> Tensor:
        return (
            load_teacher("vjepa2", path=checkpoint, feature=name).encode(clips, (2, 3)).tokens_BTPD
        )

    after, before = features("post_norm"), features("pre_norm")
    assert torch.equal(features("stage:4"), after)
    assert torch.equal(features("layer:11"), before)
    scale, shift = (weights[f"norms_block.3.{kind}"] for kind in ("weight", "bias"))
    torch.testing.assert_close(F.layer_norm(before, (WIDTH,), scale, shift, eps=1e-6), after)


def test_a_frame_by_itself_is_an_image(checkpoint: str) -> None:
    teacher = load_teacher("vjepa2", path=checkpoint)
    frame = _clips(1, 64, 48)
    image = teacher.encode(frame, (4, 3))
    assert image.grid == (1, 4, 3)
    video = teacher.encode(frame.expand(-1, 3, -1, -1, -1), (4, 3))
    assert video.grid == (1, 4, 3)  # two equal frames in one tubelet
    assert (image.tokens_BTPD - video.tokens_BTPD).abs().max() > 0.1
    sliced = load_teacher("vjepa2", path=checkpoint, slice_size=1).encode(frame, (4, 3))
    torch.testing.assert_close(sliced.tokens_BTPD, image.tokens_BTPD)


def test_images_need_their_own_embedding(tmp_path: Path) -> None:
    weights = {name: value for name, value in _weights().items() if "img" not in name}
    teacher = load_teacher("vjepa2", path=_save(tmp_path / "video.pt", weights))
    with pytest.raises(UserError, match="needs clips of 1 \\+ 2n frames, not 1"):
        teacher.encode(_clips(1, 32, 32), (2, 2))


def test_clips_of_any_size_are_resized_to_the_grid(checkpoint: str) -> None:
    """Sizes that are no multiples of a patch; bilinear with antialiasing, ImageNet's statistics."""
    teacher = load_teacher("vjepa2", path=checkpoint)
    clips = _clips(3, 75, 130)
    pixels = clips[:, 1:].flatten(0, 1).permute(0, 3, 1, 2) / 255.0
    pixels = F.interpolate(pixels, (48, 80), mode="bilinear", antialias=True)
    row = TEACHERS["vjepa2"]
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (row.mean, row.std))
    with torch.no_grad():
        out = teacher._model(((pixels - mean) / std).unflatten(0, (2, 2)))
    found = teacher.encode(clips, (3, 5)).tokens_BTPD[:, 0]
    torch.testing.assert_close(found, out.last_hidden_state, rtol=1e-4, atol=1e-4)


def test_half_precision_is_near(checkpoint: str) -> None:
    teacher = load_teacher("vjepa2", path=checkpoint)
    clips = _clips(9, 64, 64)
    exact = teacher.encode(clips, (4, 4)).tokens_BTPD
    teacher._model.bfloat16()  # what it is on a GPU
    half = teacher.encode(clips, (4, 4)).tokens_BTPD
    assert half.dtype == torch.float32
    assert 0 < (half - exact).norm() / exact.norm() < 0.05


def test_distilled_checkpoints_hold_their_teacher_too(tmp_path: Path) -> None:
    """The hub's ViT-B and ViT-L: the encoder is `ema_encoder`."""
    own = _weights()
    saved = {
        key: {f"module.{name}": value for name, value in weights.items()}
        for key, weights in (("target_encoder", _weights(width=64)), ("ema_encoder", own))
    }
    torch.save(saved, tmp_path / "vjepa2_1_vitb_dist_vitG_384.pt")
    teacher = load_teacher("vjepa2", path=str(tmp_path / "vjepa2_1_vitb_dist_vitG_384.pt"))
    assert teacher.dim == WIDTH


def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, checkpoint: str) -> None:
    weights = _weights()
    of_2_0 = {n: x for n, x in weights.items() if not n.startswith(("norms_block", "img", "vid"))}
    short = {n: x for n, x in weights.items() if n != "blocks.3.mlp.fc2.bias"}
    nan = weights | {"blocks.2.norm1.bias": torch.full((WIDTH,), math.nan)}
    (tmp_path / "broken.pt").write_bytes(Path(checkpoint).read_bytes()[:5000])
    torch.save({"target_encoder": os.path.join}, tmp_path / "code.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    refused: dict[str, str] = {
        str(tmp_path / "none.pt"): "no such file",
        str(tmp_path): "has no config.json; to load the checkpoint in it, name the file: .*2_0",
        str(tmp_path / "broken.pt"): "cannot be read as tensors",
        str(tmp_path / "code.pt"): "more than tensors is never run",
        str(tmp_path / "list.pt"): "holds a list, no checkpoint",
        _save(tmp_path / "sam.pt", weights, key="model"): "holds neither ema_encoder",
        _save(tmp_path / "2_0.pt", of_2_0): "no V-JEPA 2.1: V-JEPA 2.0 is loaded from a transf",
        _save(tmp_path / "short.pt", short): r"lacks 1 weights.*blocks\.3\.mlp\.fc2\.bias",
        _save(tmp_path / "nan.pt", nan): r"blocks\.2\.norm1\.bias is not finite",
        _save(tmp_path / "more.pt", weights | {"cls": torch.ones(1)}): "does not know, e.g. cls",
        _save(tmp_path / "deep.pt", _weights(depth=13)): "has 13 blocks; models of 12, 24",
        _save(tmp_path / "odd.pt", _weights(width=96)): "no multiple of 64",
    }
    for path, message in refused.items():
        with pytest.raises(UserError, match=message) as error:
            load_teacher("vjepa2", path=path)
        assert str(error.value).startswith("teachers (vjepa2)") and "\n" not in str(error.value)
    with pytest.raises(UserError, match="is a checkpoint, which families sam2, vjepa2, mob"):
        load_teacher("dinov2", path=checkpoint)
    with pytest.raises(UserError, match="no stage:5; the model has stages 1 to 4"):
        load_teacher("vjepa2", path=checkpoint, feature="stage:5")
    with pytest.raises(UserError, match="no positions on a grid of 1x4"):
        load_teacher("vjepa2", path=checkpoint).encode(_clips(3, 16, 64), (1, 4))


def test_its_file_is_what_names_it_in_keys(checkpoint: str, tmp_path: Path) -> None:
    first = load_teacher("vjepa2", path=checkpoint, load=False)
    assert source_digests(Path(checkpoint)) == digest_files(
        Path(checkpoint).parent, {"vjepa2_1_vitG_384.pt": Path(checkpoint)}
    )
    assert present_source(checkpoint) == Path(checkpoint)
    assert present_source(str(tmp_path / "none.pt")) is None
    changed = _weights() | {"img_mod_embed": torch.ones(1, 1, WIDTH)}
    second = load_teacher("vjepa2", path=_save(tmp_path / "other.pt", changed), load=False)
    assert first.identity != second.identity
    assert "V-JEPA 2.1" in str(first.parts["code"])


def test_a_file_that_changes_before_it_is_loaded_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "own.pt", _weights())
    teacher: Teacher = load_teacher("vjepa2", path=path, load=False)
    assert teacher.parts["weights"]
    _save(tmp_path / "own.pt", _weights() | {"img_mod_embed": torch.ones(1, 1, WIDTH)})
    with pytest.raises(UserError, match="has changed since it was hashed"):
        teacher.load()


def test_nothing_is_loaded_where_nothing_may_be(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import alignlab.models.model_files as model_files

    teacher: Any = load_teacher("vjepa2", path=checkpoint, load=False)
    monkeypatch.setattr(model_files._thread, "loads_nothing", False, raising=False)
    load_nothing_here()
    with pytest.raises(NotLoadedError):
        teacher.load()
