"""Clips that no data set has, as training batches hold them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from alignlab.data.sample import ClipDataset, Reference, Sample
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.dataset_cache.store import DatasetCache
from alignlab.training.batches import Batch
from alignlab.training.encoded import ClipPixels, Encoded


class Listed:
    """A data set of samples that are there."""

    notes = ()

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def key(self, index: int) -> str:
        return self.samples[index].key

    def caption(self, index: int) -> str:
        return self.samples[index].caption

    def references(self, index: int) -> tuple[Reference, ...]:
        return self.samples[index].references

    def names(self, index: int) -> tuple[str, ...]:
        return tuple(reference.name for reference in self.samples[index].references)


def decoded_pixels(sample: Sample) -> ClipPixels:
    """The pixels of a sample; they have no origin, so that nothing made of them is kept."""
    return ClipPixels(cast(ClipDataset, Listed([sample])), 0)


def uncached() -> EncodedValues:
    """Values that are made each time."""
    return EncodedValues(DatasetCache(Path("none"), "off"), frozenset())


def pixel_batch(videos: Sequence[Tensor], **fields: Any) -> Batch:
    """A batch that teachers can read, and nothing else: uint8 `(T, H, W, C)` videos."""
    nothing = torch.empty(0)
    samples = [Sample(str(row), video, "", ()) for row, video in enumerate(videos)]
    clips = [
        Encoded(decoded_pixels(sample), nothing, nothing, nothing, False, uncached())
        for sample in samples
    ]
    empty: dict[str, Any] = dict.fromkeys(Batch.__dataclass_fields__)
    empty |= {"clips": clips, "loaded": {}, "references": [nothing] * len(clips)}
    return Batch(**(empty | fields))
