"""The subjects of a shapes clip are found by colour, close to where they were drawn."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from alignlab.config.data import ShapesConfig
from alignlab.data.sample import Sample
from alignlab.data.shapes.dataset import ShapesDataset
from alignlab.data.shapes.detect import direction, find_subjects

CLIPS = ShapesDataset(ShapesConfig(frames=9, size=(64, 64), references=(2, 3)), "val")
SAMPLES = [CLIPS[i] for i in range(16)]


def overlap(sample: Sample, video_THWC: Tensor) -> float:
    """Mean intersection over union with the drawn masks."""
    found, drawn = find_subjects(video_THWC, sample.entities).masks_ETHW, sample.masks_ETHW
    assert drawn is not None
    both = (found & drawn).flatten(2).sum(2).double()
    return float((both / (found | drawn).flatten(2).sum(2).clamp_min(1)).mean())


def test_regions_lie_where_the_subjects_were_drawn() -> None:
    overlaps = torch.tensor([overlap(s, s.video_THWC) for s in SAMPLES])
    assert overlaps.mean() > 0.7
    other = torch.tensor([overlap(s, o.video_THWC) for s, o in pairwise(SAMPLES)])
    assert other.mean() < 0.15


def test_noise_and_another_light_change_little() -> None:
    generator = torch.Generator().manual_seed(0)
    for sample in SAMPLES[:6]:
        noise = 5 * torch.randn(sample.video_THWC.shape, generator=generator)
        darker = (0.85 * sample.video_THWC + noise).clamp(0, 255).byte()
        assert overlap(sample, darker) > overlap(sample, sample.video_THWC) - 0.1


def test_a_clip_shows_as_many_parts_as_it_has_subjects() -> None:
    wrong = [
        (find_subjects(s.video_THWC, s.entities).parts_T - len(s.entities)).abs() for s in SAMPLES
    ]
    assert torch.cat(wrong).double().mean() < 0.25


def test_a_second_subject_of_the_same_colour_is_counted() -> None:
    flat = torch.full((1, 64, 64, 3), 120, dtype=torch.uint8)
    flat[:, 5:25, 5:25] = torch.tensor([214, 40, 40], dtype=torch.uint8)
    assert find_subjects(flat, ("red plain square",)).parts_T.tolist() == [1]
    flat[:, 40:60, 40:60] = torch.tensor([214, 40, 40], dtype=torch.uint8)
    assert find_subjects(flat, ("red plain square",)).parts_T.tolist() == [2]
    flat[:, 5:25, 40:60] = torch.tensor([40, 85, 205], dtype=torch.uint8)
    found = find_subjects(flat, ("red plain square", "green plain ring"))
    assert found.parts_T.tolist() == [3], "unnamed colours count"
    assert found.masks_ETHW.flatten(1).any(1).tolist() == [True, False]


def test_a_speck_is_no_subject() -> None:
    flat = torch.full((2, 64, 64, 3), 120, dtype=torch.uint8)
    flat[:, 5:9, 5:9] = torch.tensor([214, 40, 40], dtype=torch.uint8)
    found = find_subjects(flat, ("red plain square",))
    assert not found.masks_ETHW.any() and not found.parts_T.any()


def test_directions_are_those_of_the_captions() -> None:
    right = 0
    for sample in SAMPLES:
        masks = find_subjects(sample.video_THWC, sample.entities).masks_ETHW
        backwards = find_subjects(sample.video_THWC.flip(0), sample.entities).masks_ETHW
        for phrase, mask, back in zip(sample.entities, masks, backwards, strict=True):
            right += f"{phrase} moves {direction(mask)}" in sample.caption
            assert f"{phrase} moves {direction(back)}" not in sample.caption
    assert right >= 0.95 * sum(len(s.entities) for s in SAMPLES)


def test_what_is_seen_once_or_stays_has_no_direction() -> None:
    mask = torch.zeros(4, 8, 8, dtype=torch.bool)
    assert direction(mask) is None
    mask[2, 3:5, 3:5] = True
    assert direction(mask) is None
    mask[1] = mask[2]
    assert direction(mask) is None  # it stays where it is
    mask[3, 3:5, 5:7] = True
    assert direction(mask) == "right"


def test_phrases_of_another_world_are_refused() -> None:
    sample = dataclasses.replace(SAMPLES[0], entities=("tabby cat",))
    with pytest.raises(ValueError, match="tabby"):
        find_subjects(sample.video_THWC, sample.entities)
