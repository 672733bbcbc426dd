"""`sam2`: SAM 2's video model (Ravi et al. 2024) in transformers' port, from places in frame 0.

Shape and array letters: T frames, H height, W width, E entities.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from alignlab.masks.pretrained import PretrainedVideoModel
from alignlab.masks.segmenter import Frame, FrameMasks, Prompt, Segmenter

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BOX_CORNERS = (2, 3)  # SAM's labels of points that are the first and the last corner of a box
STABLE = 1.0  # logit: SAM's stability score compares the masks at this and at minus this


class Sam2(Segmenter):
    """SAM 2 video: each entity is prompted in the first frame and tracked through the others.

    All frames of a clip are held at the model's size. The confidence of an entity in a frame is the
    model's probability that it is there, times the stability score of its mask (intersection over
    union of the masks at logits 1 and -1); where the model says that it is not there, the
    probability of that.

    Args:
        source: transformers folder of a `sam2_video` model, or hub id.

    Raises:
        UserError: it cannot be used.
    """

    def __init__(self, source: str) -> None:
        self._model = PretrainedVideoModel(
            source, "sam2_video", "Sam2VideoModel", mean=IMAGENET_MEAN, std=IMAGENET_STD
        )

    @property
    def settings(self) -> dict[str, str | float | int]:
        return {"backend": "sam2", "version": 1, **self._model.settings}

    @torch.inference_mode()
    def segment(self, frames: Iterable[Frame], prompts: Sequence[Prompt]) -> Iterator[FrameMasks]:
        from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

        model = self._model.loaded()
        side = int(model.config.image_size)
        listed = list(frames)
        height, width = listed[0].shape[:2]
        session = Sam2VideoInferenceSession(
            video=self._model.pixels(listed, side),
            video_height=height,
            video_width=width,
            inference_device=self._model.device,
            inference_state_device=self._model.device,
            dtype=self._model.dtype,
        )
        for number, prompt in enumerate(prompts):
            _add(session, number, prompt, side, (height, width))
        session.obj_with_new_inputs = list(range(len(prompts)))
        for output in model.propagate_in_video_iterator(session, start_frame_idx=0):
            logits_EHW = F.interpolate(
                output.pred_masks.float(), (height, width), mode="bilinear", align_corners=False
            )[:, 0]
            yield frame_masks(logits_EHW, output.object_score_logits.float().flatten().sigmoid())


def frame_masks(logits_EHW: Tensor, present_E: Tensor) -> FrameMasks:
    """Masks that do not overlap, and how sure they are.

    Args:
        logits_EHW: of the masks.
        present_E: probability that each entity is in the frame.
    """
    is_present_E = present_E >= 0.5
    inside_EHW = (logits_EHW > 0) & is_present_E[:, None, None]
    inside_EHW &= logits_EHW == logits_EHW.amax(0, keepdim=True)
    core_E = (logits_EHW > STABLE).sum((1, 2))
    stability_E = core_E / (logits_EHW > -STABLE).sum((1, 2)).clamp(min=1)
    sure_E = torch.where(is_present_E, present_E * stability_E, 1 - present_E)
    return FrameMasks(inside_EHW.cpu().numpy(), sure_E.cpu().numpy().astype(np.float32))


def _add(session: Any, number: int, prompt: Prompt, side: int, size_HW: tuple[int, int]) -> None:
    """Prompts an entity in the first frame, in pixels of the model's images."""
    index = session.obj_id_to_idx(number)
    if prompt.mask_HW is not None:
        mask_11HW = torch.from_numpy(prompt.mask_HW)[None, None].float()
        resized = F.interpolate(
            mask_11HW, (side, side), mode="bilinear", align_corners=False, antialias=True
        )
        session.add_mask_inputs(index, 0, (resized >= 0.5).float())
        return
    places = [(p.x, p.y) for p in prompt.points]
    labels = [int(p.is_inside) for p in prompt.points]
    if prompt.box is not None:
        left, top, right, bottom = prompt.box
        places = [(left, top), (right, bottom), *places]
        labels = [*BOX_CORNERS, *labels]
    to_side = torch.tensor([side / size_HW[1], side / size_HW[0]])
    points = {
        "point_coords": (torch.tensor(places, dtype=torch.float32) * to_side)[None, None],
        "point_labels": torch.tensor(labels, dtype=torch.int32)[None, None],
    }
    session.add_point_inputs(index, 0, points)
