"""Teacher folders that say themselves how pixels are normalised."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import BitImageProcessorPil, Dinov2Model, VideoMAEConfig, VideoMAEModel

from alignlab.errors import UserError
from alignlab.teachers import load_teacher
from alignlab.teachers.preprocessing import read_preprocessing
from alignlab.teachers.registry import TEACHERS

GRID = (3, 3)
MEAN, STD = [0.430, 0.411, 0.296], [0.213, 0.156, 0.143]  # DINOv3's on satellite images
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SATELLITE = {"image_mean": MEAN, "image_std": STD}


def frames(scale: int = 16) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    shape = (1, 5, GRID[0] * scale, GRID[1] * scale, 3)
    return torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)


@pytest.fixture
def folder(teacher_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(teacher_folder, tmp_path / "teacher")


def write(folder: Path, content: Any, name: str = "preprocessor_config.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def tokens(folder: Path, family: str = "dinov2") -> Tensor:
    return load_teacher(family, path=str(folder)).encode(frames(), GRID).tokens_BTPD


@pytest.mark.parametrize(
    "settings",
    [
        SATELLITE,
        {"image_mean": 0.5, "image_std": 0.25},  # one number for all channels
        SATELLITE | {"rescale_factor": 1 / 127.5},
        SATELLITE | {"do_rescale": False},
        SATELLITE | {"do_normalize": False},
    ],
)
def test_features_are_those_of_transformers_with_the_folders_processor(
    folder: Path, settings: dict[str, Any]
) -> None:
    by_row = tokens(folder)
    BitImageProcessorPil(do_resize=False, do_center_crop=False, **settings).save_pretrained(folder)
    processor = BitImageProcessorPil.from_pretrained(folder)
    pixels = processor(
        [Image.fromarray(image.numpy()) for image in frames()[0]], return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        model = Dinov2Model.from_pretrained(folder).eval()
        expected = model(pixel_values=pixels).last_hidden_state[:, 1:]
    found = tokens(folder)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
    assert (found - by_row).abs().max() > 0.01


@pytest.mark.parametrize("factor", [1 / 255, 0.00392156862745098, 0.003921569, None])
def test_a_file_with_the_familys_values_changes_no_bit(folder: Path, factor: float | None) -> None:
    teacher = load_teacher("dinov2", path=str(folder))
    expected, digest = teacher.encode(frames(), GRID).tokens_BTPD, teacher.digest()
    write(folder, IMAGENET | {"rescale_factor": factor, "size": 224})
    teacher = load_teacher("dinov2", path=str(folder))
    assert torch.equal(teacher.encode(frames(), GRID).tokens_BTPD, expected)
    assert teacher.digest() == digest
    write(folder, SATELLITE)
    other = load_teacher("dinov2", path=str(folder))
    assert other.digest() != digest  # Stage 1 networks were trained on its features


def test_files_are_taken_in_the_order_of_transformers(tmp_path: Path) -> None:
    def mean(family: str) -> float:
        return read_preprocessing(tmp_path, TEACHERS[family])[0].mean[0]

    def settings(value: float) -> dict[str, float]:
        return {"image_mean": value, "image_std": 1.0}

    assert mean("dinov2") == mean("vjepa2") == 0.485
    write(tmp_path, settings(0.1))
    assert (mean("dinov2"), mean("vjepa2")) == (0.1, 0.1)
    write(tmp_path, settings(0.2), "video_preprocessor_config.json")
    assert (mean("dinov2"), mean("vjepa2")) == (0.1, 0.2)
    whole = {"processor_class": "P", "image_processor": settings(0.3)}
    write(tmp_path, whole, "processor_config.json")
    assert (mean("dinov2"), mean("vjepa2")) == (0.3, 0.2)
    write(tmp_path, whole | {"video_processor": settings(0.4)}, "processor_config.json")
    assert (mean("dinov2"), mean("vjepa2")) == (0.3, 0.4)


def test_a_video_teacher_reads_its_video_processor(tmp_path: Path) -> None:
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = VideoMAEConfig(**size, intermediate_size=48, image_size=48, num_frames=4)
    VideoMAEModel(config).save_pretrained(tmp_path)
    by_row = tokens(tmp_path, "videomae")
    write(tmp_path, SATELLITE, "video_preprocessor_config.json")
    shifted = (frames()[:, 1:].float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    with torch.no_grad():
        model = VideoMAEModel.from_pretrained(tmp_path).eval()
        out = model(shifted.permute(0, 1, 4, 2, 3), output_hidden_states=True)
    found = tokens(tmp_path, "videomae")
    torch.testing.assert_close(found.flatten(1, 2), out.hidden_states[-1], rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, by_row)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{not json", "is no JSON"),
        (b"\xff\xfe".decode("latin1"), "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ([1], "holds no settings"),
        (IMAGENET | {"image_mean": [0.5]}, r"image_mean is \[0\.5\], not three numbers"),
        (IMAGENET | {"image_mean": [0.5] * 4}, "image_mean is .*, not three numbers"),
        (IMAGENET | {"image_mean": [0.5, 0.5, None]}, "image_mean is .*, not three numbers"),
        (IMAGENET | {"image_mean": "imagenet"}, "image_mean is 'imagenet', not three numbers"),
        ('{"image_mean": 0.5, "image_std": NaN}', "image_std is nan, not three numbers"),
        ({"image_mean": 0.5}, "image_std is None, not three numbers"),
        ({"image_std": 0.5}, "image_mean is None, not three numbers"),
        (IMAGENET | {"image_std": [0.2, 0.0, 0.2]}, "must be above 0"),
        (IMAGENET | {"image_std": -1}, "must be above 0"),
        (IMAGENET | {"rescale_factor": 0}, "rescale_factor is 0"),
        (IMAGENET | {"rescale_factor": "1/255"}, "rescale_factor is '1/255'"),
        (IMAGENET | {"do_normalize": "yes"}, "do_normalize is 'yes'"),
    ],
)
def test_a_broken_file_is_refused_by_name(folder: Path, content: Any, reason: str) -> None:
    path = write(folder, content)
    with pytest.raises(UserError, match=reason) as caught:
        load_teacher("dinov2", path=str(folder))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_in_the_place_of_the_file_is_refused(folder: Path) -> None:
    (folder / "preprocessor_config.json").mkdir()
    with pytest.raises(UserError, match=r"preprocessor_config\.json cannot be read"):
        load_teacher("dinov2", path=str(folder))


def test_a_file_without_mean_and_deviation_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = tokens(folder)
    write(folder, {"size": 224})
    assert torch.equal(tokens(folder), expected)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "has no image_mean and no image_std" in caplog.text


def test_another_size_and_filter_are_told_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    size = {"height": 48, "width": 48}
    path = write(folder, IMAGENET | {"size": size, "resample": 2, "do_resize": True})
    teacher = load_teacher("dinov2", path=str(folder))
    teacher.encode(frames(), GRID)
    assert not caplog.records  # frames of that size, as they are
    teacher.encode(frames(32), GRID)
    teacher.encode(frames(32), GRID)
    assert [r.getMessage() for r in caplog.records] == [
        "teachers (dinov2): gets frames of 48x48, resized with bicubic; "
        f"{path} says 48x48, bilinear"
    ]
    caplog.clear()
    settings = {"do_center_crop": True, "crop_size": size, "size": {"shortest_edge": 56}}
    write(folder, IMAGENET | settings | {"resample": 3})
    teacher = load_teacher("dinov2", path=str(folder))
    teacher.encode(frames(), (2, 3))
    teacher.encode(frames(), GRID)
    assert [r.getMessage() for r in caplog.records] == [
        f"teachers (dinov2): gets frames of 32x48, resized with bicubic; {path} says 48x48, bicubic"
    ]
