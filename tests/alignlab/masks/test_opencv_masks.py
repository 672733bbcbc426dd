"""The segmenter without a model: where masks are known, and where it has to be in doubt."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from alignlab.config.data import ShapesConfig
from alignlab.data.images import read_labels
from alignlab.data.video import decode_clip
from alignlab.masks.find_reference import find_reference
from alignlab.masks.make import MIN_CONFIDENCE, MaskSettings, make_masks
from alignlab.masks.opencv import OpenCV
from alignlab.masks.segmenter import Frame, Mask, Point, Prompt
from exported_shapes import carried_box, export_shapes, overlap


def scene(shift: int = 0, seed: int = 0) -> tuple[Frame, Mask]:
    """A red disc with a dark spot on green noise, and its mask."""
    rng = np.random.default_rng(seed)
    frame_HWC = rng.normal((70, 130, 60), 12, (96, 128, 3)).clip(0, 255).astype(np.uint8)
    frame_HWC = np.asarray(cv2.GaussianBlur(frame_HWC, (5, 5), 0), np.uint8)
    cv2.circle(frame_HWC, (50 + shift, 48), 24, (210, 40, 40), -1)
    cv2.circle(frame_HWC, (44 + shift, 44), 6, (60, 20, 20), -1)
    mask_HW = np.zeros((96, 128), np.uint8)
    cv2.circle(mask_HW, (50 + shift, 48), 24, 1, -1)
    return np.asarray(frame_HWC, np.uint8), mask_HW > 0


def iou(first_HW: NDArray[np.bool_], second_HW: NDArray[np.bool_]) -> float:
    return float((first_HW & second_HW).sum() / (first_HW | second_HW).sum())


def test_last_frames_are_better_than_boxes_that_the_flow_carries(tmp_path: Path) -> None:
    shapes = ShapesConfig(frames=5, size=(64, 64), seed=3)
    config, truths = export_shapes(tmp_path, shapes, 2)
    made = make_masks(config, OpenCV(), MaskSettings(min_confidence=0.0))
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    masks, boxes = [], []
    for clip, row, truth_ETHW in zip(made.clips, rows, truths, strict=True):
        assert clip.folder is not None
        video = decode_clip(
            tmp_path / row["file_name"], frames=5, fps=shapes.fps, size_HW=(64, 64)
        ).video_THWC
        last_HW = read_labels(clip.folder / "00004.png")
        for number, truth_THW in enumerate(truth_ETHW):
            masks.append(overlap(last_HW == number + 1, truth_THW[-1]))
            boxes.append(overlap(carried_box(video, row["boxes"][number]), truth_THW[-1]))
    assert np.mean(masks) > np.mean(boxes) + 0.1 and np.mean(masks) > 0.7


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt("disc", box=(26, 24, 75, 73)),
        Prompt("disc", points=(Point(60, 55), Point(110, 20, False))),
        Prompt("disc", mask_HW=scene()[1]),
    ],
    ids=["box", "points", "mask"],
)
def test_each_kind_of_prompt_is_followed(prompt: Prompt) -> None:
    frames = [scene(3 * number)[0] for number in range(4)]
    found = list(OpenCV().segment(frames, [prompt]))
    for number, masks in enumerate(found):
        assert iou(masks.masks_EHW[0], scene(3 * number)[1]) > 0.85
    assert min(masks.confidence_E[0] for masks in found) >= MIN_CONFIDENCE


def test_masks_follow_what_moves_further_than_an_edge_is_redrawn() -> None:
    """A tenth of the width in each frame; edges are drawn anew within 3 % of the shorter side."""
    shifts = (-20, -8, 4, 16)
    found = list(
        OpenCV().segment([scene(n)[0] for n in shifts], [Prompt("disc", box=(6, 24, 55, 73))])
    )
    for shift, masks in zip(shifts, found, strict=True):
        assert iou(masks.masks_EHW[0], scene(shift)[1]) > 0.8
    assert iou(scene(-20)[1], scene(16)[1]) < 0.2


def test_after_a_cut_an_entity_is_in_doubt_to_the_end() -> None:
    other = np.random.default_rng(1).integers(0, 255, (96, 128, 3)).astype(np.uint8)
    frames = [scene()[0], scene(2)[0], other, scene(2)[0]]
    found = list(OpenCV().segment(frames, [Prompt("disc", box=(26, 24, 75, 73))]))
    sure = [masks.confidence_E[0] >= MIN_CONFIDENCE for masks in found]
    assert sure == [True, True, False, False]


def test_a_part_of_an_entity_keeps_its_own_pixels() -> None:
    frame_HWC, disc_HW = scene()
    prompts = [Prompt("disc", box=(26, 24, 75, 73)), Prompt("spot", box=(38, 38, 51, 51))]
    (masks,) = OpenCV().segment([frame_HWC], prompts)
    assert not (masks.masks_EHW[0] & masks.masks_EHW[1]).any()
    assert masks.masks_EHW[1, 44, 44] and masks.masks_EHW[0, 60, 55]
    assert iou(np.asarray(masks.masks_EHW.any(0)), disc_HW) > 0.9


def test_numbers_do_not_depend_on_threads() -> None:
    """OpenCV promises it of DIS optical flow with spatial propagation, as its presets have it."""
    frames = [scene(3 * number)[0] for number in range(3)]
    threads = cv2.getNumThreads()
    results = []
    for count in (1, 4):
        cv2.setNumThreads(count)
        results.append(list(OpenCV().segment(frames, [Prompt("disc", box=(26, 24, 75, 73))])))
        assert cv2.getNumThreads() == count
    cv2.setNumThreads(threads)
    for first, second in zip(*results, strict=True):
        assert np.array_equal(first.masks_EHW, second.masks_EHW)
        assert np.array_equal(first.confidence_E, second.confidence_E)


def test_a_reference_is_found_where_it_is_and_nothing_else_is() -> None:
    frame_HWC, mask_HW = scene(20)
    crop_HWC, crop_HW = scene(0, seed=5)
    crop_HWC, crop_HW = crop_HWC[20:76, 22:80], crop_HW[20:76, 22:80]
    larger = cv2.resize(crop_HWC, None, fx=2.0, fy=2.0)
    larger_HW = cv2.resize(crop_HW.astype(np.uint8), larger.shape[1::-1]) > 0
    found = find_reference(frame_HWC, np.asarray(larger), larger_HW)
    assert found is not None and found.score > 0.8
    left, top, right, bottom = map(round, found.box)
    box_HW = np.zeros_like(mask_HW)
    box_HW[top:bottom, left:right] = True
    true_HW = np.zeros_like(mask_HW)
    true_HW[24:73, 46:95] = True
    assert iou(box_HW, true_HW) > 0.7
    noise = np.random.default_rng(2).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    other = find_reference(frame_HWC, noise, None)
    assert other is None or other.score < 0.5
