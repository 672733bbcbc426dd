"""Where entities are seen in the label images of a clip, and the frames that show them.

Array letters: H height, W width, C channels (RGB).
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from alignlab.data.decode import ClipError, decoded_frames, upright
from alignlab.data.masks import frame_labels, mask_files
from alignlab.data.metadata import Row
from alignlab.masks.segmenter import Frame, box_of

WHOLE = 0.5
"""An entity counts as well seen where its mask has at least this share of the pixels that it has in
the frame that shows most of it. Ours: elsewhere it is mostly hidden or outside."""


@dataclass(frozen=True)
class Sight:
    """An entity in a frame.

    Args:
        frame: index in the video.
        label: of the entity.
        box: left, top, right, bottom of the smallest box around its mask.
        pixels: of its mask.
        share: of the frame that the box has.
    """

    frame: int
    label: int
    box: tuple[int, int, int, int]
    pixels: int
    share: float


def sights_of(row: Row, size_HW: tuple[int, int]) -> dict[int, list[Sight]]:
    """All sights of each entity of a row with masks, by label, in the order of frames.

    Only pixels that are the entity's count: undecided ones (255) are never part of one.

    Args:
        row: of the metadata.
        size_HW: of the video's frames.

    Raises:
        ClipError: as `frame_labels`; or there is no label image.
    """
    assert row.masks is not None
    files = mask_files(row.masks)
    if not files:
        raise ClipError(f"{row.masks}: has no label images", "bad masks")
    seen: dict[int, list[Sight]] = {number + 1: [] for number in range(len(row.entities))}
    for path in files:
        if not (path.stem.isascii() and path.stem.isdigit()):
            continue
        labels_HW = frame_labels(row, int(path.stem), size_HW).numpy()
        for label in seen:
            mask_HW = labels_HW == label
            box = box_of(mask_HW)
            if box is None:
                continue
            area = (box[2] - box[0]) * (box[3] - box[1])
            pixels = int(mask_HW.sum())
            seen[label].append(Sight(int(path.stem), label, box, pixels, area / labels_HW.size))
    return seen


def well_seen(sights: list[Sight], min_share: float) -> list[Sight]:
    """The sights that a reference may be cut from.

    Args:
        sights: of one entity.
        min_share: of the frame that its box has at least.
    """
    large = [sight for sight in sights if sight.share >= min_share]
    most = max((sight.pixels for sight in large), default=0)
    return [sight for sight in large if sight.pixels >= WHOLE * most]


def read_frames(row: Row, indices: Collection[int]) -> dict[int, tuple[Frame, float]]:
    """Frames of a row's video by their indices, each with its pixel aspect.

    Raises:
        ClipError: as `decoded_frames`; a frame is damaged or not there.
    """
    frames: dict[int, tuple[Frame, float]] = {}
    reformatter = VideoReformatter()
    if not indices:
        return frames
    for index, timed in enumerate(decoded_frames(row.video)):
        if index in indices:
            if timed.is_damaged:
                raise ClipError(f"{row.video}: is damaged at {timed.time_s:.2f} s", kind="damaged")
            frame_HWC, pixel_aspect = upright(timed, reformatter)
            frames[index] = (frame_HWC.numpy(), pixel_aspect)
        if len(frames) == len(indices):
            return frames
    missing = min(set(indices) - set(frames))
    raise ClipError(f"{row.video}: has no frame {missing}, and masks of it", kind="bad masks")


def cut_out(frame_HWC: Frame, labels_HW: NDArray[np.uint8], sight: Sight) -> NDArray[np.uint8]:
    """The smallest box around an entity as RGBA: white and transparent where it is not.

    Args:
        frame_HWC: of the video.
        labels_HW: its label image.
        sight: of the entity in it.
    """
    left, top, right, bottom = sight.box
    mask_HW = labels_HW[top:bottom, left:right] == sight.label
    whitened_HWC = np.where(mask_HW[..., None], frame_HWC[top:bottom, left:right], 255)
    alpha_HW1 = np.where(mask_HW, 255, 0)[..., None]
    return np.concatenate([whitened_HWC, alpha_HW1], axis=2).astype(np.uint8)
