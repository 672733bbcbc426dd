"""Pixels of label images that are neither an entity's nor background, in smaller clips."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from alignlab.data.masks import clip_masks


def test_smaller_pixels_that_undecided_ones_keep_from_a_half_are_undecided(tmp_path: Path) -> None:
    for index in range(2):
        labels = Image.new("L", (48, 32), 0)
        labels.paste(1, (0, 0, 48, 8))
        if index == 0:  # of each pixel of the smaller clip three quarters at left, one at right
            for row, column in product(range(10, 26, 2), range(0, 48, 2)):
                labels.paste(255, (column, row, column + 1, row + 1))
                if column < 24:
                    labels.paste(255, (column, row + 1, column + 2, row + 2))
        labels.save(tmp_path / f"{index:05d}.png")
    row_of: Any = SimpleNamespace(masks=tmp_path, entities=("sky",))
    clip: Any = SimpleNamespace(frame_indices=[0, 1], source_size_HW=(32, 48), pixel_aspect=1.0)
    masks_ETHW, undecided_THW = clip_masks(row_of, clip, (16, 24))
    assert undecided_THW is not None and not (masks_ETHW.any(0) & undecided_THW).any()
    assert masks_ETHW[0, :, :4].all() and not masks_ETHW[0, :, 5:].any()
    assert undecided_THW[0, 7:11, 1:11].all() and not undecided_THW[1].any()
    assert not undecided_THW[0, :, 13:].any() and not undecided_THW[0, 15:].any()
