"""What every data set yields: one clip, its caption and its reference images.

Shape letters: T frames, H height, W width, C channels (RGB), E entities.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from alignlab.dataset_cache.clip_keys import ClipOrigin


@dataclass(frozen=True)
class Reference:
    """A clean image of one subject, on white.

    Args:
        image_HWC: uint8, white (255) wherever `mask_HW` is false.
        mask_HW: bool, true on the subject.
        name: identity label; two references with the same name show the same subject.
        phrase: what the caption calls the subject, e.g. "red striped circle".
    """

    image_HWC: Tensor
    mask_HW: Tensor
    name: str
    phrase: str


@dataclass(frozen=True)
class Sample:
    """One training or validation clip.

    Args:
        key: stable identifier of the clip inside its data set.
        video_THWC: uint8 frames.
        caption: text condition.
        references: at most as many as the recipe asks for; may be empty.
        entities: noun phrases of the subjects that have a mask, in mask order.
        masks_ETHW: bool, visible pixels of each entity, or None when unknown.
        flow_THWC: float32 `(T-1, H, W, 2)` forward optical flow in pixels per frame, x then y,
            or None when unknown.
        undecided_THW: bool, pixels of which it is not known what they show: no entity's, and no
            background either. None if there are none.
    """

    key: str
    video_THWC: Tensor
    caption: str
    references: tuple[Reference, ...]
    entities: tuple[str, ...] = ()
    masks_ETHW: Tensor | None = None
    flow_THWC: Tensor | None = None
    undecided_THW: Tensor | None = None


class DataFiles(NamedTuple):
    """What a data set reads.

    Args:
        source: names it: equal where the same files are listed.
        root: their folder.
        files: by their names in there; a folder stands for all files in it.
    """

    source: str
    root: Path
    files: dict[str, Path]


class ClipDataset(Protocol):
    """Clips addressed by index; the same index always gives the same bits, whatever the seed.

    `notes` are warnings about the data, one text each; they are kept with a run's result.
    """

    @property
    def notes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def caption(self, index: int) -> str:
        """The caption of a clip, without reading its video."""
        ...

    def entities(self, index: int) -> tuple[str, ...]:
        """The entities of a clip (`Sample.entities`), without reading anything of it."""
        ...

    def key(self, index: int) -> str:
        """The key of a clip (`Sample.key`), without reading anything of it."""
        ...

    def references(self, index: int) -> tuple[Reference, ...]:
        """The references of a clip, without reading its video."""
        ...

    def names(self, index: int) -> tuple[str, ...]:
        """The names of those references. No image is read, unless the clip has more references
        than asked for."""
        ...

    def origin(self, index: int) -> ClipOrigin:
        """What a clip is made from, without decoding anything; files are hashed once."""
        ...

    def without_masks(self) -> str | None:
        """Key of the first clip whose entity masks are unknown; None if there is no such clip."""
        ...

    def share_with_references(self) -> float:
        """Share of the clips that have a reference image, without reading any."""
        ...
