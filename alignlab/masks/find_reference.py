"""Where a reference image is in a frame: the subject's pixels, moved and scaled over it.

Normalised correlation of the colours under the subject's mask (OpenCV's template matching), at a
ladder of scales. It finds what looks nearly as it does in the reference: a crop of another frame of
the same shot, not another pose.
Array letters: H height, W width, C channels (RGB).
"""

from typing import NamedTuple

import cv2
import numpy as np

from alignlab.masks.segmenter import Frame, Mask, box_of

SCALES = tuple(1.15**power for power in range(-10, 6))
SMALLEST_SIDE = 8  # pixels of a template
WORK_SIDE = 256  # frames are searched with this longer side


class Found(NamedTuple):
    """A place in a frame.

    Args:
        box: left, top, right, bottom in its pixels.
        score: normalised correlation, at most 1.
    """

    box: tuple[float, float, float, float]
    score: float


def find_reference(frame_HWC: Frame, image_HWC: Frame, mask_HW: Mask | None) -> Found | None:
    """The best place of a reference in a frame; None where no scale of it fits in.

    Args:
        frame_HWC: RGB.
        image_HWC: RGB, of any size. Scales are tried around the size that it has in its file.
        mask_HW: the subject's pixels; None: all.
    """
    mask_HW = np.ones(image_HWC.shape[:2], np.bool_) if mask_HW is None else mask_HW
    box = box_of(mask_HW)
    if box is None:
        return None
    left, top, right, bottom = box
    subject_HWC, alpha_HW = image_HWC[top:bottom, left:right], mask_HW[top:bottom, left:right]
    to_work = WORK_SIDE / max(frame_HWC.shape[:2])
    work_HWC = _resized(frame_HWC, to_work)
    # a crop may come from a video of another size: begin at what fits
    fits = min(n / m for n, m in zip(work_HWC.shape[:2], subject_HWC.shape[:2], strict=True))
    best: Found | None = None
    for scale in SCALES:
        ratio = min(to_work, fits) * scale
        template_HWC = _resized(subject_HWC, ratio)
        height, width = template_HWC.shape[:2]
        if min(height, width) < SMALLEST_SIDE or height > work_HWC.shape[0]:
            continue
        if width > work_HWC.shape[1]:
            continue
        seen_HW = cv2.resize(alpha_HW.astype(np.float32), (width, height))
        scores = cv2.matchTemplate(
            work_HWC, template_HWC, cv2.TM_CCOEFF_NORMED, mask=(seen_HW > 0.5).astype(np.uint8)
        )
        scores[~np.isfinite(scores) | (scores > 1.001)] = -1.0  # of places of one colour
        y, x = np.unravel_index(int(scores.argmax()), scores.shape)
        score = float(scores[y, x])
        if best is None or score > best.score:
            place = (x, y, x + width, y + height)
            best = Found(tuple(float(n) / to_work for n in place), score)
    return best


def _resized(image_HWC: Frame, scale: float) -> Frame:
    height, width = (max(1, round(n * scale)) for n in image_HWC.shape[:2])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image_HWC, (width, height), interpolation=how), np.uint8)
