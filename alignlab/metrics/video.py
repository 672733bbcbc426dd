"""Flicker and amount of motion of one clip, by the formulas of two public benchmarks.

Shape letters: T frames, H height, W width, C channels (RGB).
"""

from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FARNEBACK: dict[str, Any] = {
    "pyr_scale": 0.5,
    "levels": 3,
    "winsize": 15,
    "iterations": 3,
    "poly_n": 5,
    "poly_sigma": 1.2,
    "flags": 0,
}
FLOW_WIDTH = 16


def temporal_flickering(video_THWC: Tensor) -> float:
    """VBench's temporal flickering score, `(255 - mean |frame - next frame|) / 255`, in [0, 1].

    The mean is over pixels and channels, then over frame pairs. 1 is a still picture. VBench asks
    for it on prompts of still scenes; where things should move, motion lowers it as flicker does.

    Args:
        video_THWC: uint8 frames, at least two.

    Raises:
        ValueError: not such frames.
    """
    frames = pairwise(rgb_frames(video_THWC, 2))
    steps = [float(np.abs(after.astype(np.float32) - before).mean()) for before, after in frames]
    return (255.0 - float(np.mean(steps))) / 255.0


def motion_amplitude(video_THWC: Tensor) -> float:
    """OpenS2V-Eval's motion amplitude (v1.1, `motion_fb`): |mean flow|, in pixels per frame.

    Farneback's flow of every frame pair, brought to a width of 16 by area, then the absolute value
    of the mean over time, space and both components. It is the mean that is taken: movements in
    opposite directions, also of x against y, cancel. The benchmark clips it to [0, 1]; this
    function does not. Its grey values weigh red as blue and blue as red, because its code reads
    RGB frames as BGR; so do these.

    Args:
        video_THWC: uint8 RGB frames, at least two.

    Raises:
        ValueError: not such frames.
    """
    flows = []
    for before, after in pairwise(rgb_frames(video_THWC, 2)):
        grey = [cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in (before, after)]
        # Any, because its stub knows no call without a first guess
        farneback: Any = cv2.calcOpticalFlowFarneback
        flow_HW2 = farneback(grey[0], grey[1], None, **FARNEBACK)
        height, width = flow_HW2.shape[:2]
        size = (FLOW_WIDTH, max(1, int(height * (FLOW_WIDTH / width))))
        flows.append(cv2.resize(flow_HW2, size, interpolation=cv2.INTER_AREA))
    return abs(float(np.mean(np.mean(np.array(flows), axis=0))))


def rgb_frames(video_THWC: Tensor, at_least: int) -> NDArray[np.uint8]:
    """The frames for numpy and OpenCV.

    Raises:
        ValueError: they are not uint8 RGB, or fewer than `at_least`.
    """
    if video_THWC.ndim != 4 or video_THWC.shape[-1] != 3 or len(video_THWC) < at_least:
        expected = f"at least {at_least} RGB frames (T, H, W, 3)"
        raise ValueError(f"expected {expected}, got {tuple(video_THWC.shape)}")
    if video_THWC.dtype != torch.uint8:
        raise ValueError(f"expected uint8 frames, got {video_THWC.dtype}")
    frames: NDArray[np.uint8] = video_THWC.cpu().numpy()
    return frames
