"""Contrast, colourfulness and mean colour, against numbers worked out by hand."""

import pytest
import torch
from torch import Tensor

from alignlab.config.data import ShapesConfig
from alignlab.data.shapes.dataset import ShapesDataset
from alignlab.metrics import colourfulness, mean_lab, rms_contrast

CLIP = ShapesDataset(ShapesConfig(frames=9, size=(64, 64), references=(2, 3)), "val")[0].video_THWC
LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)


def frame(*pixels: tuple[int, int, int]) -> Tensor:
    return torch.tensor(pixels, dtype=torch.uint8)[None, None]


def mixed_with_grey(video_THWC: Tensor, share: float) -> Tensor:
    grey = (video_THWC.double() @ LUMA)[..., None]
    return (share * video_THWC + (1 - share) * grey).round().byte()


def test_contrast_by_hand() -> None:
    assert rms_contrast(frame((0, 0, 0), (255, 255, 255))) == pytest.approx(0.5)
    assert rms_contrast(frame((90, 90, 90), (90, 90, 90))) == pytest.approx(0.0, abs=1e-12)
    # lumas 0.299, 0.587 and 0.114 of white
    expected = float(LUMA.std(correction=0))
    assert rms_contrast(frame((255, 0, 0), (0, 255, 0), (0, 0, 255))) == pytest.approx(expected)


def test_contrast_is_within_a_frame_not_between_frames() -> None:
    black, white = frame((0, 0, 0), (0, 0, 0)), frame((255, 255, 255), (255, 255, 255))
    half = frame((0, 0, 0), (255, 255, 255))
    assert rms_contrast(torch.cat([black, white])) == 0.0
    assert rms_contrast(torch.cat([black, white, half, half])) == pytest.approx(0.25)


def test_colourfulness_by_hand() -> None:
    # rg 255, -255, 0 and yb 127.5, 127.5, -255: means 0, variances 43350 and 32512.5
    three = frame((255, 0, 0), (0, 255, 0), (0, 0, 255))
    assert colourfulness(three) == pytest.approx((43350 + 32512.5) ** 0.5)
    # one colour has no spread: 0.3 of |(rg, yb)| = |(100, 50)|
    one = frame((100, 0, 0), (100, 0, 0))
    assert colourfulness(one) == pytest.approx(0.3 * (100**2 + 50**2) ** 0.5)
    assert colourfulness(frame((7, 7, 7), (200, 200, 200))) == 0.0
    assert colourfulness(torch.cat([one, 0 * one])) == pytest.approx(colourfulness(one) / 2)


@pytest.mark.parametrize("share", [0.75, 0.5, 0.0])
def test_what_grey_takes_is_what_colourfulness_loses(share: float) -> None:
    pale = mixed_with_grey(CLIP, share)
    assert colourfulness(pale) == pytest.approx(share * colourfulness(CLIP), rel=0.02, abs=0.5)
    assert rms_contrast(pale) == pytest.approx(rms_contrast(CLIP), rel=0.01)


def test_mean_colour() -> None:
    # CIE: red of sRGB is L* 53.24, a* 80.09, b* 67.20 under D65
    red = torch.tensor([53.24, 80.09, 67.20], dtype=torch.float64)
    assert mean_lab(frame((255, 0, 0))) == pytest.approx(red, abs=0.05)
    both = mean_lab(frame((255, 0, 0), (255, 255, 255)))
    white = torch.tensor([100.0, 0.0, 0.0], dtype=torch.float64)
    assert both == pytest.approx((red + white) / 2, abs=0.05)
    assert mean_lab(CLIP.flip(0)) == pytest.approx(mean_lab(CLIP))


@pytest.mark.parametrize("measure", [rms_contrast, colourfulness, mean_lab])
def test_what_is_no_clip_is_refused(measure: object) -> None:
    for video in (torch.zeros(0, 8, 8, 3, dtype=torch.uint8), torch.zeros(3, 8, 8, 3)):
        with pytest.raises(ValueError, match="frames"):
            measure(video)  # type: ignore[operator]
