"""Copy-paste is high where the reference's pixels are, and nowhere else."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alignlab.config.data import ShapesConfig
from alignlab.data.sample import Reference
from alignlab.data.shapes.dataset import ShapesDataset
from alignlab.metrics import copy_paste
from alignlab.metrics.copy_paste import FrameSpectra, _correlation, _template

CLIPS = ShapesDataset(ShapesConfig(frames=5, size=(64, 64), references=(2, 3)), "val")


def pasted(video_THWC: Tensor, reference: Reference, scale: float, at: tuple[int, int]) -> Tensor:
    """The clip with the reference's subject drawn over every frame, at another size and place."""
    layers = torch.cat([reference.image_HWC.permute(2, 0, 1), reference.mask_HW[None] * 255])
    layers = F.interpolate(
        layers[None].float(), scale_factor=scale, antialias=True, mode="bilinear"
    )
    image_hwC, on_hw = layers[0, :3].permute(1, 2, 0).round().byte(), layers[0, 3] > 127
    out = video_THWC.clone()
    for frame in out:
        place = frame[at[0] : at[0] + len(on_hw), at[1] : at[1] + on_hw.shape[1]]
        place[on_hw] = image_hwC[on_hw]
    return out


def value(video_THWC: Tensor, reference: Reference) -> float:
    found = copy_paste(video_THWC, reference.image_HWC, reference.mask_HW)
    assert found is not None
    return found


def test_pasted_pixels_are_found_at_any_size_and_place() -> None:
    for index in range(4):
        sample = CLIPS[index]
        reference = sample.references[0]
        before = value(sample.video_THWC, reference)
        for scale, at in ((1.0, (0, 0)), (0.5, (20, 3)), (0.66, (2, 18))):
            after = value(pasted(sample.video_THWC, reference, scale, at), reference)
            assert after > 0.8, (index, scale)
            assert after > before + 0.05, (index, scale)


def test_the_subject_in_another_pose_is_no_copy() -> None:
    real = [value(CLIPS[i].video_THWC, r) for i in range(12) for r in CLIPS[i].references]
    assert np.mean(real) < 0.75


def test_brightness_and_contrast_of_the_copy_do_not_matter() -> None:
    sample = CLIPS[1]
    clip = pasted(sample.video_THWC, sample.references[0], 0.66, (5, 5))
    paler = (clip.float() * 0.6 + 60).round().byte()
    assert value(paler, sample.references[0]) == pytest.approx(
        value(clip, sample.references[0]), abs=0.02
    )


def test_a_copy_in_half_of_the_frames_counts_half() -> None:
    sample = CLIPS[1]
    still = sample.video_THWC[:1].expand(4, -1, -1, -1)
    copied = pasted(still, sample.references[0], 1.0, (0, 0))
    half = torch.cat([still[:2], copied[2:]])
    ends = [value(clip, sample.references[0]) for clip in (still, copied)]
    assert value(half, sample.references[0]) == pytest.approx(sum(ends) / 2, abs=1e-9)


def test_a_match_is_the_correlation_written_out() -> None:
    """One size, every place, with loops."""
    generator = torch.Generator().manual_seed(3)
    frame = torch.randint(0, 256, (1, 64, 64, 3), generator=generator, dtype=torch.uint8)
    image = torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8)
    # 51 rows of 56 columns: at a longer side of 56 pixels, 0.3 * 1.08^14 of 64, none are mixed
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[10:61, 2:58] = True
    mask[10:20, 2:12] = False
    template, on = image[10:61, 2:58].double(), mask[10:61, 2:58]
    best = -1.0
    for y in range(64 - 51 + 1):
        for x in range(64 - 56 + 1):
            there = frame[0, y : y + 51, x : x + 56].double()[on]
            a, b = template[on] - template[on].mean(0), there - there.mean(0)
            best = max(best, float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()))
    centred = _template(image, mask, 56)
    assert centred is not None
    pixels = frame.permute(0, 3, 1, 2).double().numpy()
    spectra = np.fft.rfft2(pixels), np.fft.rfft2((pixels**2).sum(1))
    subject, on_hw = (part.numpy() for part in centred)
    found = _correlation(FrameSpectra((64, 64), *spectra), subject, on_hw)
    assert found.shape == (1, 14 * 9)
    assert float(found.max()) == pytest.approx(best, abs=1e-9)
    frame[0, 3:54, 4:60][on] = image[10:61, 2:58][on]
    assert copy_paste(frame, image, mask) == pytest.approx(1.0, abs=1e-9)


def test_nothing_to_recognise_is_not_measured() -> None:
    video = CLIPS[0].video_THWC
    image = torch.full((64, 64, 3), 90, dtype=torch.uint8)
    assert copy_paste(video, image, torch.ones(64, 64, dtype=torch.bool)) is None
    assert copy_paste(video, image, torch.zeros(64, 64, dtype=torch.bool)) is None


def test_a_flat_frame_holds_no_copy() -> None:
    reference = CLIPS[0].references[0]
    assert value(torch.full((2, 64, 64, 3), 77, dtype=torch.uint8), reference) == 0.0


def test_a_large_frame_is_shrunk_first() -> None:
    sample = CLIPS[2]
    large = F.interpolate(sample.video_THWC.permute(0, 3, 1, 2).float(), scale_factor=4)
    checkers = 1.0 - 2.0 * ((torch.arange(256)[:, None] + torch.arange(256)) % 2)
    fine = (large * 0.6 + 50 + 45 * checkers).round().byte().permute(0, 2, 3, 1)
    found = value(fine, sample.references[0])
    assert found == pytest.approx(value(sample.video_THWC, sample.references[0]), abs=0.03)
