"""The page of `alignlab data masks`: what was made, how sure it is, and how it looks.

Shape letters: T frames, H height, W width, C channels (RGB), E entities.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from PIL import Image
from torch import Tensor

from alignlab.config.data import FolderConfig
from alignlab.data.images import read_labels
from alignlab.data.masks import VOID_LABEL
from alignlab.data.video import encode_mp4
from alignlab.experiments.data_preview import (
    NUM_SHEET_FRAMES,
    overlay_masks,
    stacked,
    striped,
    tile_row,
)
from alignlab.experiments.report.escaping import csv_cell, visible
from alignlab.experiments.report.page import data_uri
from alignlab.masks.files import MaskRecord
from alignlab.masks.make import ClipMasks, MadeMasks, clip_frames
from alignlab.runs.atomic_files import whole_file, write_text
from alignlab.runs.out_paths import out_folder

TABLE_ROWS = 200
SHOWN_SIDE = 320  # of a clip on the page
SHEET_CLIPS = 40

ENVIRONMENT = jinja2.Environment(
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=lambda value: visible(value) if type(value) is str else value,
)
HEAD = """\
<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; color: #222; }
article { border-top: 1px solid #ccc; padding: 1rem 0; }
figure { display: inline-block; margin: 0 1rem .5rem 0; vertical-align: top; }
figcaption { font-size: 13px; color: #555; }
video { height: 256px; border: 1px solid #ddd; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.swatch { display: inline-block; width: .8em; height: .8em; border: 1px solid #888; }
</style>
"""
"""Templates of pages about clips, and how each of them begins."""

_PAGE = ENVIRONMENT.from_string(
    HEAD
    + """\
<h1>{{ title }}</h1>
<p>{{ summary }}</p>
<p>An entity is in doubt in a frame where its confidence is below {{ least }}. All pixels of that
frame that no other entity has are then undecided (255), and striped here.</p>
{% if reasons %}<h2>Clips without masks</h2><table>
<tr><th>clip</th><th>why</th></tr>
{% for key, reason in reasons %}<tr><td>{{ key }}</td><td>{{ reason }}</td></tr>
{% endfor %}</table>{% if more_reasons %}<p>and {{ more_reasons }} more (masks.csv)</p>{% endif %}
{% endif %}
<h2>Entities, least sure first</h2><table>
<tr><th>clip</th><th>entity</th><th class="n">frames</th><th class="n">in doubt</th>
<th class="n">lowest confidence</th><th class="n">mean area where sure</th></tr>
{% for row in rows %}<tr><td>{{ row.key }}</td><td>{{ row.entity }}</td>
<td class="n">{{ row.frames }}</td><td class="n">{{ row.doubtful }}</td>
<td class="n">{{ "%.2f"|format(row.lowest) }}</td>
<td class="n">{{ "%.1f"|format(100 * row.share) }} %</td></tr>
{% endfor %}</table>
{% if more_rows %}<p>and {{ more_rows }} more (masks.csv)</p>{% endif %}
{% for clip in clips %}<article>
<h2>{{ clip.key }}</h2>
<p>{{ clip.caption }}</p>
<p>{% for colour, entity in clip.legend %}<span class="swatch" style="background: {{ colour }}">
</span> {{ entity }} &nbsp; {% endfor %}</p>
{% for name, source in clip.videos %}<figure>
<video src="{{ source }}" autoplay loop muted playsinline></video>
<figcaption>{{ name }}</figcaption></figure>
{% endfor %}</article>
{% endfor %}</html>
"""
)


@dataclass(frozen=True)
class EntityRow:
    """An entity of a clip in the table."""

    key: str
    entity: str
    frames: int
    doubtful: int
    lowest: float
    share: float


def mask_sizes(made: MadeMasks, *, with_new: bool = True) -> str:
    """One line: clips, entities, frames, and what is undecided.

    Args:
        made: of `make_masks`.
        with_new: also how many were made now, which a page does not depend on.
    """
    records = [clip.record for clip in made.clips if clip.record is not None]
    own = sum(clip.folder is not None and clip.record is None for clip in made.clips)
    without = sum(clip.folder is None for clip in made.clips)
    frames, undecided = sum(r.frames for r in records), sum(r.undecided for r in records)
    new = sum(clip.is_new for clip in made.clips)
    entities = sum(len(record.entities) for record in records)
    text = f"{counted(len(records), 'clip')} with {counted(entities, 'entity', 'entities')}"
    if with_new:
        text += f", {new:,} made now"
    text += f"; {undecided:,} of {counted(frames, 'frame')} with undecided pixels"
    if own:
        text += f"; {counted(own, 'clip')} with masks of other origin"
    if without:
        text += f"; {counted(without, 'clip')} without masks"
    return text


def counted(number: int, one: str, more: str = "") -> str:
    """A number with its noun."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def write_masks_page(made: MadeMasks, config: FolderConfig, out: Path, *, shown: int) -> Path:
    """Writes `out/index.html`, `out/sheet.png` and `out/masks.csv`.

    Args:
        made: of `make_masks`.
        config: of the data set.
        out: folder, made when missing.
        shown: clips that are played on the page, least sure first.

    Returns:
        the page, which needs no other file.

    Raises:
        UserError: `out` cannot be written into.
    """
    with out_folder(out):
        out.mkdir(parents=True, exist_ok=True)
        clips = [(clip, clip.record) for clip in made.clips if clip.record is not None]
        clips.sort(key=lambda pair: min(map(min, pair[1].confidence)))
        rows = sorted(
            (row for clip, record in clips for row in _rows(clip, record)),
            key=lambda row: (row.lowest, row.key),
        )
        reasons = [(clip.key, clip.reason) for clip in made.clips if clip.folder is None]
        entries, tiles = [], []
        for number, (clip, record) in enumerate(clips[: max(shown, 0)]):
            video_THWC, labels_THW = _shown_clip(clip, record, config)
            entries.append(_entry(clip, record, config, video_THWC, labels_THW))
            if number < SHEET_CLIPS:
                tiles.append(_sheet_row(clip, record, video_THWC, labels_THW))
        write_text(out / "masks.csv", _csv(rows, reasons))
        if tiles:
            with whole_file(out / "sheet.png") as partial:
                stacked(tiles).save(partial)
        page = out / "index.html"
        least = sorted({record.request["min_confidence"] for _, record in clips})
        values = {
            "title": f"Masks of {config.path}",
            "summary": mask_sizes(made, with_new=False),
            "least": " or ".join(map(str, least)) or "the limit",
            "reasons": reasons[:TABLE_ROWS],
            "more_reasons": max(0, len(reasons) - TABLE_ROWS),
            "rows": rows[:TABLE_ROWS],
            "more_rows": max(0, len(rows) - TABLE_ROWS),
            "clips": entries,
        }
        write_text(page, _PAGE.render(**values))
    return page


def _rows(clip: ClipMasks, record: MaskRecord) -> list[EntityRow]:
    return [
        EntityRow(
            clip.key,
            entity,
            record.frames,
            record.doubtful(number),
            min(record.confidence[number]),
            record.shares[number],
        )
        for number, entity in enumerate(record.entities)
    ]


def _shown_clip(clip: ClipMasks, record: MaskRecord, config: FolderConfig) -> tuple[Tensor, Tensor]:
    """Frames at most `SHOWN_SIDE` wide and high, with their labels."""
    assert clip.folder is not None
    first, frames = clip_frames(clip.row, config)
    video, labels = [], []
    for number, frame_HWC in enumerate(frames):
        labels_HW = read_labels(clip.folder / f"{first + number:05d}.png")
        step = max(1, -(-max(labels_HW.shape) // SHOWN_SIDE))
        # 4:2:0 wants even sides
        height, width = (side // step // 2 * 2 for side in labels_HW.shape)
        video.append(torch.from_numpy(frame_HWC)[::step, ::step][:height, :width])
        labels.append(labels_HW[::step, ::step][:height, :width])
    return torch.stack(video), torch.stack(labels)


def _drawn(video_THWC: Tensor, labels_THW: Tensor, entities: int) -> Tensor:
    masks_ETHW = labels_THW == torch.arange(1, entities + 1)[:, None, None, None]
    return striped(overlay_masks(video_THWC, masks_ETHW), labels_THW == VOID_LABEL)


def _entry(
    clip: ClipMasks,
    record: MaskRecord,
    config: FolderConfig,
    video_THWC: Tensor,
    labels_THW: Tensor,
) -> dict[str, object]:
    drawn_THWC = _drawn(video_THWC, labels_THW, len(record.entities))
    fps = len(video_THWC) / max(config.frames / config.fps, 1e-3)
    videos = (("clip", video_THWC), ("masks", drawn_THWC))
    colours = [
        f"hsl({360 * k / len(record.entities):.0f} 100% 50%)" for k in range(len(record.entities))
    ]
    return {
        "key": clip.key,
        "caption": clip.row.caption,
        "legend": list(zip(colours, record.entities, strict=True)),
        "videos": [(name, data_uri(encode_mp4(clip_, fps), "video/mp4")) for name, clip_ in videos],
    }


def _sheet_row(
    clip: ClipMasks, record: MaskRecord, video_THWC: Tensor, labels_THW: Tensor
) -> Image.Image:
    """The clip's name and entities above frames with their masks."""
    chosen = torch.linspace(0, len(video_THWC) - 1, min(NUM_SHEET_FRAMES, len(video_THWC)))
    places = chosen.round().long()
    drawn_THWC = _drawn(video_THWC[places], labels_THW[places], len(record.entities))
    lowest = ", ".join(
        f"{entity} {min(values):.2f}"
        for entity, values in zip(record.entities, record.confidence, strict=True)
    )
    return tile_row(f"{clip.key}: {lowest}", list(drawn_THWC))


def _csv(rows: list[EntityRow], reasons: list[tuple[str, str]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["clip", "entity", "frames", "in doubt", "lowest confidence", "area", "why none"]
    )
    for row in rows:
        cells = (row.key, row.entity, row.frames, row.doubtful, row.lowest, row.share, "")
        writer.writerow([csv_cell(cell) for cell in cells])
    for key, reason in reasons:
        writer.writerow([csv_cell(cell) for cell in (key, "", "", "", "", "", reason)])
    return buffer.getvalue()
