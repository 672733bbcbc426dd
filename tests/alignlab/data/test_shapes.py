"""The generated data set: deterministic, and exact where it claims to be."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.config.data import ShapesConfig
from alignlab.data.shapes.dataset import ShapesDataset
from alignlab.data.shapes.world import COLORS, all_subjects


def dataset(split: str = "train", **settings: object) -> ShapesDataset:
    return ShapesDataset(ShapesConfig(**settings), split)  # type: ignore[arg-type]


def test_an_index_always_gives_the_same_clip() -> None:
    first, again = dataset()[7], dataset(train_clips=9)[7]
    assert first.key == again.key and first.caption == again.caption
    assert torch.equal(first.video_THWC, again.video_THWC)
    assert torch.equal(first.references[1].image_HWC, again.references[1].image_HWC)


def test_splits_seeds_and_indices_give_different_clips() -> None:
    clips = [dataset()[0], dataset()[1], dataset("val")[0], dataset(seed=1)[0]]
    assert len({c.video_THWC.numpy().tobytes() for c in clips}) == len(clips)
    assert len({c.key for c in clips}) == len(clips)


@settings(max_examples=15, deadline=None)
@given(
    frames=st.sampled_from([1, 5, 13]),
    size=st.sampled_from([(64, 64), (32, 48), (96, 64)]),
    limits=st.sampled_from([(0, 0), (0, 3), (1, 1), (2, 3)]),
    index=st.integers(0, 40),
)
def test_every_size_and_reference_count(
    frames: int, size: tuple[int, int], limits: tuple[int, int], index: int
) -> None:
    sample = dataset(frames=frames, size=size, references=limits)[index]
    subjects = len(sample.entities)
    assert sample.video_THWC.shape == (frames, *size, 3)
    assert sample.video_THWC.dtype == torch.uint8
    assert limits[0] <= len(sample.references) <= limits[1]
    assert subjects == max(1, len(sample.references))
    assert sample.masks_ETHW is not None and sample.flow_THWC is not None
    assert sample.masks_ETHW.shape == (subjects, frames, *size)
    assert sample.flow_THWC.shape == (frames - 1, *size, 2)
    assert sample.masks_ETHW.sum(0).max() <= 1  # a pixel shows one subject


def test_the_caption_names_every_subject_and_how_it_moves() -> None:
    for index in range(20):
        sample = dataset()[index]
        for phrase, reference in zip(sample.entities, sample.references, strict=True):
            assert reference.phrase == phrase
            assert phrase in sample.caption
            assert reference.name.split("-")[0] == phrase.split()[0]
        assert len({phrase.split()[0] for phrase in sample.entities}) == len(sample.entities)


def test_the_direction_in_the_caption_is_the_direction_of_the_flow() -> None:
    axes = {"right": (0, 1), "left": (0, -1), "down": (1, 1), "up": (1, -1)}
    for index in range(20):
        sample = dataset()[index]
        assert sample.masks_ETHW is not None and sample.flow_THWC is not None
        for phrase, mask_THW in zip(sample.entities, sample.masks_ETHW, strict=True):
            said = sample.caption.split(f"{phrase} moves ")[1].split(",")[0]
            axis, sign = axes[said]
            moved = sample.flow_THWC[mask_THW[:-1]].mean(0)
            if mask_THW[:-1].sum() > 200:  # rotation averages out over a whole subject only
                assert moved[axis] * sign > 0.5
                assert abs(moved[axis]) > abs(moved[1 - axis])


def test_flow_leads_to_the_same_point_in_the_next_frame() -> None:
    sample = dataset(frames=5, size=(128, 128), references=(1, 1))[0]
    video = sample.video_THWC.float().numpy()
    assert sample.masks_ETHW is not None and sample.flow_THWC is not None
    mask_THW, flow = sample.masks_ETHW[0].numpy(), sample.flow_THWC.numpy()
    errors, still = [], []
    for t in range(4):
        yy, xx = np.nonzero(mask_THW[t])
        x = np.rint(xx + flow[t, yy, xx, 0]).astype(int)
        y = np.rint(yy + flow[t, yy, xx, 1]).astype(int)
        inside = (x >= 0) & (x < 128) & (y >= 0) & (y < 128)
        here, there = video[t, yy[inside], xx[inside]], video[t + 1, y[inside], x[inside]]
        errors.append(np.abs(here - there).mean())
        still.append(np.abs(here - video[t + 1, yy[inside], xx[inside]]).mean())
    assert np.mean(errors) < 0.12 * np.mean(still)


def test_a_reference_shows_its_subject_alone_on_white_in_another_pose() -> None:
    sample = dataset()[4]
    for reference in sample.references:
        outside = reference.image_HWC[~reference.mask_HW].float()
        assert reference.mask_HW.float().mean() > 0.1
        assert outside.mean() > 250
        painted = reference.image_HWC[reference.mask_HW].float()
        wanted = torch.tensor(COLORS[reference.name.split("-")[0]], dtype=torch.float32)
        assert (painted - wanted).abs().sum(1).lt(30).float().mean() > 0.2
    frames = {f.numpy().tobytes() for f in sample.video_THWC}
    assert all(r.image_HWC.numpy().tobytes() not in frames for r in sample.references)


def test_the_accent_is_part_of_the_identity_but_not_of_the_phrase() -> None:
    subjects = all_subjects()
    assert len({s.name for s in subjects}) == len(subjects) == 768
    assert len({s.phrase for s in subjects}) == 192


def test_an_index_outside_the_split_is_an_error() -> None:
    with pytest.raises(IndexError, match="32 val clips, no clip 32"):
        dataset("val")[32]
