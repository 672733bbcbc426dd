"""One clip after the frozen encoders; pixels and teacher features come when they are read.

Shape letters: C channels, T, H, W of latents or pixels, K references, L text tokens, P tokens per
frame, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from alignlab.data.sample import ClipDataset, Reference, Sample
from alignlab.dataset_cache.clip_keys import ClipOrigin, content_digest, teacher_key
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.dataset_cache.key import CacheKey
from alignlab.kernels.host_copy import to_device
from alignlab.randomness import generator
from alignlab.teachers import DiffusionTeacher, Teacher
from alignlab.teachers.diffusion import NOISE_SEED
from alignlab.training.clip_memory import ClipMemory, tensor_bytes
from alignlab.training.flow_matching import interpolate
from alignlab.training.shuffle import (
    clip_with_references,
    other_clip,
    shuffled_references,
    shuffled_video,
)

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
        is_shuffled: the features of another clip (`alignlab.training.shuffle`).
    """

    teacher: Teacher | DiffusionTeacher
    kind: TokenKind
    grid_HW: tuple[int, int]
    is_shuffled: bool = False

    @property
    def name(self) -> "ReadName":
        """Equal where the features are."""
        return self.teacher.identity, self.kind, self.grid_HW, self.is_shuffled


ReadName = tuple[str, TokenKind, tuple[int, int], bool]


class EncodedClips(Protocol):
    """The encoded clips of a data set, by index."""

    def __getitem__(self, index: int, /) -> "Encoded": ...

    @property
    def empty_text_LD(self) -> Tensor:
        """The embedding of the empty prompt."""

    def centre_of(self, read: FeatureRead) -> Tensor:
        """What a diffusion teacher's features are centred by, (D,) on the CPU."""


@dataclass(frozen=True)
class Encoded:
    """One clip after the frozen encoders, on the CPU.

    Args:
        pixels: decoded when they are read.
        latents_CTHW, text_LD, references_KCHW: what the encoders give.
        shows_reference: whether one of its references is not blank.
        values: where the features of teachers are kept.
        features_read: those that were read, if `values` keeps them and the memory has room.
        clips: those that it is one of; diffusion teachers and shuffled ones read them.
    """

    pixels: ClipPixels
    latents_CTHW: Tensor
    text_LD: Tensor
    references_KCHW: Tensor
    shows_reference: bool
    values: EncodedValues
    features_read: dict[ReadName, Tensor] = field(default_factory=dict, repr=False)
    clips: EncodedClips | None = field(default=None, repr=False)

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
            return self._features(read)
        found = self.features_read.get(read.name)
        if found is None:
            found = self._features(read)
            memory = self.pixels.memory
            if memory is None or memory.has_room(found.nbytes):
                self.features_read[read.name] = found
                if memory is not None:
                    memory.grow(self.pixels.index, found.nbytes)
        return found

    def _features(self, read: FeatureRead) -> Tensor:
        """As `features`, from where they are kept or made."""
        source, index = self.pixels, self.pixels.index
        if read.is_shuffled:
            dataset = source.dataset
            if read.kind == "video":
                other = other_clip(index, len(dataset))
            else:
                other = clip_with_references(dataset, index)
            source = ClipPixels(dataset, other)
        rows = kept_features(self.values, read, source, partial(self._clip, source.index))
        if isinstance(read.teacher, DiffusionTeacher) and read.teacher.is_centred:
            assert self.clips is not None  # of every clip of a run
            rows = rows - to_device(self.clips.centre_of(read), rows.device)
        if not read.is_shuffled:
            return rows
        if read.kind == "video":
            return shuffled_video(rows, index)
        return shuffled_references(rows, index, len(self.pixels.names))

    def _clip(self, index: int) -> "Encoded":
        """This clip or another one of its data set."""
        if index == self.pixels.index:
            return self
        assert self.clips is not None  # of every clip of a run
        return self.clips[index]


def kept_features(
    values: EncodedValues,
    read: FeatureRead,
    pixels: ClipPixels,
    encoded: Callable[[], Encoded] | None = None,
) -> Tensor:
    """A teacher's features of a clip as the teacher gave them, through the dataset cache.

    Args:
        values: where they are kept.
        read: of which teacher; whether it is centred or shuffled is no matter.
        pixels: the clip.
        encoded: gives its latents and text, for a teacher that reads them.
    """
    key = partial(feature_key, read, pixels)
    make = partial(_encode, read, pixels, encoded)
    return values.get("teacher", key, make, partial(_not_finite, read, pixels))[TOKENS]


def feature_key(read: FeatureRead, pixels: ClipPixels) -> CacheKey:
    """Names the features of a clip."""
    origin = pixels.origin.video if read.kind == "video" else pixels.origin.references
    is_of_text = isinstance(read.teacher, DiffusionTeacher) and read.teacher.reads_caption
    text = {"caption": pixels.caption} if is_of_text else {}
    named = {"of": read.kind, **origin, **text}
    return teacher_key(named, read.teacher.parts, read.grid_HW)


def clip_noise(pixels: ClipPixels, like_CTHW: Tensor) -> Tensor:
    """The noise that diffusion teachers see in a clip's latents: equal clips have equal noise."""
    address = int(content_digest("video", pixels.origin.video)[:15], 16)
    rng = generator(NOISE_SEED, "teacher-noise", address)
    return torch.randn(like_CTHW.shape, generator=rng)


def _not_finite(read: FeatureRead, pixels: ClipPixels) -> str:
    shown = "frames" if read.kind == "video" else "references"
    return (
        f"{pixels.key}: {read.teacher.name} gives features of its {shown} that are not finite: "
        "take other weights, or another feature of that teacher"
    )


def _encode(
    read: FeatureRead, pixels: ClipPixels, encoded: Callable[[], Encoded] | None
) -> dict[str, Tensor]:
    teacher = read.teacher
    if isinstance(teacher, DiffusionTeacher):
        assert encoded is not None  # of every clip of a run
        return {TOKENS: _of_latents(teacher, encoded())}
    frames = pixels.sample.video_THWC if read.kind == "video" else pixels.images_KHWC
    return {TOKENS: teacher.encode(frames[None], read.grid_HW).tokens_BTPD[0]}


def _of_latents(teacher: DiffusionTeacher, clip: Encoded) -> Tensor:
    assert clip.clips is not None  # of every clip of a run
    latents_BCTHW = clip.latents_CTHW[None]
    noise_BCTHW = clip_noise(clip.pixels, clip.latents_CTHW)[None]
    noisy_BCTHW = interpolate(latents_BCTHW, noise_BCTHW, torch.tensor([teacher.noise_level]))
    text_LD = clip.text_LD if teacher.reads_caption else clip.clips.empty_text_LD
    return teacher.encode(noisy_BCTHW, text_LD[None]).tokens_BTPD[0]
