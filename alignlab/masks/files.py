"""Masks of a clip on disk: label images, and beside them what they were made from.

Array letters: H height, W width, E entities.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ValidationError

from alignlab.data.masks import VOID_LABEL
from alignlab.masks.segmenter import FrameMasks
from alignlab.runs.atomic_files import write_text

RECORD = "masks.json"
MOST_ENTITIES = VOID_LABEL - 1
GREY = (128, 128, 128)


class MaskRecord(BaseModel):
    """What the masks of a clip were made from, and what came out.

    Args:
        request: all that they depend on.
        entities: their phrases, in label order.
        first_frame: index in the video of the first label image.
        confidence: per entity, of every frame.
        undecided: frames with undecided pixels.
        shares: per entity, mean share of the picture over the frames in which it is sure.
    """

    request: dict[str, Any]
    entities: list[str]
    first_frame: int
    confidence: list[list[float]]
    undecided: int
    shares: list[float]

    @property
    def frames(self) -> int:
        """How many label images there are."""
        return len(self.confidence[0])

    def doubtful(self, entity: int) -> int:
        """Frames in which an entity is in doubt."""
        least = float(self.request["min_confidence"])
        return sum(value < least for value in self.confidence[entity])


class LabelWriter:
    """Writes the label images of a clip into a folder, frame by frame.

    Args:
        folder: that exists.
        first_frame: index of the first image.
        min_confidence: an entity of less is in doubt.
    """

    def __init__(self, folder: Path, first_frame: int, min_confidence: float) -> None:
        self._folder, self._first, self._least = folder, first_frame, min_confidence
        self._confidence: list[list[float]] = []
        self._shares: list[list[float]] = []
        self._undecided = 0

    def write(self, found: FrameMasks) -> None:
        """Writes the next frame."""
        labels_HW = label_image(found, self._least)
        image = Image.fromarray(labels_HW, "P")
        image.putpalette(_palette())
        image.save(self._folder / f"{self._first + len(self._confidence):05d}.png")
        self._undecided += bool((labels_HW == VOID_LABEL).any())
        self._confidence.append([round(float(value), 4) for value in found.confidence_E])
        areas = [float((labels_HW == n + 1).mean()) for n in range(len(found.masks_EHW))]
        self._shares.append(areas)

    def finish(self, request: dict[str, Any], entities: Sequence[str]) -> MaskRecord:
        """Writes the record, and gives it."""
        confidence_ET = np.array(self._confidence).T
        is_sure_ET = confidence_ET >= self._least
        shares_ET = np.where(is_sure_ET, np.array(self._shares).T, 0.0)
        means_E = shares_ET.sum(1) / np.maximum(1, is_sure_ET.sum(1))
        record = MaskRecord(
            request=request,
            entities=list(entities),
            first_frame=self._first,
            confidence=confidence_ET.tolist(),
            undecided=self._undecided,
            shares=[round(float(mean), 6) for mean in means_E],
        )
        write_text(self._folder / RECORD, record.model_dump_json(indent=1))
        return record


def read_record(folder: Path) -> MaskRecord | None:
    """What a folder of masks says of itself; None if it was not made here."""
    try:
        return MaskRecord.model_validate_json((folder / RECORD).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def label_image(found: FrameMasks, min_confidence: float) -> NDArray[np.uint8]:
    """0 background, k the k-th entity, 255 undecided.

    Where an entity is in doubt, so are all pixels that no other one has: it may be anywhere there.
    """
    is_sure_E = found.confidence_E >= min_confidence
    labels_HW = np.zeros(found.masks_EHW.shape[1:], np.uint8)
    for number in reversed(range(len(found.masks_EHW))):
        if is_sure_E[number]:
            labels_HW[found.masks_EHW[number]] = number + 1
    if not is_sure_E.all():
        labels_HW[labels_HW == 0] = VOID_LABEL
    return labels_HW


def _palette() -> bytes:
    """Colours of the labels in image viewers: each bit of a label sets a bit of one channel."""
    colours = np.zeros((256, 3), np.uint8)
    for label in range(256):
        for bit in range(8):
            colours[label, bit % 3] |= ((label >> bit) & 1) << (7 - bit // 3)
    colours[VOID_LABEL] = GREY
    return colours.tobytes()
