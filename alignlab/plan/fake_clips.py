"""Clips as a data set would give them, encoded, without values.

Shape letters: C channels, T, H, W of latents or pixels, K references, L text tokens, D width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from alignlab.config.data import CacheConfig, ClipsConfig
from alignlab.config.run import RunConfig
from alignlab.data.sample import Reference, Sample
from alignlab.dataset_cache.clip_keys import ClipOrigin
from alignlab.dataset_cache.encoded_values import EncodedValues, Tensors, kept_kinds
from alignlab.dataset_cache.key import Kind
from alignlab.models.frozen_parts import FrozenParts
from alignlab.plan.fake_models import FakeParts
from alignlab.training.batches import ClipEncoder
from alignlab.training.clip_memory import ClipMemory
from alignlab.training.encoded import ClipPixels, Encoded, FeatureRead, ReadName

ENTITIES = 2  # with a mask, of a clip
CLIPS = 1000


class FakeClips:
    """A data set whose clips all have as many references as the recipe may take.

    Args:
        config: of the data set.
        has_flow: clips know their optical flow, which a Stage 1 training may read.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, config: ClipsConfig, *, has_flow: bool = False) -> None:
        self._has_flow = has_flow
        self._frames, self._size = config.frames, config.size
        _, self._references = config.references

    def __len__(self) -> int:
        return CLIPS

    def __getitem__(self, index: int) -> Sample:
        height, width = self._size
        video_THWC = torch.zeros(self._frames, height, width, 3, dtype=torch.uint8)
        masks = torch.zeros(ENTITIES, self._frames, height, width).bool()
        return Sample(
            self.key(index),
            video_THWC,
            self.caption(index),
            self.references(index),
            self.entities(index),
            masks_ETHW=masks,
            flow_THWC=torch.zeros(self._frames - 1, height, width, 2) if self._has_flow else None,
        )

    def caption(self, index: int) -> str:
        return f"clip {index}"

    def entities(self, index: int) -> tuple[str, ...]:
        return tuple(f"subject {number} of clip {index}" for number in range(ENTITIES))

    def key(self, index: int) -> str:
        return f"clip-{index}"

    def references(self, index: int) -> tuple[Reference, ...]:
        height, width = self._size
        image_HWC = torch.zeros(height, width, 3, dtype=torch.uint8)
        mask_HW = torch.zeros(height, width).bool()
        return tuple(Reference(image_HWC, mask_HW, name, name) for name in self.names(index))

    def names(self, index: int) -> tuple[str, ...]:
        return tuple(f"reference {number}" for number in range(self._references))

    def origin(self, index: int) -> ClipOrigin:
        return ClipOrigin({"clip": index}, {"clip": index})

    def without_masks(self) -> str | None:
        return None

    def share_with_references(self) -> float:
        return float(self._references > 0)


class FakeEncodedValues(EncodedValues):
    """The dataset cache of a run, of which nothing is read.

    Args:
        cache: the recipe's.
    """

    def __init__(self, cache: CacheConfig) -> None:
        self._kinds = kept_kinds(cache) if cache.mode != "off" else frozenset()

    def get(self, kind: Kind, key: object, make: Callable[[], Tensors], refusal: object) -> Tensors:
        return make()


@dataclass(frozen=True)
class FakeEncoded(Encoded):
    """A clip after the encoders; features come from the cache, or a teacher computes them."""

    def features(self, read: FeatureRead) -> Tensor:
        assert isinstance(self.clips, FakeEncoder)
        return self.clips.features(read, self)

    def computed(self, read: FeatureRead) -> Tensor:
        """What the teacher gives."""
        return self._features(read)


class FakeEncoder(ClipEncoder):
    """Gives clips as the encoders make them.

    Args:
        frozen: of the run; nothing is loaded.
        config: of the run.
        values: of the run.
        computing: entered where a teacher computes.

    Attributes:
        shapes: of the features of a clip that the cache keeps, by their name.
    """

    def __init__(
        self,
        frozen: FakeParts,
        config: RunConfig,
        values: EncodedValues,
        computing: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.shapes: dict[ReadName, tuple[int, ...]] = {}
        self._computing = computing
        self._clips = FakeClips(config.data)
        super().__init__(frozen, self._clips, values, ClipMemory(0))
        _, self._num_references = config.data.references
        channels, frames, height, width = latents_shape(frozen, config)
        # of all clips, and on the host: what a step has of them on its device are copies
        self._latents_CTHW = torch.zeros(channels, frames, height, width)
        self._references_KCHW = torch.zeros(self._num_references, channels, height, width)
        self._text_LD = torch.zeros(frozen.max_tokens, frozen.text.dim)

    def __getitem__(self, index: int) -> FakeEncoded:
        return FakeEncoded(
            ClipPixels(self._clips, index),
            self._latents_CTHW,
            self._text_LD,
            self._references_KCHW,
            self._num_references > 0,
            self._values,
            clips=self,
        )

    def features(self, read: FeatureRead, clip: FakeEncoded) -> Tensor:
        """A teacher's features of a clip."""
        if self._values.keeps("teacher"):
            return torch.empty(self.shapes[read.name])
        with self._computing():
            return clip.computed(read)

    def text(self, prompt: str, *, where: str) -> Tensor:
        return self._text_LD

    def centre_of(self, read: FeatureRead) -> Tensor:
        return torch.zeros(read.teacher.dim)


def latents_shape(frozen: FrozenParts, config: RunConfig) -> tuple[int, int, int, int]:
    """(C, T, H, W) of a clip's latents."""
    settings, (height, width) = frozen.vae_config, config.data.size
    stride = settings["scale_factor_spatial"]
    frames = 1 + (config.data.frames - 1) // settings["scale_factor_temporal"]
    return settings["z_dim"], frames, height // stride, width // stride
