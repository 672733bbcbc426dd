"""The preview page and contact sheet of both data sets."""

import base64
import io
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from alignlab.config.data import FolderConfig, ShapesConfig
from alignlab.data.registry import DataConfig
from alignlab.data.video import write_mp4
from alignlab.experiments.data_preview import flow_colors, overlay_masks, preview


@pytest.fixture
def folder(tmp_path: Path) -> FolderConfig:
    root = tmp_path / "data"
    for number in range(3):
        video_THWC = torch.full((9, 32, 32, 3), 60 * number, dtype=torch.uint8)
        write_mp4(root / f"{number}.mp4", video_THWC, 8)
    Image.new("RGB", (16, 32), (200, 0, 0)).save(root / "subject.png")
    lines = [
        f'{{"file_name": "{number}.mp4", "caption": "a <b>bold</b> clip {number}", '
        f'"references": ["subject.png"], "reference_phrases": ["a red card"]}}'
        for number in range(3)
    ]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return FolderConfig(path=str(root), frames=9, size=(32, 32), fps=8, val_fraction=0.2)


def media(page: str, kind: str) -> list[bytes]:
    return [base64.b64decode(found) for found in re.findall(rf"data:{kind};base64,([^\"]+)", page)]


def test_page_of_a_folder_plays_its_clips(folder: FolderConfig, tmp_path: Path) -> None:
    path = preview(folder, tmp_path / "out", clips=2)
    assert path == tmp_path / "out" / "index.html"
    page = path.read_text("utf-8")
    assert "a &lt;b&gt;bold&lt;/b&gt; clip" in page and "<b>" not in page
    assert "a red card" in page and "masks" not in page and "optical flow" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    videos, images = media(page, "video/mp4"), media(page, "image/png")
    assert (len(videos), len(images)) == (2, 2)
    with av.open(io.BytesIO(videos[0]), "r") as container:
        frames = list(container.decode(video=0))
    assert (len(frames), frames[0].width) == (9, 32)
    with Image.open(io.BytesIO(images[0])) as image:
        assert image.size == (32, 32) and image.getpixel((16, 16)) == (200, 0, 0)
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > 6 * 100 and sheet.height > 2 * 100


def test_shapes_show_their_masks_and_flow(tmp_path: Path) -> None:
    config: DataConfig = ShapesConfig(frames=5, train_clips=3, val_clips=1)
    page = preview(config, tmp_path).read_text("utf-8")
    assert len(media(page, "video/mp4")) == 3 * 3
    assert page.count("masks: ") == page.count("optical flow") == 3
    assert page.count("<article>") == 3


@pytest.mark.parametrize("undecided", [True, False])
def test_undecided_pixels_are_striped_and_the_page_says_so(
    folder: FolderConfig, tmp_path: Path, undecided: bool
) -> None:
    root = Path(folder.path)
    for number in range(9):
        labels = Image.new("L", (32, 32), 255 if undecided else 0)
        labels.paste(1, (0, 0, 32, 16))  # the upper half is the card
        (root / "labels").mkdir(exist_ok=True)
        labels.save(root / f"labels/{number:05d}.png")
    masks = ', "masks": "labels", "entities": ["a card"]}'
    lines = (root / "metadata.jsonl").read_text().splitlines()
    (root / "metadata.jsonl").write_text("\n".join(line[:-1] + masks for line in lines))
    page = preview(folder, tmp_path / "out", clips=1).read_text("utf-8")
    assert ("masks: a card (striped: undecided)" in page) == undecided
    with av.open(io.BytesIO(media(page, "video/mp4")[1]), "r") as container:
        frame_HWC = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(float)
    upper_HWC, lower_HWC = frame_HWC[4:12], frame_HWC[20:]
    assert upper_HWC[..., 0].mean() > upper_HWC[..., 1].mean() + 60, "tinted"
    assert (lower_HWC.std() > 20) == undecided
    with Image.open(tmp_path / "out/sheet.png") as sheet:
        left, bottom = 6 + 5 * 134, sheet.height - 10  # the sixth tile: the masks
        tile = np.asarray(sheet.convert("L").crop((left, bottom - 40, left + 120, bottom)))
    assert (tile.std() > 10) == undecided


def test_masks_tint_only_their_pixels() -> None:
    video_THWC = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    masks_ETHW = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
    masks_ETHW[0, 0, 0, 0] = masks_ETHW[1, 1, 3, 3] = True
    tinted_THWC = overlay_masks(video_THWC, masks_ETHW)
    changed_THW = (tinted_THWC != video_THWC).any(dim=-1)
    assert torch.equal(changed_THW, masks_ETHW.any(dim=0))
    assert tinted_THWC[0, 0, 0].tolist() == [193, 40, 40]  # the first entity is red
    assert tinted_THWC[1, 3, 3].tolist() == [40, 193, 193]


@pytest.mark.parametrize(
    ("flow", "color"),
    [
        ((0.0, 0.0), [255, 255, 255]),
        ((9.0, 0.0), [255, 0, 0]),
        ((-9.0, 0.0), [0, 255, 255]),
        ((0.0, 9.0), [128, 255, 0]),
        ((0.0, -9.0), [128, 0, 255]),
    ],
)
def test_flow_has_the_colour_of_its_direction(flow: tuple[float, float], color: list[int]) -> None:
    field_THWC = torch.tensor(flow).expand(1, 20, 20, 2)
    found = flow_colors(field_THWC)[0, 5, 5].int()
    assert (found - torch.tensor(color)).abs().max() <= 1
