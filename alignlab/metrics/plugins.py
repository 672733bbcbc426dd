"""What a package of one's own writes to measure generated clips by (docs/own-metric.md).

Shape letters: T frames, H height, W width, C channels (RGB), E entities.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from alignlab.data.sample import Reference
from alignlab.kernels.plugins import nothing_missing


@dataclass(frozen=True)
class Clip:
    """What a metric is given of one clip. All tensors are on the CPU, and copies.

    Args:
        key: of the val clip in its data set.
        video_THWC: uint8, what is measured: the generated clip or, for `gen_real/`, the real one
            after the autoencoder.
        real_THWC: uint8, the real clip as the data set has it; of the same shape.
        caption: the text that it was generated for.
        references: the reference images that it was generated for, maybe none: `image_HWC` uint8
            of the clip's size, white where `mask_HW` is false; `name` and `phrase` of the subject.
        entities: what the subjects of the real clip are called, in the order of the masks.
        masks_ETHW: bool, where the real clip shows them; None where that is not known.
        fps: frames per second of both clips.
        device: where the run computes; a network of one's own may do so too.
        undecided_THW: bool, pixels of the real clip that are no entity's and no background either,
            since it is not known what they show; None if there are none.
    """

    key: str
    video_THWC: Tensor
    real_THWC: Tensor
    caption: str
    references: tuple[Reference, ...]
    entities: tuple[str, ...]
    masks_ETHW: Tensor | None
    fps: int
    device: torch.device
    undecided_THW: Tensor | None = None


@dataclass(frozen=True)
class ClipMetric:
    """A metric of generated clips, as another package registers it.

    Args:
        label: what a reader calls it.
        measure: takes a `Clip` and gives its value: one finite number, or with a `reduce` whatever
            that takes. None: the clip has none.
        reduce: takes the list of what `measure` gave, which is not empty, and gives one finite
            number, or None if these clips are too few. Left out: their mean.
        better: which way is better; "none" where neither is, or where it depends.
        headline: among the few that a report shows first.
        unit: of the value; empty for a share, a cosine or another pure number.
        missing: says in one line why it cannot be measured on this machine (weights that are not
            there), or None if it can.
    """

    label: str
    measure: Callable[[Clip], Any]
    reduce: Callable[[list[Any]], Any] | None = None
    better: Literal["lower", "higher", "none"] = "none"
    headline: bool = False
    unit: str = ""
    missing: Callable[[], str | None] = nothing_missing
