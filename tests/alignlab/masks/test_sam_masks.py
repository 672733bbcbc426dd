"""SAM 2 and SAM 3 on folders of their real classes with random weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from alignlab.data.decode import ClipError
from alignlab.errors import UserError
from alignlab.masks.pretrained import PretrainedVideoModel
from alignlab.masks.registry import build_segmenter
from alignlab.masks.sam2 import IMAGENET_MEAN, IMAGENET_STD, frame_masks
from alignlab.masks.segmenter import FrameMasks, Point, Prompt
from tiny_sam import SIDE, write_sam2, write_sam3

FRAMES = [
    np.random.default_rng(number).integers(0, 255, (48, 80, 3)).astype(np.uint8)
    for number in range(2)
]
MASK_HW = np.zeros((48, 80), np.bool_)
MASK_HW[5:20, 5:30] = True


@pytest.fixture(scope="module")
def sam2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sam2(tmp_path_factory.mktemp("sam2"))


@pytest.fixture(scope="module")
def sam3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sam3(tmp_path_factory.mktemp("sam3"))


def segment(name: str, folder: Path, *prompts: Prompt) -> list[FrameMasks]:
    return list(build_segmenter(name, str(folder)).segment(FRAMES, prompts))


def test_sam2_does_what_transformers_processor_asks_of_it(sam2: Path) -> None:
    from transformers import Sam2VideoModel
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession
    from transformers.models.sam2_video.processing_sam2_video import Sam2VideoProcessor

    # its constructor wants an image processor, which needs torchvision; prompts need none
    processor = Sam2VideoProcessor.__new__(Sam2VideoProcessor)
    processor.target_size, processor.point_pad_value = SIDE, -10
    model = Sam2VideoModel.from_pretrained(sam2).eval()
    video = PretrainedVideoModel(
        str(sam2), "sam2_video", "Sam2VideoModel", mean=IMAGENET_MEAN, std=IMAGENET_STD
    ).pixels(FRAMES, SIDE)
    session = Sam2VideoInferenceSession(
        video=video, video_height=48, video_width=80, dtype=torch.float32
    )
    add = processor.add_inputs_to_inference_session
    box, spots = [[[3, 4, 40, 40]]], [[[[60, 20], [2, 2]]]]
    add(session, 0, 0, input_boxes=box)
    add(session, 0, 1, input_points=spots, input_labels=[[[1, 0]]])
    add(session, 0, 2, input_masks=MASK_HW)
    session.obj_with_new_inputs = [0, 1, 2]
    found = segment(
        "sam2",
        sam2,
        Prompt("a", box=(3, 4, 40, 40)),
        Prompt("b", points=(Point(60, 20), Point(2, 2, False))),
        Prompt("c", mask_HW=MASK_HW),
    )
    for output, masks in zip(
        model.propagate_in_video_iterator(session, start_frame_idx=0), found, strict=True
    ):
        logits_EHW = F.interpolate(output.pred_masks, (48, 80), mode="bilinear")[:, 0]
        expected = frame_masks(logits_EHW, output.object_score_logits.flatten().sigmoid())
        assert np.array_equal(masks.masks_EHW, expected.masks_EHW)
        assert np.array_equal(masks.confidence_E, expected.confidence_E)
    assert found[0].masks_EHW[2].any() and found[0].confidence_E[2] > 0.5


def test_pixels_are_those_of_the_folders_processor(sam2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sam2, folder)
    values = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(values))
    model = PretrainedVideoModel(
        str(folder), "sam2_video", "Sam2VideoModel", mean=IMAGENET_MEAN, std=IMAGENET_STD
    )
    grey = np.full((48, 80, 3), 204, np.uint8)
    torch.testing.assert_close(
        model.pixels([grey], SIDE), torch.full((1, 3, SIDE, SIDE), (0.8 - 0.5) / 0.25)
    )
    (folder / "video_preprocessor_config.json").write_text(
        json.dumps(values | {"do_resize": True, "size": {"height": 32, "width": 32}})
    )
    other = build_segmenter("sam2", str(folder))
    with pytest.raises(UserError, match=r"asks for \(32, 32\), the model reads 64x64"):
        list(other.segment(FRAMES, [Prompt("a", box=(3, 4, 40, 40))]))


def test_confidence_is_presence_and_stability() -> None:
    logits_EHW = torch.full((3, 10, 10), -5.0)
    logits_EHW[0, :4] = 3.0  # 40 pixels, and 10 that are on the edge
    logits_EHW[0, 4] = 0.5
    logits_EHW[1, 4:] = 2.0
    logits_EHW[2] = 1.5
    masks = frame_masks(logits_EHW, torch.tensor([0.9, 1.0, 0.2]))
    assert masks.confidence_E == pytest.approx([0.9 * 40 / 50, 1.0, 0.8])
    assert [int(mask.sum()) for mask in masks.masks_EHW] == [40, 60, 0]


def test_sam3_finds_what_phrases_name(sam3: Path) -> None:
    red, blue = Prompt("red circle"), Prompt("blue striped")
    both = segment("sam3", sam3, red, blue)
    assert len(both) == 2 and both[0].masks_EHW.shape == (2, 48, 80)
    assert not (both[0].masks_EHW[0] & both[0].masks_EHW[1]).any()
    alone = segment("sam3", sam3, red)
    assert alone[0].masks_EHW.any() and 0.2 < alone[0].confidence_E[0] < 0.5
    other = segment("sam3", sam3, blue)
    assert not np.array_equal(alone[0].confidence_E, other[0].confidence_E)
    with pytest.raises(ClipError, match="takes 40 tokens, SAM 3 reads 32"):
        segment("sam3", sam3, Prompt(" ".join(["red"] * 40)))


def test_what_sam3_finds_nowhere_is_in_doubt(sam3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sam3, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"score_threshold_detection": 0.99, "new_det_thresh": 0.99}
    (folder / "config.json").write_text(json.dumps(config))
    for masks in segment("sam3", folder, Prompt("red circle")):
        assert masks.confidence_E[0] == 0 and not masks.masks_EHW.any()


def test_wrong_folders_are_told_in_a_line(sam2: Path, sam3: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a sam2_video model, this backend loads sam3_video"):
        build_segmenter("sam3", str(sam2))
    with pytest.raises(UserError, match="no such folder, shipped asset or hub id"):
        build_segmenter("sam2", str(tmp_path / "none"))
    with pytest.raises(UserError, match="the backend opencv has no model"):
        build_segmenter("opencv", str(sam2))
    folder = tmp_path / "model"
    shutil.copytree(sam2, folder)
    weights = folder / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    name = next(key for key in sorted(tensors) if key.startswith("memory_encoder"))
    del tensors[name]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks 1 weights, e.g. {name}"):
        list(build_segmenter("sam2", str(folder)).segment(FRAMES, [Prompt("a", box=(1, 2, 9, 9))]))
