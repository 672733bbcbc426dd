"""`sam3`: SAM 3's video model in transformers' port: finds what phrases name, and tracks it.

Shape and array letters: T frames, H height, W width, E entities.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from alignlab.data.decode import ClipError
from alignlab.masks.pretrained import SETTING, PretrainedVideoModel
from alignlab.masks.segmenter import Frame, FrameMasks, Prompt, Segmenter
from alignlab.models.model_files import load_pretrained
from alignlab.progress import warn_once

MEAN = STD = (0.5, 0.5, 0.5)
TEXT_TOKENS = 32  # that the text encoder reads


class Sam3(Segmenter):
    """SAM 3 video: every frame is searched for each phrase, and what is found is tracked.

    All objects of a phrase are its entity. All frames of a clip are held at the model's size. An
    entity's confidence in a frame is that of its surest object: the smaller one of the detector's
    and the tracker's score. In a frame without any object of a phrase that is found in others, it
    is 1: the detector looked for it. A phrase that is found nowhere in the clip is in doubt in all.

    Args:
        source: transformers folder of a `sam3_video` model with its tokenizer, or hub id.

    Raises:
        UserError: it cannot be used.
    """

    reads_texts: ClassVar[bool] = True

    def __init__(self, source: str) -> None:
        self._model = PretrainedVideoModel(
            source, "sam3_video", "Sam3VideoModel", mean=MEAN, std=STD
        )
        self._tokenizer: Any = None

    @property
    def settings(self) -> dict[str, str | float | int]:
        kernels = "yes" if _has_kernels() else "no"
        return {"backend": "sam3", "version": 1, "kernels": kernels, **self._model.settings}

    @torch.inference_mode()
    def segment(self, frames: Iterable[Frame], prompts: Sequence[Prompt]) -> Iterator[FrameMasks]:
        from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoInferenceSession

        if not _has_kernels():
            warn_once(
                "sam3: without the package kernels transformers keeps all detections (no NMS) and "
                "fills no holes: masks may be a little rougher"
            )
        tokens = [self._tokens(prompt.phrase) for prompt in prompts]
        model = self._model.loaded()
        listed = list(frames)
        session = Sam3VideoInferenceSession(
            video=self._model.pixels(listed, int(model.config.image_size)),
            video_height=listed[0].shape[0],
            video_width=listed[0].shape[1],
            inference_device=self._model.device,
            inference_state_device=self._model.device,
            dtype=self._model.dtype,
        )
        for prompt, encoded in zip(prompts, tokens, strict=True):
            number = session.add_prompt(prompt.phrase)
            session.prompt_input_ids[number] = encoded.input_ids.to(self._model.device)
            session.prompt_attention_masks[number] = encoded.attention_mask.to(self._model.device)
        outputs = list(model.propagate_in_video_iterator(session))
        found = [_objects(session, output, len(prompts)) for output in outputs]
        is_found_E = np.array([any(frame[n] for frame in found) for n in range(len(prompts))])
        for objects in found:
            yield _frame_masks(objects, is_found_E, listed[0].shape[:2])

    def _tokens(self, phrase: str) -> Any:
        if self._tokenizer is None:
            import transformers

            self._tokenizer = load_pretrained(
                transformers.AutoTokenizer,
                self._model.folder,
                setting=SETTING,
                config_file="tokenizer_config.json",
            )
        encoded = self._tokenizer(
            phrase, return_tensors="pt", padding="max_length", max_length=TEXT_TOKENS
        )
        if encoded.input_ids.shape[1] > TEXT_TOKENS:
            raise ClipError(
                f"the entity {phrase!r} takes {encoded.input_ids.shape[1]} tokens, SAM 3 reads "
                f"{TEXT_TOKENS}: name it in fewer words",
                kind="long phrase",
            )
        return encoded


Object = tuple[Tensor, float]
"""Logits of an object's mask, and its score."""


def _objects(session: Any, output: Any, entities: int) -> list[list[Object]]:
    """The objects of each entity in a frame, without those that the model hides."""
    hidden = {*(output.suppressed_obj_ids or ()), *session.hotstart_removed_obj_ids}
    objects: list[list[Object]] = [[] for _ in range(entities)]
    for number, logits in output.obj_id_to_mask.items():
        if number in hidden or not (logits > 0).any():
            continue
        score = float(output.obj_id_to_score[number])
        score = min(score, float(output.obj_id_to_tracker_score.get(number, score)))
        objects[session.obj_id_to_prompt_id[number]].append(
            (logits.reshape(logits.shape[-2:]), score)
        )
    return objects


def _frame_masks(
    objects: list[list[Object]], is_found_E: NDArray[np.bool_], size_HW: tuple[int, ...]
) -> FrameMasks:
    """Of each entity the union of its objects; a pixel of several is the surest one's."""
    logits_EHW = torch.full((len(objects), *size_HW), -torch.inf)
    confidence_E = is_found_E.astype(np.float32)
    for number, listed in enumerate(objects):
        if listed:
            stack_N1HW = torch.stack([logits for logits, _ in listed])[:, None].float()
            resized = F.interpolate(
                stack_N1HW, tuple(size_HW), mode="bilinear", align_corners=False
            )
            logits_EHW[number] = resized.amax((0, 1)).cpu()
            confidence_E[number] = max(score for _, score in listed)
    inside_EHW = (logits_EHW > 0) & (logits_EHW == logits_EHW.amax(0, keepdim=True))
    return FrameMasks(inside_EHW.numpy(), confidence_E)


def _has_kernels() -> bool:
    from transformers.utils import is_kernels_available

    return bool(is_kernels_available())
