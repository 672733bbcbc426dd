"""What a data set looks like: a contact sheet and a page that plays its clips.

Shape letters: T frames, H height, W width, C channels (RGB), E entities.
"""

import colorsys
import io
import textwrap
from pathlib import Path

import jinja2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from alignlab.config.paths import user_path
from alignlab.config.recipe_file import read_recipe
from alignlab.data.registry import DataConfig, build_dataset
from alignlab.data.sample import Sample
from alignlab.data.video import encode_mp4
from alignlab.experiments.compare.config import load_base
from alignlab.experiments.report.escaping import visible
from alignlab.experiments.report.page import data_uri
from alignlab.recipe import validated
from alignlab.runs.atomic_files import whole_file, write_text
from alignlab.runs.out_paths import out_folder
from alignlab.stage1.config import Stage1Config

TILE_HEIGHT = 128
NUM_SHEET_FRAMES = 5
MARGIN = 6
NARROWEST = 300  # row of a sheet: a text has room
STRIPES = 6  # pixels
FLOW_SATURATION = 0.05  # of the shorter side per frame: the speed drawn at full saturation

_PAGE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string("""\
<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; color: #222; }
article { border-top: 1px solid #ccc; padding: 1rem 0; }
figure { display: inline-block; margin: 0 1rem .5rem 0; vertical-align: top; }
figcaption { font-size: 13px; color: #555; max-width: 11rem; }
video, img { height: 176px; border: 1px solid #ddd; image-rendering: pixelated; }
</style>
<h1>{{ title }}</h1>
<p>{{ summary }}</p>
{% for clip in clips %}<article>
<h2>{{ clip.key }}</h2>
<p>{{ clip.caption }}</p>
{% for name, source in clip.videos %}<figure>
<video src="{{ source }}" autoplay loop muted playsinline></video>
<figcaption>{{ name }}</figcaption></figure>
{% endfor %}{% for name, source in clip.references %}<figure>
<img src="{{ source }}" alt="{{ name }}">
<figcaption>{{ name }}</figcaption></figure>
{% endfor %}</article>
{% endfor %}</html>
""")


def preview(config: DataConfig, out: Path, clips: int = 8, *, memory: Path | None = None) -> Path:
    """Write `out/sheet.png` and `out/index.html` for the first clips of the train split.

    Beside each clip: its caption, its references, and, where the data set knows them, entity
    masks drawn over the clip (undecided pixels striped) and optical flow as colour (hue: direction,
    right is red and down is green-yellow; saturation: speed).

    Args:
        config: settings of any data set.
        out: folder, made when missing.
        clips: at most so many clips.
        memory: as in `build_dataset`.

    Returns:
        the page, which holds its media and needs no other file.

    Raises:
        UserError: `out` cannot be written into, or as `build_dataset`.
    """
    with out_folder(out):
        return _write(config, out, clips, memory)


def _write(config: DataConfig, out: Path, clips: int, memory: Path | None) -> Path:
    dataset = build_dataset(config, "train", memory=memory)
    samples = [dataset[index] for index in range(min(clips, len(dataset)))]
    out.mkdir(parents=True, exist_ok=True)
    sheet = stacked([_sheet_row(sample) for sample in samples])
    with whole_file(out / "sheet.png") as partial:
        sheet.save(partial)
    height, width = config.size
    page = out / "index.html"
    write_text(
        page,
        _PAGE.render(
            title=f"{config.name}: {len(samples)} of {len(dataset)} training clips",
            summary=f"{config.frames} frames of {width}x{height} at {config.fps} fps",
            clips=[_page_entry(sample, config.fps) for sample in samples],
        ),
    )
    return page


def overlay_masks(video_THWC: Tensor, masks_ETHW: Tensor) -> Tensor:
    """The clip with every entity tinted in its own colour, uint8 `(T, H, W, 3)`."""
    tinted_THWC = video_THWC.float()
    for mask_THW, color in zip(masks_ETHW, _colors(len(masks_ETHW)), strict=True):
        blend_THWC = 0.4 * tinted_THWC + 0.6 * torch.tensor(color)
        tinted_THWC = torch.where(mask_THW[..., None], blend_THWC, tinted_THWC)
    return tinted_THWC.round().to(torch.uint8)


def striped(video_THWC: Tensor, undecided_THW: Tensor) -> Tensor:
    """The clip with diagonal grey stripes where nothing is decided, uint8."""
    _, height, width, _ = video_THWC.shape
    diagonal_HW = torch.arange(height)[:, None] + torch.arange(width)
    stripes_HW = diagonal_HW // STRIPES % 2 == 0
    grey_THWC = (0.35 * video_THWC.float() + 0.65 * 128).round().to(torch.uint8)
    return torch.where((undecided_THW & stripes_HW)[..., None], grey_THWC, video_THWC)


def flow_colors(flow_THWC: Tensor) -> Tensor:
    """Flow `(T, H, W, 2)` in pixels per frame as hue (direction) and saturation (speed)."""
    right_THW, down_THW = flow_THWC.unbind(dim=-1)
    turns_THW = torch.atan2(down_THW, right_THW) / (2 * torch.pi)
    full_speed = FLOW_SATURATION * min(flow_THWC.shape[1:3])
    speed_THW = (torch.hypot(right_THW, down_THW) / full_speed).clamp(max=1.0)
    offsets_C = torch.tensor([5.0, 3.0, 1.0])
    sector_THWC = torch.remainder(offsets_C + 6 * turns_THW[..., None], 6)
    ramp_THWC = torch.minimum(sector_THWC, 4 - sector_THWC).clamp(0, 1)
    return (255 - 255 * speed_THW[..., None] * ramp_THWC).round().to(torch.uint8)


def _page_entry(sample: Sample, fps: float) -> dict[str, object]:
    videos = [("clip", sample.video_THWC)]
    if sample.masks_ETHW is not None:
        label = "masks: " + ", ".join(sample.entities)
        if sample.undecided_THW is not None and sample.undecided_THW.any():
            label += " (striped: undecided)"
        videos.append((label, _drawn_masks(sample, slice(None))))
    if sample.flow_THWC is not None:
        videos.append(("optical flow", flow_colors(sample.flow_THWC)))
    return {
        "key": sample.key,
        "caption": sample.caption,
        "videos": [(name, data_uri(encode_mp4(clip, fps), "video/mp4")) for name, clip in videos],
        "references": [
            (
                " — ".join(filter(None, (reference.name, reference.phrase))),
                data_uri(png(reference.image_HWC), "image/png"),
            )
            for reference in sample.references
        ],
    }


def _drawn_masks(sample: Sample, frames: slice) -> Tensor:
    """Some frames with their entities tinted, and stripes where nothing is decided."""
    assert sample.masks_ETHW is not None
    tinted_THWC = overlay_masks(sample.video_THWC[frames], sample.masks_ETHW[:, frames])
    undecided_THW = sample.undecided_THW
    return tinted_THWC if undecided_THW is None else striped(tinted_THWC, undecided_THW[frames])


def _sheet_row(sample: Sample) -> Image.Image:
    """Caption above frames, masks and flow of the middle frame, and references."""
    num_frames = len(sample.video_THWC)
    shown = torch.linspace(0, num_frames - 1, min(NUM_SHEET_FRAMES, num_frames)).round().int()
    tiles = [sample.video_THWC[index] for index in shown.tolist()]
    middle = slice(num_frames // 2, num_frames // 2 + 1)
    if sample.masks_ETHW is not None:
        tiles += [*_drawn_masks(sample, middle)]
    if sample.flow_THWC is not None and num_frames > 1:
        last = min(num_frames // 2, num_frames - 2)
        tiles += [*flow_colors(sample.flow_THWC[last : last + 1])]
    tiles += [reference.image_HWC for reference in sample.references]

    return tile_row(f"{sample.key}: {sample.caption}", tiles)


def tile_row(text: str, tiles: list[Tensor]) -> Image.Image:
    """Pictures `(H, W, 3)` of any sizes beside each other, at one height, below a text."""
    font = ImageFont.load_default(13)
    images = [_tile(tile) for tile in tiles]
    width = max(NARROWEST, sum(image.width + MARGIN for image in images) + MARGIN)
    lines = textwrap.wrap(visible(text), width // 7)
    row = Image.new("RGB", (width, TILE_HEIGHT + 2 * MARGIN + 17 * len(lines)), "white")
    draw = ImageDraw.Draw(row)
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + 17 * number), line, fill="black", font=font)
    left, top = MARGIN, row.height - TILE_HEIGHT - MARGIN
    for image in images:
        row.paste(image, (left, top))
        draw.rectangle((left - 1, top - 1, left + image.width, top + TILE_HEIGHT), outline="gray")
        left += image.width + MARGIN
    return row


def _tile(image_HWC: Tensor) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(image_HWC.numpy()))
    return image.resize((max(1, round(image.width * TILE_HEIGHT / image.height)), TILE_HEIGHT))


def stacked(rows: list[Image.Image]) -> Image.Image:
    """Pictures below each other on white."""
    width, height = max(row.width for row in rows), sum(row.height for row in rows)
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _colors(num: int) -> list[tuple[float, ...]]:
    return [tuple(255 * c for c in colorsys.hsv_to_rgb(k / num, 1.0, 1.0)) for k in range(num)]


def png(image_HWC: Tensor) -> bytes:
    """A picture `(H, W, 3)`, uint8, as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image_HWC.numpy())).save(buffer, "PNG")
    return buffer.getvalue()


def load_data(recipe: str | Path, overrides: list[str] | None = None) -> tuple[DataConfig, Path]:
    """The data settings of a recipe of any kind, and its `output`.

    Raises:
        UserError: as `load_base`.
    """
    mapping = read_recipe(recipe, overrides or [])
    if "stage1" in mapping:
        stage1 = validated(Stage1Config, mapping)
        return stage1.data, user_path(stage1.output)
    base = load_base(recipe, overrides)
    return base.data, user_path(base.output)
