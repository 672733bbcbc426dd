"""Contrast and colour of one clip, by published formulas.

Shape letters: T frames, H height, W width, C channels (RGB).
"""

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignlab.metrics.video import rgb_frames

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, of gamma-coded RGB


def rms_contrast(video_THWC: Tensor) -> float:
    """RMS contrast: standard deviation of the luma of a frame's pixels, mean over frames.

    Luma is scaled to [0, 1], so that half black and half white gives 0.5, the most there is. Peli,
    "Contrast in complex images", JOSA A 7(10), 1990; the deviation is the population's.

    Args:
        video_THWC: uint8 frames, at least one.

    Raises:
        ValueError: not such frames.
    """
    # frame by frame: a long clip in float64 is gigabytes
    return float(np.mean([(f / 255.0 @ np.array(LUMA)).std() for f in rgb_frames(video_THWC, 1)]))


def colourfulness(video_THWC: Tensor) -> float:
    """Hasler and Suesstrunk's colourfulness M^(3) of a frame, mean over frames.

    With rg = R - G and yb = (R + G) / 2 - B of 8-bit values, sqrt(std(rg)^2 + std(yb)^2) + 0.3
    sqrt(mean(rg)^2 + mean(yb)^2). Grey is 0; their observers call 15 slightly, 45 averagely and 109
    extremely colourful. Mixing a clip with its own grey scales it by just the share of colour that
    is left. "Measuring colourfulness in natural images", Human Vision and Electronic Imaging VIII,
    2003. The differences keep their sign, as in the paper; a widespread script drops it.

    Args:
        video_THWC: uint8 RGB frames, at least one.

    Raises:
        ValueError: not such frames.
    """
    return float(np.mean([_colourfulness(frame) for frame in rgb_frames(video_THWC, 1)]))


def mean_lab(video_THWC: Tensor) -> Tensor:
    """Mean CIELAB colour (L*, a*, b*; sRGB, D65) of all pixels of all frames, float64 `(3,)`.

    The distance of two such colours is CIE 1976's difference; about 2.3 is just noticeable between
    patches side by side (Mahy et al., Color Research & Application 19(2), 1994).

    Raises:
        ValueError: not uint8 RGB frames.
    """
    means = [_lab(frame).mean((0, 1)) for frame in rgb_frames(video_THWC, 1)]
    return torch.from_numpy(np.mean(means, axis=0))


def _colourfulness(frame_HWC: NDArray[np.uint8]) -> float:
    red, green, blue = np.moveaxis(frame_HWC.astype(np.float64), -1, 0)
    opponents_2HW = np.stack([red - green, (red + green) / 2 - blue])
    spread, offset = opponents_2HW.std((1, 2)), opponents_2HW.mean((1, 2))
    return float(np.hypot(*spread) + 0.3 * np.hypot(*offset))


def _lab(frame_HWC: NDArray[np.uint8]) -> NDArray[np.float64]:
    scaled = frame_HWC.astype(np.float32) / np.float32(255)
    return cv2.cvtColor(scaled, cv2.COLOR_RGB2LAB).astype(np.float64)
