"""One clip after the frozen encoders; pixels and teacher features come when they are read.

Shape letters: C channels, T, H, W of latents or pixels, K references, L text tokens, P tokens per
frame, D width.
"""

from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from alignlab.data.sample import ClipDataset, Reference, Sample
from alignlab.dataset_cache.clip_keys import ClipOrigin, teacher_key
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.dataset_cache.key import CacheKey
from alignlab.teachers import Teacher
from alignlab.training.clip_memory import ClipMemory, tensor_bytes

TokenKind = Literal["video", "reference"]
TOKENS = "tokens_TPD"

Decoded = TypeVar("Decoded", Sample, tuple[Reference, ...])


@dataclass(frozen=True)
class ClipPixels:
    """A clip of a data set, which is decoded when something reads its pixels.

    Args:
        dataset: that has it.
        index: in there.
        memory: that is told of what is decoded and kept here.
    """

    dataset: ClipDataset
    index: int
    memory: ClipMemory[Any] | None = field(default=None, repr=False)

    # not cached properties: those of Python 3.11 have one lock for the clips of all threads
    @property
    def sample(self) -> Sample:
        """All of the clip."""
        if "sample" not in vars(self):
            vars(self)["sample"] = self._kept(self.dataset[self.index])
        sample: Sample = vars(self)["sample"]
        return sample

    @property
    def references(self) -> tuple[Reference, ...]:
        """Its references; the video is not decoded for them."""
        if "sample" in vars(self):
            return self.sample.references
        if "references" not in vars(self):
            vars(self)["references"] = self._kept(self.dataset.references(self.index))
        references: tuple[Reference, ...] = vars(self)["references"]
        return references

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of its references; no pixels are decoded where the data set can tell without."""
        return self.dataset.names(self.index)

    @property
    def caption(self) -> str:
        return self.dataset.caption(self.index)

    @property
    def key(self) -> str:
        return self.dataset.key(self.index)

    @property
    def origin(self) -> ClipOrigin:
        """What the pixels are made from."""
        return self.dataset.origin(self.index)

    @property
    def images_KHWC(self) -> Tensor:
        """Reference images, uint8, K at least 1."""
        return torch.stack([reference.image_HWC for reference in self.references])

    def _kept(self, decoded: Decoded) -> Decoded:
        if self.memory is not None:
            self.memory.grow(self.index, tensor_bytes(decoded))
        return decoded


class FeatureRead(NamedTuple):
    """Features of a teacher that something reads.

    Args:
        teacher: an image teacher for `reference`.
        kind: of frames or of reference images.
        grid_HW: patches of a frame or an image.
    """

    teacher: Teacher
    kind: TokenKind
    grid_HW: tuple[int, int]

    @property
    def name(self) -> tuple[str, TokenKind, tuple[int, int]]:
        """Equal where the features are."""
        return self.teacher.identity, self.kind, self.grid_HW


@dataclass(frozen=True)
class Encoded:
    """One clip after the frozen encoders, on the CPU.

    Args:
        pixels: decoded when they are read.
        latents_CTHW, text_LD, references_KCHW: what the encoders give.
        shows_reference: whether one of its references is not blank.
        values: where the features of teachers are kept.
        features_read: those that were read, if `values` keeps them and the memory has room.
    """

    pixels: ClipPixels
    latents_CTHW: Tensor
    text_LD: Tensor
    references_KCHW: Tensor
    shows_reference: bool
    values: EncodedValues
    features_read: dict[tuple[str, TokenKind, tuple[int, int]], Tensor] = field(
        default_factory=dict, repr=False
    )

    @property
    def sample(self) -> Sample:
        """The clip, decoded."""
        return self.pixels.sample

    def features(self, read: FeatureRead) -> Tensor:
        """A teacher's tokens of the frames, `(T, P, D)`, or of the reference images, `(K, P, D)`.

        The clip is encoded by itself: its features do not depend on what else is in a batch. All
        its references go through together, since they are read together. A clip without references
        has no features of them.

        Returns:
            fp32, on the CPU or on the teacher's device.
        """
        if not self.values.keeps("teacher"):
            return kept_features(self.values, read, self.pixels)
        found = self.features_read.get(read.name)
        if found is None:
            found = kept_features(self.values, read, self.pixels)
            memory = self.pixels.memory
            if memory is None or memory.has_room(found.nbytes):
                self.features_read[read.name] = found
                if memory is not None:
                    memory.grow(self.pixels.index, found.nbytes)
        return found


def kept_features(values: EncodedValues, read: FeatureRead, pixels: ClipPixels) -> Tensor:
    """`Encoded.features` of a clip, through the dataset cache."""
    key, make = partial(feature_key, read, pixels), partial(_encode, read, pixels)
    return values.get("teacher", key, make, partial(_not_finite, read, pixels))[TOKENS]


def feature_key(read: FeatureRead, pixels: ClipPixels) -> CacheKey:
    """Names the features of a clip."""
    origin = pixels.origin.video if read.kind == "video" else pixels.origin.references
    return teacher_key({"of": read.kind, **origin}, read.teacher.parts, read.grid_HW)


def _not_finite(read: FeatureRead, pixels: ClipPixels) -> str:
    shown = "frames" if read.kind == "video" else "references"
    return (
        f"{pixels.key}: {read.teacher.name} gives features of its {shown} that are not finite: "
        "take other weights, or another feature of that teacher"
    )


def _encode(read: FeatureRead, pixels: ClipPixels) -> dict[str, Tensor]:
    frames = pixels.sample.video_THWC if read.kind == "video" else pixels.images_KHWC
    return {TOKENS: read.teacher.encode(frames[None], read.grid_HW).tokens_BTPD[0]}
