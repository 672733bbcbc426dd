"""Code that gives other numbers has another version, so that what it made before is not read.

Each case is what the code makes of a fixed input, in three numbers. If one fails because the code
was meant to give other numbers, raise its version and write down what it gives now; of the shipped
models, also where these were built anew.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from alignlab.config.data import FolderConfig, ShapesConfig
from alignlab.data.folder import DECODING_VERSION, FolderDataset
from alignlab.data.shapes.dataset import WORLD_VERSION, ShapesDataset
from alignlab.data.video import write_mp4
from alignlab.dataset_cache.clip_keys import VERSIONS
from alignlab.models.frozen_parts import FrozenParts
from alignlab.models.wan import checked_pipeline, frozen_parts
from alignlab.teachers import load_teacher


def numbers(values: Tensor) -> tuple[float, float, float]:
    """Mean, mean magnitude, and a sum in which every place has a weight of its own."""
    flat = values.double().flatten()
    weights = torch.cos(0.7 * torch.arange(len(flat), dtype=torch.float64))
    return float(flat.mean()), float(flat.abs().mean()), float((flat * weights).sum() / len(flat))


def clip() -> Tensor:
    """A uint8 video `(5, 48, 64, 3)` that no random number is in."""
    t, y, x, c = torch.meshgrid(*map(torch.arange, (5, 48, 64, 3)), indexing="ij")
    return ((3 * t + 2 * y * (c + 1) + (x // 8) * 29) % 256).to(torch.uint8)


@pytest.fixture(scope="module")
def frozen() -> FrozenParts:
    folder = checked_pipeline("assets/tiny-wan")
    return frozen_parts(folder, precision="fp32", device="cpu")


EXPECTED: dict[tuple[str, int], tuple[float, float, float]] = {
    ("text", 1): (0.00176907, 0.103538, 0.000792506),
    ("video", 1): (0.0116865, 0.461289, 0.0026811),
    ("reference", 1): (0.00902763, 0.438435, -2.64463e-05),
    ("teacher", 1): (0.000468682, 0.822912, 0.00248908),
    ("shapes video", 1): (126.299, 126.299, 0.0170476),
    ("shapes references", 1): (217.464, 217.464, 0.0143805),
    ("folder video", 1): (129.68, 129.68, -0.00465261),
    ("folder references", 1): (136.976, 136.976, 0.092294),
}  # fmt: skip


def check(name: str, version: int, values: Tensor) -> None:
    assert (name, version) in EXPECTED, f"{name}, {version}: {numbers(values)}"
    found, expected = numbers(values), EXPECTED[name, version]
    assert found == pytest.approx(expected, rel=2e-3, abs=2e-4), f"{name}: raise its version"


@pytest.mark.parametrize("kind", ["text", "video", "reference", "teacher"])
def test_what_frozen_models_are_given(frozen: FrozenParts, kind: str) -> None:
    make: dict[str, Callable[[], Tensor]] = {
        "text": lambda: frozen.encode_text(["a red circle moves left"])[0],
        "video": lambda: frozen.encode_video(clip()),
        "reference": lambda: frozen.encode_image(clip()[0]),
        "teacher": lambda: load_teacher("tiny-dino").encode(clip()[None], (3, 4)).tokens_BTPD,
    }
    check(kind, VERSIONS[kind], make[kind]())  # type: ignore[index]


def test_what_the_world_of_shapes_draws() -> None:
    sample = ShapesDataset(ShapesConfig(frames=5, size=(48, 64), references=(1, 3)), "train")[3]
    images = torch.stack([reference.image_HWC for reference in sample.references])
    check("shapes video", WORLD_VERSION, sample.video_THWC)
    check("shapes references", WORLD_VERSION, images)


def test_what_is_decoded(tmp_path: Path) -> None:
    for name in "ab":
        write_mp4(tmp_path / f"{name}.mp4", clip().repeat(3, 1, 1, 1), 8)
    Image.fromarray(np.asarray(clip()[0, :40])).save(tmp_path / "a.png")
    rows = [
        {"file_name": f"{name}.mp4", "caption": name, "references": ["a.png"], "split": split}
        for name, split in (("a", "train"), ("b", "val"))
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = FolderConfig(path=str(tmp_path), frames=5, size=(32, 48), fps=4, references=(1, 1))
    sample = FolderDataset(config, "train")[0]
    check("folder video", DECODING_VERSION, sample.video_THWC)
    check("folder references", DECODING_VERSION, sample.references[0].image_HWC)
