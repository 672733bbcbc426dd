"""What is read of a clip that is kept in memory counts there."""

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from alignlab.data.sample import ClipDataset, Sample
from alignlab.dataset_cache.encoded_values import EncodedValues
from alignlab.dataset_cache.store import DatasetCache
from alignlab.teachers import Teacher
from alignlab.training.clip_memory import ClipMemory
from alignlab.training.encoded import ClipPixels, Encoded, FeatureRead
from made_clips import Listed

KB = 1024
READ = FeatureRead(cast(Teacher, None), "video", (4, 4))


class NamedRead(FeatureRead):
    """Of a teacher that nothing asks: features are made up."""

    @property
    def name(self) -> tuple[str, str, tuple[int, int]]:  # type: ignore[override]
        return "teacher", "video", self.grid_HW


def clips_in(memory: ClipMemory[Encoded], count: int) -> list[Encoded]:
    """Of 1 KB each, and pixels of 3 KB, put into a memory."""
    samples = [Sample(str(i), torch.zeros(1, 32, 32, 3).byte(), "", ()) for i in range(count)]
    dataset, nothing = cast(ClipDataset, Listed(samples)), torch.empty(0)
    values = EncodedValues(DatasetCache(Path("none"), "read"), frozenset({"teacher"}))
    clips = []
    for index in range(count):
        pixels = ClipPixels(dataset, index, memory)
        latents = torch.zeros(KB // 4)
        clips.append(Encoded(pixels, latents, nothing, nothing, False, values))
        memory.put(index, clips[-1])
    return clips


def kept(memory: ClipMemory[Encoded], count: int) -> list[int]:
    return [index for index in range(count) if memory.get(index) is not None]


def test_pixels_that_are_read_later_count() -> None:
    memory = ClipMemory[Encoded](8 * KB)
    clips = clips_in(memory, 5)
    clips[4].pixels.sample.video_THWC.sum()
    assert kept(memory, 5) == [0, 1, 2, 3, 4]
    clips[3].pixels.sample.video_THWC.sum()  # 11 KB
    assert kept(memory, 5) == [3, 4]


def test_features_that_are_read_later_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = ClipMemory[Encoded](8 * KB)
    clips = clips_in(memory, 5)
    made: list[Tensor] = []

    def make(*_: object) -> Tensor:
        made.append(torch.zeros(2 * KB // 4))
        return made[-1]

    monkeypatch.setattr("alignlab.training.encoded.kept_features", make)
    read = NamedRead(*READ)
    for clip in clips[3:]:
        assert clip.features(read) is clip.features(read)
    assert len(made) == 2  # 9 KB
    assert kept(memory, 5) == [1, 2, 3, 4]


def test_features_of_more_than_a_quarter_of_the_memory_are_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = ClipMemory[Encoded](8 * KB)
    clips = clips_in(memory, 5)
    monkeypatch.setattr(
        "alignlab.training.encoded.kept_features", lambda *_: torch.zeros(2 * KB // 4 + 1)
    )
    read = NamedRead(*READ)
    assert torch.equal(clips[0].features(read), clips[0].features(read))
    assert not clips[0].features_read
    assert kept(memory, 5) == [0, 1, 2, 3, 4]
