"""What Stage 1 learns from: optical flow on the token grid, masks, intersection over union."""

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from alignlab.config.data import ShapesConfig
from alignlab.data.shapes.dataset import ShapesDataset
from alignlab.stage1.moalign import dis_flow, flow_on_grid
from alignlab.stage1.sara import mask_iou


def texture(height: int, width: int) -> Tensor:
    """A smooth random picture, float `(C, H, W)` in 0..255."""
    noise = torch.rand(1, 3, height // 4, width // 4, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(noise, size=(height, width), mode="bicubic", align_corners=False)
    return smooth[0].clamp(0, 1) * 255


def test_dis_finds_a_translation() -> None:
    picture = texture(96, 128)
    moved_by = ((0, 0), (3, -2), (4, 0))  # (x, y) of each frame's content
    frames = [torch.roll(picture, (y, x), dims=(1, 2)) for x, y in moved_by]
    video_THWC = torch.stack(frames).permute(0, 2, 3, 1).round().to(torch.uint8)
    flow = dis_flow(video_THWC)
    assert flow.shape == (2, 96, 128, 2) and flow.dtype == torch.float32
    inside = flow[:, 16:-16, 16:-16]  # what was rolled over the border has no true flow
    expected = torch.tensor([[3.0, -2.0], [1.0, 2.0]])
    torch.testing.assert_close(inside.mean((1, 2)), expected, atol=0.1, rtol=0)
    assert (inside - expected[:, None, None]).norm(dim=-1).mean() < 0.2
    threads = cv2.getNumThreads()
    try:
        for count in (1, 4):
            cv2.setNumThreads(count)
            assert torch.equal(flow, dis_flow(video_THWC)), "whatever the number of threads"
    finally:
        cv2.setNumThreads(threads)


def test_dis_is_near_the_exact_flow_on_the_subjects_of_shapes() -> None:
    # beside them DIS moves the plain background along, which exact flow does not
    for index in range(4):
        sample = ShapesDataset(ShapesConfig(train_clips=4), "train")[index]
        assert sample.flow_THWC is not None and sample.masks_ETHW is not None
        inside = sample.masks_ETHW.any(0)[:-1]
        error = (dis_flow(sample.video_THWC) - sample.flow_THWC)[inside].norm(dim=-1).mean()
        assert error < 0.35 * sample.flow_THWC[inside].norm(dim=-1).mean()


def test_one_frame_has_no_flow() -> None:
    assert dis_flow(torch.zeros(1, 32, 48, 3, dtype=torch.uint8)).shape == (0, 32, 48, 2)


@pytest.mark.parametrize(
    ("frames", "steps", "starts"),
    [
        (5, 5, [0, 1, 2, 3, 4]),  # an image model sees every frame
        (9, 4, [1, 3, 5, 7]),  # tubelets of 2, first frame left out
        (5, 4, [1, 2, 3, 4]),
        (9, 2, [1, 5]),
    ],
)
def test_flow_on_the_grid_is_summed_and_averaged(
    frames: int, steps: int, starts: list[int]
) -> None:
    flow = torch.from_numpy(np.random.default_rng(0).normal(size=(frames - 1, 6, 12, 2))).float()
    found = flow_on_grid(flow, (steps, 2, 3))
    assert found.shape == (steps - 1, 6, 2)
    for t in range(steps - 1):
        for row in range(2):
            for column in range(3):
                for axis, pixels in ((0, 4), (1, 3)):
                    cell = flow[starts[t] : starts[t + 1]]
                    cell = cell[:, 3 * row : 3 * row + 3, 4 * column : 4 * column + 4, axis]
                    expected = cell.sum(0).mean() / pixels
                    assert found[t, 3 * row + column, axis].item() == pytest.approx(
                        expected.item(), abs=1e-6
                    )


def test_a_move_by_one_token_is_one() -> None:
    flow = torch.zeros(1, 32, 64, 2)
    flow[..., 0], flow[..., 1] = 16, -8  # a token is 16 wide and 8 high
    assert flow_on_grid(flow, (2, 4, 4)).unique(dim=1).tolist() == [[[1.0, -1.0]]]


@pytest.mark.parametrize("steps", [0, 3, 7])
def test_frames_that_do_not_correspond_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        flow_on_grid(torch.zeros(4, 8, 8, 2), (steps, 2, 2))


def test_iou_counts_tokens() -> None:
    target = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    marked = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    iou = mask_iou(marked.view(4, 2, 2), target.view(4, 2, 2))
    assert iou.tolist() == [0.25, 1.0, 1.0, 0.0]
