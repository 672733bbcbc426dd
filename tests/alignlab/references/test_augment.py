"""RefAlign's augmentations: what each setting does, and that the background stays white."""

import numpy as np
import pytest
import torch

from alignlab.errors import UserError
from alignlab.references.augment import Augmentations, Picture, augmented, read_augmentations

NOTHING = {name: 0.0 for name in Augmentations.model_fields}


def changed(crop_HWC: Picture, seed: int = 0, **settings: float) -> Picture:
    generator = torch.Generator().manual_seed(seed)
    return augmented(crop_HWC, Augmentations(**NOTHING | settings), generator)[0]


@pytest.fixture
def crop() -> Picture:
    """A bar on the left of a picture that is wider than high, with noise in it."""
    crop_HWC = np.full((40, 60, 4), 255, np.uint8)
    crop_HWC[..., 3] = 0
    noise = np.random.default_rng(0).integers(40, 200, (30, 20, 3))
    crop_HWC[5:35, 10:30, :3] = noise
    crop_HWC[5:35, 10:30, 3] = 255
    return crop_HWC


def middle(crop_HWC: Picture) -> tuple[float, float]:
    rows, columns = np.nonzero(crop_HWC[..., 3])
    return float(rows.mean()), float(columns.mean())


def test_with_all_at_0_a_crop_stays_as_it_is(crop: Picture) -> None:
    assert np.array_equal(changed(crop), crop)


def test_the_background_stays_white_and_the_size_as_it_is(crop: Picture) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        picture, drawn = augmented(crop, Augmentations(), generator)
        assert picture.shape == crop.shape and set(np.unique(picture[..., 3])) == {0, 255}
        assert (picture[picture[..., 3] == 0][:, :3] == 255).all() and drawn


def test_a_flip_mirrors_left_and_right(crop: Picture) -> None:
    assert np.array_equal(changed(crop, flip=1.0), crop[:, ::-1])


def test_geometry_moves_the_subject_as_far_as_asked(crop: Picture) -> None:
    shifts = [changed(crop, seed, shift=0.1) for seed in range(30)]
    offsets = np.array([middle(picture) for picture in shifts]) - middle(crop)
    assert (np.abs(offsets) <= [4.6, 6.6]).all() and (np.abs(offsets).max(0) > [2.5, 4]).all()
    areas = [changed(crop, seed, scale=0.2)[..., 3].mean() for seed in range(30)]
    low, high = min(areas) / crop[..., 3].mean(), max(areas) / crop[..., 3].mean()
    assert 0.6 < low < 0.8 and 1.2 < high < 1.45  # squares of 0.8 and 1.2, cut at the border
    turned = changed(crop, 3, rotation=90.0)
    assert abs(int((turned[..., 3] > 0).sum()) - 600) < 300
    square = np.full((41, 41, 4), 255, np.uint8)
    leaning = changed(square, 1, shear=20.0)
    kept = (leaning[..., 3] > 0).mean()
    assert 0.6 < kept < 1 and leaning[20, 20, 3] == 255
    narrow = changed(square, 1, perspective=1.0, perspective_share=1.0)
    assert (narrow[..., 3] > 0).mean() < kept + 0.3


def test_a_turn_goes_about_the_centre_by_the_drawn_angle() -> None:
    crop = np.full((61, 61, 4), 255, np.uint8)
    crop[..., 3] = 0
    crop[28:33, 50:55, 3] = 255  # 22 pixels right of the centre
    settings = Augmentations(**NOTHING | {"rotation": 90.0})
    for seed in range(5):
        picture, drawn = augmented(crop, settings, torch.Generator().manual_seed(seed))
        row, column = middle(picture)
        angle = np.rad2deg(np.arctan2(row - 30, column - 30))
        assert abs(angle - drawn["rotation"]) < 1.5
        assert abs(np.hypot(row - 30, column - 30) - 22) < 0.7


def test_colour_and_brightness_change_the_subject_by_no_more_than_asked(crop: Picture) -> None:
    is_subject = crop[..., 3] == 255
    for seed in range(10):
        moved = changed(crop, seed, colour=0.1).astype(int) - crop
        assert (np.ptp(moved[is_subject][:, :3], axis=0) <= 1).all()  # the same everywhere
        assert 0 < np.abs(moved).max() <= 26
        ratio = changed(crop, seed, brightness=0.1)[is_subject][:, :3] / crop[is_subject][:, :3]
        assert 0.87 < ratio.min() and ratio.max() < 1.13 and ratio.std() < 0.01


def test_blur_smooths_and_large_crops_alone_at_refaligns_setting(crop: Picture) -> None:
    plain = crop[10:30, 15:25, :3].astype(float).std()
    spreads = [changed(crop, s, blur=0.2)[10:30, 15:25, :3].std() for s in range(10)]
    assert min(spreads) < 0.6 * plain
    # the kernel of a crop of 60 pixels has one pixel at most: 60 / 50, odd
    assert np.array_equal(changed(crop, 1, blur=0.02), crop)


def test_a_subject_that_would_be_moved_out_is_drawn_again() -> None:
    crop = np.full((40, 40, 4), 255, np.uint8)
    crop[..., 3] = 0
    crop[0:2, 0:2, 3] = 255
    for seed in range(20):
        assert (changed(crop, seed, rotation=45.0)[..., 3] > 0).any()


def test_settings_are_read_from_the_option() -> None:
    assert read_augmentations("none") is None
    assert read_augmentations("refalign") == Augmentations()
    assert read_augmentations("refalign, rotation=20,blur=0") == Augmentations(rotation=20, blur=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("simclr", "unknown augmentation 'simclr'"),
        ("refalign,rotate=3", "unknown setting 'rotate', did you mean 'rotation'"),
        ("refalign,blur", "'blur' has no value: write blur=NUMBER"),
        ("refalign,flip=2", "flip: Input should be less than or equal to 1"),
        ("refalign,flip=often", "flip: Input should be a valid number"),
        ("none,flip=1", "nothing reads 'flip=1' with none"),
    ],
)
def test_options_that_mean_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^--augment: {message}"):
        read_augmentations(text)
