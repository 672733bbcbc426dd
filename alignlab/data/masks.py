"""Entity masks of a clip, from a folder of label images: one per frame of the video.

Shape letters: T frames, H height, W width, E entities.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from alignlab.data.decode import ClipError
from alignlab.data.images import read_labels
from alignlab.data.metadata import Row
from alignlab.data.resize import cover_crop
from alignlab.data.video import DecodedClip

VOID_LABEL = 255  # undecided pixels in DAVIS-style label images


class ClipMasks(NamedTuple):
    """Where the entities of a clip are, and where that is not known.

    Args:
        masks_ETHW: bool, visible pixels of each entity.
        undecided_THW: bool, pixels that are neither an entity's nor background; None where the
            label images have no such pixels.
    """

    masks_ETHW: Tensor
    undecided_THW: Tensor | None


def mask_files(folder: Path) -> list[Path]:
    """The label images that are there."""
    return sorted(folder.glob("*.png"))


def clip_masks(row: Row, clip: DecodedClip, size_HW: tuple[int, int]) -> ClipMasks:
    """Label images of the clip's frames, resized like the clip.

    A resized pixel is undecided if it touches undecided ones, and neither an entity nor the
    background has half of it.

    Raises:
        ClipError: a label image that is missing, unreadable, of another size than the video, or
            with labels beyond the entities.
    """
    labels = torch.arange(1, len(row.entities) + 1)[:, None, None]
    mask_by_frame: dict[int, Tensor] = {}
    undecided_by_frame: dict[int, Tensor] = {}
    for index in set(clip.frame_indices):
        labels_HW = frame_labels(row, index, clip.source_size_HW)
        masks_EHW = (labels_HW == labels).to(torch.uint8) * 255
        mask_by_frame[index] = cover_crop(masks_EHW, size_HW, pixel_aspect=clip.pixel_aspect) >= 128
        if (labels_HW == VOID_LABEL).any():
            sides_2HW = torch.stack([labels_HW == VOID_LABEL, labels_HW == 0]).to(torch.uint8) * 255
            void_HW, background_HW = cover_crop(sides_2HW, size_HW, pixel_aspect=clip.pixel_aspect)
            is_known_HW = mask_by_frame[index].any(0) | (background_HW >= 128)
            undecided_by_frame[index] = (void_HW > 0) & ~is_known_HW
    masks_ETHW = torch.stack([mask_by_frame[index] for index in clip.frame_indices], dim=1)
    if not undecided_by_frame:
        return ClipMasks(masks_ETHW, None)
    none_HW = torch.zeros(size_HW, dtype=torch.bool)
    undecided = [undecided_by_frame.get(index, none_HW) for index in clip.frame_indices]
    return ClipMasks(masks_ETHW, torch.stack(undecided))


def check_masks(row: Row, frame_indices: Iterable[int], source_size_HW: tuple[int, int]) -> None:
    """Reads the label images of frames.

    Raises:
        ClipError: as `clip_masks`; or the folder does not begin with frame 0 but with 1, so that
            every label would be that of the frame before.
    """
    folder = _folder(row)
    if not folder.is_dir():
        raise ClipError(f"there is no masks folder {folder}", kind="bad masks")
    if (folder / _file_name(1)).exists() and not (folder / _file_name(0)).exists():
        raise ClipError(
            f"{folder}: has {_file_name(1)} but no {_file_name(0)}, and frames are counted from 0: "
            "rename the files",
            kind="bad masks",
        )
    for index in sorted(set(frame_indices)):
        frame_labels(row, index, source_size_HW)


def frame_labels(row: Row, index: int, source_size_HW: tuple[int, int]) -> Tensor:
    """The label image of a frame of a row's video, uint8 `(H, W)`.

    Raises:
        ClipError: as `clip_masks`.
    """
    path = _folder(row) / _file_name(index)
    if not path.exists():
        raise ClipError(f"{path}: is missing, the labels of frame {index}", kind="bad masks")
    try:
        labels_HW = read_labels(path)
    except ClipError as error:
        raise ClipError(str(error), kind="bad masks") from error.__cause__
    if labels_HW.shape != source_size_HW:
        size, of_video = ("x".join(map(str, hw)) for hw in (labels_HW.shape, source_size_HW))
        raise ClipError(f"{path}: is {size} (height x width), the video {of_video}", "bad masks")
    labels = labels_HW[labels_HW != VOID_LABEL]
    if labels.numel() and int(labels.max()) > len(row.entities):
        raise ClipError(
            f"{path}: has the label {int(labels.max())}, and the row names {len(row.entities)} "
            "entities",
            kind="bad masks",
        )
    return labels_HW


def _folder(row: Row) -> Path:
    assert row.masks is not None
    return row.masks


def _file_name(index: int) -> str:
    return f"{index:05d}.png"
