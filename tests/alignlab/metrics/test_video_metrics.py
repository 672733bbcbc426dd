"""Flicker and motion amplitude, against numbers and benchmark code worked out by hand."""

from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from alignlab.config.data import ShapesConfig
from alignlab.data.shapes.dataset import ShapesDataset
from alignlab.metrics import motion_amplitude, temporal_flickering


def drifting(dx: float, dy: float, *, frames: int = 5, size: tuple[int, int] = (96, 128)) -> Tensor:
    """A smooth coloured texture that moves by (dx, dy) pixels per frame."""
    yy, xx = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float64)
    clip = []
    for t in range(frames):
        x, y = xx - dx * t, yy - dy * t
        waves = [np.sin(x / 5) * np.cos(y / 7), np.cos(x / 9 + y / 6), np.sin(x / 4 - y / 8)]
        clip.append(np.stack([127.5 + 90 * wave for wave in waves], axis=-1))
    return torch.from_numpy(np.rint(np.stack(clip)).astype(np.uint8))


def test_flicker_by_hand() -> None:
    video = torch.zeros(3, 2, 2, 3, dtype=torch.uint8)
    video[1] = 51  # 51 everywhere, then 102 in half of the picture and 51 in the other
    video[2, 0], video[2, 1] = 153, 0
    # mean differences 51 and (102 + 51) / 2 = 76.5
    assert temporal_flickering(video) == pytest.approx((255 - (51 + 76.5) / 2) / 255)


def test_a_falling_value_flickers_as_much_as_a_rising_one() -> None:
    video = torch.full((2, 4, 4, 3), 200, dtype=torch.uint8)
    video[1] = 10
    assert (
        temporal_flickering(video) == temporal_flickering(video.flip(0)) == pytest.approx(65 / 255)
    )


def test_a_still_picture_neither_flickers_nor_moves() -> None:
    still = drifting(0, 0)
    assert temporal_flickering(still) == 1.0
    # Farneback's flow of two equal frames is not exactly 0
    assert motion_amplitude(still) == pytest.approx(0.0, abs=1e-3)
    grey = torch.full((3, 32, 32, 3), 90, dtype=torch.uint8)
    assert (temporal_flickering(grey), motion_amplitude(grey)) == (1.0, 0.0)


@pytest.mark.parametrize(("dx", "dy"), [(2.0, 0.0), (0.0, -2.0), (1.0, 1.0), (-1.0, -2.0)])
def test_amplitude_is_the_mean_over_both_components(dx: float, dy: float) -> None:
    assert motion_amplitude(drifting(dx, dy)) == pytest.approx(abs(dx + dy) / 2, rel=0.15)


def test_opposite_components_cancel_as_in_the_benchmark() -> None:
    assert motion_amplitude(drifting(2.0, -2.0)) < 0.15


def test_amplitude_step_by_step() -> None:
    """The same with torch and a loop over cells instead of OpenCV's area resize."""
    video = ShapesDataset(ShapesConfig(frames=9, size=(64, 64), references=(2, 3)), "val")[
        0
    ].video_THWC
    # red and blue changed places
    grey = [cv2.cvtColor(f[..., ::-1].copy(), cv2.COLOR_RGB2GRAY) for f in video.numpy()]
    flows = []
    for before, after in pairwise(grey):
        flow = cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 15, 3, 5, 1.2, 0)  # type: ignore[call-overload]
        flows.append(flow.reshape(16, 4, 16, 4, 2).mean((1, 3)))
    expected = abs(np.mean(flows))
    assert motion_amplitude(video) == pytest.approx(expected, rel=1e-5)
    swapped = motion_amplitude(video.flip(-1))
    assert swapped != pytest.approx(motion_amplitude(video), rel=1e-3), "grey weighs the channels"


def test_a_wide_clip_is_brought_to_a_width_of_16() -> None:
    # 100 rows of 130 columns give 12 rows of cells: no error, and the motion survives
    assert motion_amplitude(drifting(2.0, 0.0, size=(100, 130))) == pytest.approx(1.0, rel=0.15)


@pytest.mark.parametrize(
    "video",
    [
        torch.zeros(1, 8, 8, 3, dtype=torch.uint8),
        torch.zeros(3, 8, 8, 3),
        torch.zeros(3, 8, 8, 1, dtype=torch.uint8),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
    ],
)
def test_what_is_no_clip_is_refused(video: Tensor) -> None:
    for measure in (temporal_flickering, motion_amplitude):
        with pytest.raises(ValueError, match="frames"):
            measure(video)
