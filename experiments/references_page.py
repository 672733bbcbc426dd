"""The page of `alignlab data references`: crops beside the frames that they are cut from, and what
was dropped.

Shape letters: H height, W width, C channels (RGB).
"""

import csv
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alignlab.config.data import FolderConfig
from alignlab.data.images import read_image
from alignlab.data.masks import frame_labels
from alignlab.experiments.data_preview import png, stacked, tile_row
from alignlab.experiments.masks_page import (
    ENVIRONMENT,
    HEAD,
    SHEET_CLIPS,
    SHOWN_SIDE,
    TABLE_ROWS,
    counted,
)
from alignlab.experiments.report.escaping import csv_cell
from alignlab.experiments.report.page import data_uri
from alignlab.references.make import ClipReferences, MadeReferences
from alignlab.references.record import MadeReference, ReferenceRecord
from alignlab.references.sights import read_frames
from alignlab.runs.atomic_files import whole_file, write_text
from alignlab.runs.out_paths import out_folder

SHOWN_VERSIONS = 4
DIMMED = 0.3  # of the frame around a subject
JPEG_QUALITY = 85

_PAGE = ENVIRONMENT.from_string(
    HEAD
    + """\
<style>
figure img { height: 176px; border: 1px solid #ddd; }
figcaption { max-width: 20rem; }
</style>
<h1>{{ title }}</h1>
{% for line in summary %}<p>{{ line }}</p>
{% endfor %}<p>Each reference stands beside the frame that it is cut from, in which all but the
subject is dimmed. The share is that of the smallest box around it.</p>
{% if reasons %}<h2>Clips without references</h2><table>
<tr><th>clip</th><th>why</th></tr>
{% for key, reason in reasons %}<tr><td>{{ key }}</td><td>{{ reason }}</td></tr>
{% endfor %}</table>
{% if more_reasons %}<p>and {{ more_reasons }} more (references.csv)</p>{% endif %}
{% endif %}
{% if dropped %}<h2>Subjects that were dropped</h2><table>
<tr><th>clip</th><th>subject</th><th>why</th><th class="n">largest share</th></tr>
{% for row in dropped %}<tr><td>{{ row.key }}</td><td>{{ row.phrase }}</td><td>{{ row.reason }}</td>
<td class="n">{{ "%.1f"|format(100 * row.share) }} %</td></tr>
{% endfor %}</table>
{% if more_dropped %}<p>and {{ more_dropped }} more (references.csv)</p>{% endif %}
{% endif %}
{% for clip in clips %}<article>
<h2>{{ clip.key }}</h2>
<p>{{ clip.caption }}</p>
{% for shown in clip.shown %}<figure>
<img src="{{ shown.frame }}" alt="frame"> <img src="{{ shown.crop }}" alt="reference">
<figcaption>{{ shown.caption }}</figcaption></figure>
{% endfor %}</article>
{% endfor %}</html>
"""
)


@dataclass(frozen=True)
class DroppedRow:
    """A subject without references in the table."""

    key: str
    phrase: str
    reason: str
    share: float


def reference_counts(made: MadeReferences) -> list[str]:
    """Lines: clips, subjects, references; subjects that were dropped and why; clips without any."""
    records = [clip.record for clip in made.clips if clip.record is not None]
    found = [one for record in records for version in record.versions for one in version]
    cross = sum(reference.pair == "cross" for reference in found)
    trained = sum(reference.is_trained for reference in found)
    subjects = sum(record.subjects for record in records)
    kept = subjects - sum(len(record.dropped) for record in records)
    new = sum(clip.is_new for clip in made.clips)
    lines = [
        f"{counted(len(found), 'reference')} ({len(found) - cross:,} regular, {cross:,} cross) of "
        f"{kept:,} of {counted(subjects, 'subject')} in {counted(len(records), 'clip')}, of which "
        f"{new:,} made now; {trained:,} from frames that their clip is trained on"
    ]
    reasons = Counter(subject.reason for record in records for subject in record.dropped)
    if reasons:
        told = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
        lines.append(f"{counted(sum(reasons.values()), 'subject')} dropped: {told}")
    without = [clip for clip in made.clips if clip.record is None]
    if without:
        lines.append(f"{counted(len(without), 'clip')} without masks, or left out")
    return lines


def write_references_page(
    made: MadeReferences, config: FolderConfig, out: Path, *, shown: int
) -> Path:
    """Writes `out/index.html`, `out/sheet.png` and `out/references.csv`.

    Args:
        made: of `make_references`.
        config: of the data set.
        out: folder, made when missing.
        shown: clips on the page, the one with the smallest crop first.

    Returns:
        the page, which needs no other file.

    Raises:
        UserError: `out` cannot be written into.
    """
    with out_folder(out):
        out.mkdir(parents=True, exist_ok=True)
        reasons = [(clip.key, clip.reason) for clip in made.clips if clip.record is None]
        dropped = [
            DroppedRow(clip.key, subject.phrase, subject.reason, subject.share)
            for clip, record in _with_record(made)
            for subject in record.dropped
        ]
        smallest = sorted(
            ((clip, record) for clip, record in _with_record(made) if any(record.versions)),
            key=lambda pair: min(r.share for version in pair[1].versions for r in version),
        )
        by_key = {clip.key: clip for clip in made.clips}
        entries, rows = [], []
        for number, (clip, record) in enumerate(smallest[: max(shown, 0)]):
            pictures = _pictures(clip, record, by_key)
            entries.append(_entry(clip, pictures))
            if number < SHEET_CLIPS:
                rows.append(_sheet_row(clip, pictures))
        write_text(out / "references.csv", _csv(made, reasons))
        if rows:
            with whole_file(out / "sheet.png") as partial:
                stacked(rows).save(partial)
        page = out / "index.html"
        values = {
            "title": f"References of {config.path}",
            "summary": reference_counts(made),
            "reasons": reasons[:TABLE_ROWS],
            "more_reasons": max(0, len(reasons) - TABLE_ROWS),
            "dropped": dropped[:TABLE_ROWS],
            "more_dropped": max(0, len(dropped) - TABLE_ROWS),
            "clips": entries,
        }
        write_text(page, _PAGE.render(**values))
    return page


def dimmed_around(frame_HWC: Tensor, mask_HW: Tensor) -> Tensor:
    """A frame, uint8, in which all but the subject is dark."""
    dark_HWC = (frame_HWC.float() * DIMMED).round().to(torch.uint8)
    return torch.where(mask_HW[..., None], frame_HWC, dark_HWC)


@dataclass(frozen=True)
class _Picture:
    """A reference, and the frame that it is cut from."""

    made: MadeReference
    frame_HWC: Tensor
    crop_HWC: Tensor


def _with_record(made: MadeReferences) -> list[tuple[ClipReferences, ReferenceRecord]]:
    return [(clip, clip.record) for clip in made.clips if clip.record is not None]


def _pictures(
    clip: ClipReferences, record: ReferenceRecord, by_key: dict[str, ClipReferences]
) -> list[_Picture]:
    """The references of a clip's first versions, by subject."""
    assert clip.folder is not None
    references = [made for version in record.versions[:SHOWN_VERSIONS] for made in version]
    references.sort(key=lambda made: made.label)  # stable: versions stay in their order
    pictures = []
    for made in references:
        source = by_key[made.clip].row
        frame = torch.from_numpy(read_frames(source, {made.frame})[made.frame][0])
        labels_HW = frame_labels(source, made.frame, (frame.shape[0], frame.shape[1]))
        dimmed_HWC = dimmed_around(frame, labels_HW == made.source_label)
        step = max(1, -(-max(labels_HW.shape) // SHOWN_SIDE))
        crop_HWC, _ = read_image(clip.folder / made.file)
        step_of_crop = max(1, -(-max(crop_HWC.shape) // SHOWN_SIDE))
        crop_HWC = crop_HWC[::step_of_crop, ::step_of_crop]
        pictures.append(_Picture(made, dimmed_HWC[::step, ::step], crop_HWC))
    return pictures


def _entry(clip: ClipReferences, pictures: list[_Picture]) -> dict[str, object]:
    shown = []
    for picture in pictures:
        made = picture.made
        whence = f"frame {made.frame}" + (f" of {made.clip}" if made.pair == "cross" else "")
        trained = ", which the clip is trained on" if made.is_trained else ""
        changed = ", augmented" if made.changes else ""
        shown.append(
            {
                "frame": data_uri(_jpeg(picture.frame_HWC), "image/jpeg"),
                "crop": data_uri(png(picture.crop_HWC), "image/png"),
                "caption": f"{made.phrase} ({made.pair}): {whence}{trained}{changed}, "
                f"{100 * made.share:.0f}\N{NO-BREAK SPACE}%",
            }
        )
    return {"key": clip.key, "caption": clip.row.caption, "shown": shown}


def _sheet_row(clip: ClipReferences, pictures: list[_Picture]) -> Image.Image:
    shares = ", ".join(f"{p.made.phrase} {100 * p.made.share:.0f} %" for p in pictures)
    tiles = [tile for p in pictures for tile in (p.frame_HWC, p.crop_HWC)]
    return tile_row(f"{clip.key}: {shares}", tiles)


def _jpeg(frame_HWC: Tensor) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(frame_HWC.numpy()))
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _csv(made: MadeReferences, reasons: list[tuple[str, str]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    columns = ("clip", "version", "subject", "name", "pair", "from", "frame", "trained", "share")
    writer.writerow([*columns, "file", "why none"])

    def write(*cells: object) -> None:
        writer.writerow([csv_cell(cell) for cell in cells])

    for clip, record in _with_record(made):
        for number, version in enumerate(record.versions):
            for r in version:
                whence = (r.clip, r.frame, int(r.is_trained), r.share)
                write(clip.key, number, r.phrase, r.name, r.pair, *whence, r.file, "")
        for subject in record.dropped:
            write(clip.key, "", subject.phrase, *[""] * 5, subject.share, "", subject.reason)
    for key, reason in reasons:
        write(key, *[""] * 9, reason)
    return buffer.getvalue()
