"""`folder`: clips, captions and reference images listed by a metadata file.

The columns are described in `alignlab.data.metadata`.
Shape letters: T frames, H height, W width, C channels (RGB), E entities.
"""

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from alignlab.config.data import FolderConfig
from alignlab.config.paths import user_path
from alignlab.data.metadata import Row, misnamed_columns, read_rows
from alignlab.data.resize import cover_crop, fit_reference
from alignlab.data.sample import Reference, Sample
from alignlab.data.split import Split, deal
from alignlab.data.video import (
    ClipError,
    DecodedClip,
    decode_clip,
    probe_clip,
    probe_image,
    read_image,
    read_labels,
)
from alignlab.errors import UserError

PROBE_THREADS = 8
VOID_LABEL = 255  # undecided pixels in DAVIS-style label images

log = logging.getLogger(__name__)


class FolderDataset:
    """Clips of a folder; which rows are in and at which index is settled at construction.

    Args:
        config: see `alignlab.config.data.FolderConfig`.
        split: which rows are in it says `alignlab.data.split.deal`.

    Raises:
        ClipError: with `on_bad_video: error`, a clip that is unreadable, too short, or short of
            references. With `skip` such clips are left out and counted in one warning.
        UserError: bad metadata, or nothing left in the split.
    """

    def __init__(self, config: FolderConfig, split: Split) -> None:
        self.config = config
        self.split = split
        root = user_path(config.path)
        if not root.is_dir():
            raise UserError(f"data.path: there is no folder {root}")
        rows = read_rows(root, config.metadata, follow_links=config.follow_links)
        if split == "train":  # once for each data set
            for name, column in misnamed_columns(rows).items():
                log.warning(
                    "%s: nothing reads the column %r; did you mean %r?",
                    *(root / config.metadata, name, column),
                )
        dealt = zip(rows, deal(rows, root, config.val_fraction), strict=True)
        in_split = [row for row, dealt_to in dealt if dealt_to == split]
        self._rows = self._usable(in_split)
        self._keys = _unique_keys(self._rows)
        if not self._rows:
            raise UserError(
                f"{root}: no clip left in the {split} split ({len(in_split)} of {len(rows)} rows "
                f"are dealt to it); add clips or change data.val_fraction"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        row = self._rows[index]
        clip = decode_clip(
            row.video,
            frames=self.config.frames,
            fps=self.config.fps,
            size_HW=self.config.size,
            start_s=row.start_s,
            seek=row.masks is None,
        )
        return Sample(
            key=self._keys[index],
            video_THWC=clip.video_THWC,
            caption=row.caption,
            references=self._references(row),
            entities=row.entities,
            masks_ETHW=None if row.masks is None else _masks(row, clip, self.config.size),
        )

    def without_masks(self) -> str | None:
        """Key of the first clip whose entity masks are unknown; None if there is no such clip."""
        rows = zip(self._keys, self._rows, strict=True)
        return next((key for key, row in rows if row.masks is None), None)

    def share_with_references(self) -> float:
        """Share of the clips whose row lists a reference."""
        return sum(bool(row.references) for row in self._rows) / len(self._rows)

    def _usable(self, rows: list[Row]) -> list[Row]:
        with ThreadPoolExecutor(PROBE_THREADS) as pool:
            errors = list(pool.map(self._error_of, rows))
        bad = [error for error in errors if error is not None]
        if bad and self.config.on_bad_video == "error":
            raise ClipError(f"{bad[0]}; data.on_bad_video=skip leaves such clips out", bad[0].kind)
        if bad:
            kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(e.kind for e in bad).items())
            log.warning(
                "%s: %d of %d clips of the %s split skipped: %s; first: %s",
                *(self.config.path, len(bad), len(rows), self.split, kinds, bad[0]),
            )
        return [row for row, error in zip(rows, errors, strict=True) if error is None]

    def _error_of(self, row: Row) -> ClipError | None:
        fewest = self.config.references[0]
        try:
            probe_clip(
                row.video, frames=self.config.frames, fps=self.config.fps, start_s=row.start_s
            )
            if len(row.references) < fewest:
                raise ClipError(
                    f"{row.where}: has {len(row.references)} references, data.references asks "
                    f"for at least {fewest}",
                    kind="short of references",
                )
            for path in row.references:
                probe_image(path)
            if row.masks is not None and not row.masks.is_dir():
                raise ClipError(f"{row.where}: there is no masks folder {row.masks}")
        except ClipError as error:
            return error
        return None

    def _references(self, row: Row) -> tuple[Reference, ...]:
        most = self.config.references[1]
        images = [read_image(path) for path in row.references] if most else []
        places = list(range(len(images)))
        if len(places) > most:
            # the largest crops, largest first, as in RefAlign's code; of equal ones the first
            places.sort(key=lambda place: _crop_area(*images[place]), reverse=True)
        references = []
        for place in places[:most]:
            image_HWC, mask_HW = fit_reference(*images[place], self.config.size)
            name, phrase = row.reference_names[place], row.reference_phrases[place]
            references.append(Reference(image_HWC, mask_HW, name, phrase))
        return tuple(references)


def _crop_area(image_HWC: Tensor, mask_HW: Tensor | None) -> int:
    """Pixels of the smallest box around the subject, in the image as it lies in its file."""
    if mask_HW is None:
        return image_HWC.shape[0] * image_HWC.shape[1]
    rows, columns = mask_HW.any(1).nonzero(), mask_HW.any(0).nonzero()
    if not len(rows):
        return 0
    return int((rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1))


def _unique_keys(rows: list[Row]) -> list[str]:
    """`file_name`, with `@start` for later clips of a video and `#n` for a repeated clip."""
    seen: Counter[str] = Counter()
    keys = []
    for row in rows:
        key = f"{row.file_name}@{row.start_s:g}" if row.start_s else row.file_name
        seen[key] += 1
        keys.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
    return keys


def _masks(row: Row, clip: DecodedClip, size_HW: tuple[int, int]) -> Tensor:
    """Label images of the clip's frames as bool `(E, T, H, W)`, resized like the clip."""
    assert row.masks is not None
    labels = torch.arange(1, len(row.entities) + 1)[:, None, None]
    mask_by_frame: dict[int, Tensor] = {}
    for index in set(clip.frame_indices):
        path = row.masks / f"{index:05d}.png"
        labels_HW = read_labels(path)
        if labels_HW.shape != clip.source_size_HW:
            raise ClipError(f"{path}: is {tuple(labels_HW.shape)}, the video {clip.source_size_HW}")
        known_HW = (labels_HW <= len(row.entities)) | (labels_HW == VOID_LABEL)
        if not known_HW.all():
            raise ClipError(f"{path}: has labels beyond the {len(row.entities)} entities")
        masks_EHW = (labels_HW == labels).to(torch.uint8) * 255
        mask_by_frame[index] = cover_crop(masks_EHW, size_HW, pixel_aspect=clip.pixel_aspect) >= 128
    return torch.stack([mask_by_frame[index] for index in clip.frame_indices], dim=1)
