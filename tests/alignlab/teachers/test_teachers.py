"""Teachers against transformers' own preprocessing and models, run by hand."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import (
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from alignlab.errors import UserError
from alignlab.teachers import TEACHERS, load_teacher
from meta_dinov2 import with_meta_positions

GRID = (2, 3)
SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
# folder -> model, family, patch size, tokens before the patches
MODELS: dict[str, tuple[Any, str, int, int]] = {
    "dinov2": (
        lambda: Dinov2Model(Dinov2Config(**SMALL, patch_size=14, image_size=56)),
        "dinov2",
        14,
        1,
    ),
    "registers": (
        lambda: Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**SMALL, patch_size=16, image_size=64, num_register_tokens=4)
        ),
        "tiny-dino",
        16,
        5,
    ),
    "dinov3": (
        lambda: DINOv3ViTModel(
            DINOv3ViTConfig(**SMALL, intermediate_size=48, patch_size=16, num_register_tokens=4)
        ),
        "dinov3",
        16,
        5,
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    paths = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, (build, *_) in MODELS.items():
            model = build()
            # transformers' initial weights are tiny: make features depend on the image
            for weight in model.parameters():
                torch.nn.init.normal_(weight, std=0.2)
            paths[name] = str(tmp_path_factory.mktemp(name))
            model.save_pretrained(paths[name])
    return paths


def _frames(patch: int, seed: int = 0) -> Tensor:
    """Two smooth clips of three frames."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(6, 3, 6, 9, generator=rng)
    size = (GRID[0] * patch, GRID[1] * patch)
    pixels = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
    images = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return images.reshape(2, 3, *size, 3)


def _by_hand(folder: str, frames_BTHWC: Tensor, **resize: Any) -> Any:
    """transformers' image processor and model on PIL images, with all hidden states."""
    processor = BitImageProcessorPil(
        do_center_crop=False,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        **({"do_resize": False} | resize),
    )
    images = [Image.fromarray(image.numpy()) for image in frames_BTHWC.flatten(0, 1)]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        model = with_meta_positions(transformers.AutoModel.from_pretrained(folder).eval())
        return model(pixel_values=pixels, output_hidden_states=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("feature", ["pre_norm", "post_norm", "layer:1"])
def test_features_are_those_of_transformers(
    folders: dict[str, str], name: str, feature: str
) -> None:
    _, family, patch, prefix = MODELS[name]
    frames = _frames(patch)
    out = _by_hand(folders[name], frames)
    expected = {
        "pre_norm": out.hidden_states[-1],
        "post_norm": out.last_hidden_state,
        "layer:1": out.hidden_states[2],
    }[feature][:, prefix:].unflatten(0, (2, 3))
    teacher = load_teacher(family, path=folders[name], feature=feature)
    features = teacher.encode(frames, GRID)
    assert features.grid == (3, *GRID)
    assert features.tokens_BTPD.dtype == torch.float32
    assert not features.tokens_BTPD.requires_grad
    assert teacher.dim == 24 and teacher.patch_size == patch
    torch.testing.assert_close(features.tokens_BTPD, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_three_kinds_of_feature_are_what_they_are_called(
    folders: dict[str, str], name: str
) -> None:
    _, family, patch, _ = MODELS[name]
    frames = _frames(patch)

    def tokens(feature: str) -> Tensor:
        teacher = load_teacher(family, path=folders[name], feature=feature)
        return teacher.encode(frames, GRID).tokens_BTPD

    model = transformers.AutoModel.from_pretrained(folders[name])
    norm = model.norm if name == "dinov3" else model.layernorm
    with torch.no_grad():
        torch.testing.assert_close(norm(tokens("pre_norm")), tokens("post_norm"))
    assert torch.equal(tokens("pre_norm"), tokens("layer:2"))
    assert (tokens("pre_norm") - tokens("layer:1")).abs().max() > 0.1
    assert (tokens("pre_norm") - tokens("post_norm")).abs().max() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_frames_are_resized_to_whole_patches(folders: dict[str, str], name: str) -> None:
    _, family, patch, prefix = MODELS[name]
    shape = (2, 3, 2 * GRID[0] * patch, 2 * GRID[1] * patch, 3)
    rng = torch.Generator().manual_seed(0)
    big = torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)  # aliases if it can
    size = {"height": GRID[0] * patch, "width": GRID[1] * patch}
    out = _by_hand(folders[name], big, do_resize=True, size=size, resample=Image.Resampling.BICUBIC)
    teacher = load_teacher(family, path=folders[name], feature="post_norm")
    expected = out.last_hidden_state[:, prefix:].unflatten(0, (2, 3))
    found = teacher.encode(big, GRID).tokens_BTPD
    # PIL rounds to whole grey values
    assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.999


def test_tokens_lie_in_rows_and_frames_in_order(folders: dict[str, str]) -> None:
    teacher = load_teacher("tiny-dino", path=folders["registers"])
    frames = _frames(16)
    changed = frames.clone()
    changed[1, 2, 16:, 16:32] = (
        255 - changed[1, 2, 16:, 16:32]
    )  # row 1, column 1 of clip 1, frame 2
    before, after = (teacher.encode(x, GRID).tokens_BTPD for x in (frames, changed))
    moved = (after - before).norm(dim=-1)
    assert moved[1, 2].argmax() == 1 * 3 + 1
    moved[1, 2] = 0
    assert moved.max() < 1e-4


@pytest.mark.parametrize("slice_size", [1, 4, 100])
def test_slicing_changes_nothing(folders: dict[str, str], slice_size: int) -> None:
    frames = _frames(16)
    teacher = load_teacher("dinov3", path=folders["dinov3"], slice_size=slice_size)
    calls: list[int] = []
    teacher._model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    whole = load_teacher("dinov3", path=folders["dinov3"], slice_size=6).encode(frames, GRID)
    found = teacher.encode(frames, GRID)
    torch.testing.assert_close(found.tokens_BTPD, whole.tokens_BTPD, rtol=1e-4, atol=1e-4)
    assert max(calls) <= slice_size and sum(calls) == 6


def test_autocast_and_gradients_around_it_change_nothing(folders: dict[str, str]) -> None:
    teacher = load_teacher("dinov2", path=folders["dinov2"])
    frames = _frames(14)
    plain = teacher.encode(frames, GRID).tokens_BTPD
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        assert torch.equal(teacher.encode(frames, GRID).tokens_BTPD, plain)
    assert not teacher._model.training
    assert not any(p.requires_grad for p in teacher._model.parameters())


def test_families_default_to_the_papers_features(folders: dict[str, str]) -> None:
    frames = _frames(16)
    for name, family, feature in (
        ("dinov2", "dinov2", "post_norm"),
        ("dinov3", "dinov3", "pre_norm"),
    ):
        default, named = (
            load_teacher(family, path=folders[name], feature=f).encode(frames, GRID).tokens_BTPD
            for f in (None, feature)
        )
        assert torch.equal(default, named)
    tiny, full = TEACHERS["tiny-dino"], TEACHERS["dinov2"]
    of_lists = {key: getattr(full, key) for key in ("width", "native_size", "patch", "papers")}
    assert dataclasses.replace(tiny, path=full.path, **of_lists) == full


def test_what_cannot_be_loaded_is_refused_in_one_line(
    folders: dict[str, str], tmp_path: Path
) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"family": "dinov22"}, "did you mean 'dinov2'"),
        ({"family": "dinov2", "path": str(tmp_path / "absent")}, "no such folder"),
        ({"family": "dinov2", "path": str(tmp_path)}, r"no config\.json"),
        ({"family": "dinov3", "path": folders["dinov2"]}, "holds a dinov2 model"),
        ({"family": "dinov2", "path": folders["dinov2"], "feature": "layer:3"}, "0 to 2"),
        ({"family": "dinov2", "path": folders["dinov2"], "feature": "last"}, "'last' is not"),
    ]
    for settings, message in refused:
        with pytest.raises(UserError, match=message) as error:
            load_teacher(**settings)
        assert "\n" not in str(error.value)


def test_missing_weights_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    model = Dinov2Model.from_pretrained(folders["dinov2"])
    state = {k: v for k, v in model.state_dict().items() if "layer.2.mlp.fc1" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=r"lacks 2 weights, e.g. .*layer\.2\.mlp\.fc1\.bias"):
        load_teacher("dinov2", path=str(tmp_path))
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="cannot load"):
        load_teacher("dinov2", path=str(tmp_path))


def test_the_digest_is_of_the_weights_that_are_read(
    folders: dict[str, str], tmp_path: Path
) -> None:
    digest = load_teacher("dinov2", path=folders["dinov2"]).digest()
    model = Dinov2Model.from_pretrained(folders["dinov2"])

    def saved(name: str, change: Tensor | float, dtype: torch.dtype = torch.float32) -> str:
        with torch.no_grad():
            model.get_parameter(name).add_(change)
        model.to(dtype).save_pretrained(tmp_path / name)
        model.float()
        return load_teacher("tiny-dino", path=str(tmp_path / name)).digest()

    assert saved("embeddings.mask_token", 1.0) == digest
    assert saved("layernorm.bias", 0.0, torch.bfloat16) == digest  # as loaded on a GPU
    one = torch.zeros(24).index_fill(0, torch.tensor(5), 1.0)
    assert saved("layernorm.weight", one) != digest


@pytest.mark.parametrize("wrong", ["float", "images"])
def test_only_uint8_clips_are_taken(folders: dict[str, str], wrong: str) -> None:
    frames = _frames(14).float() if wrong == "float" else _frames(14)[0]
    with pytest.raises(ValueError, match="uint8"):
        load_teacher("dinov2", path=folders["dinov2"]).encode(frames, GRID)
