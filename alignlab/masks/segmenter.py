"""What all segmenters share: prompts in the first frame, masks and confidence of every frame.

Array letters: H height, W width, C channels (RGB), E entities.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]
"""RGB pixels `(H, W, C)`, upright."""
Mask = NDArray[np.bool_]
"""`(H, W)`, true on the entity."""


class Point(NamedTuple):
    """A pixel of the first frame, and whether it is on the entity."""

    x: float
    y: float
    is_inside: bool = True


@dataclass(frozen=True)
class Prompt:
    """Where an entity is in the first frame of a clip; a segmenter that reads texts needs no place.

    Args:
        phrase: what it is called.
        box: left, top, right, bottom in pixels, right and bottom exclusive.
        points: on the entity, or beside it.
        mask_HW: true on the entity; then there is neither box nor point.
    """

    phrase: str
    box: tuple[float, float, float, float] | None = None
    points: tuple[Point, ...] = ()
    mask_HW: Mask | None = None

    @property
    def has_place(self) -> bool:
        """Whether it says where the entity is."""
        return self.box is not None or bool(self.points) or self.mask_HW is not None


class FrameMasks(NamedTuple):
    """What a segmenter says of a frame.

    Args:
        masks_EHW: bool. Where two overlap, the first one counts.
        confidence_E: how sure it is of each, 0..1; also of a mask that is empty.
    """

    masks_EHW: NDArray[np.bool_]
    confidence_E: NDArray[np.float32]


class Segmenter(ABC):
    """A way to find entities in the frames of a clip.

    `reads_texts`: it finds entities by their phrases; else prompts need places.
    """

    reads_texts: ClassVar[bool] = False

    @property
    @abstractmethod
    def settings(self) -> dict[str, str | float | int]:
        """All that its masks depend on beside frames and prompts."""

    @abstractmethod
    def segment(self, frames: Iterable[Frame], prompts: Sequence[Prompt]) -> Iterator[FrameMasks]:
        """Masks of every frame, in order.

        Args:
            frames: of one size, the first one is that of the prompts.
            prompts: one per entity, at least one.
        """


def box_of(mask_HW: Mask) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom of the smallest box around a mask; None if it is empty."""
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
