"""Optical flow of clips whose data set has none: OpenCV's dense inverse search (DIS).

Shape letters: T frames, H height, W width, C channels.
"""

from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor


def dis_flow(video_THWC: Tensor) -> Tensor:
    """Estimates the forward flow between consecutive frames.

    DIS with its medium preset on grey values. MoAlign uses RAFT, whose weights would have to be
    fetched.

    Args:
        video_THWC: uint8 RGB frames.

    Returns:
        float32 `(T-1, H, W, 2)` in pixels per frame, x then y: what is at (x, y) in a frame is at
        (x, y) + flow in the next.
    """
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video_THWC.cpu().numpy()]
    # Any, because its stub knows no call without a first guess
    dis: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # DIS splits frames by threads, which changes its numbers
    try:
        flows = [np.array(dis.calc(before, after, None)) for before, after in pairwise(grey)]
    finally:
        cv2.setNumThreads(threads)
    shape = (0, *video_THWC.shape[1:3], 2)
    return torch.from_numpy(np.stack(flows)) if flows else torch.zeros(shape)
