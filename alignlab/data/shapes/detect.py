"""Where a clip of the shapes world that nobody drew, a generated one, shows its subjects.

A caption names a subject by its colour, and the colours of a clip are distinct: a subject is looked
for where the frame has its colour, whatever its shape and texture. Lightness is ignored, since
backgrounds are shaded. Shape letters: T frames, H height, W width, E entities, Q hues.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignlab.data.shapes.world import ACCENTS, BACKGROUNDS, COLORS, MOTIONS

GAP = 0.14  # of the side: what a texture's second colour may cut out of a subject
OUTLINE = 0.03  # of the side: a plain subject's outline, and pixels mixed with the background
SMALLEST = 0.015  # of the frame: the least that counts as a subject; drawn ones have 0.05
PALE = 0.6  # share of a colour's hue that is left where it mixes with a grey one
PALE_BLUE = 0.75  # nearer to the full hue, since navy, an accent, is a paler blue
NAMES = tuple(COLORS)


def _palette() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Hues `(Q, 3)` of full and pale colours, then of all else; which colour each is, or -1."""
    rgb_Q3 = np.array([*COLORS.values(), *BACKGROUNDS.values(), *ACCENTS.values()], np.float32)
    hues_Q3 = rgb_Q3 - rgb_Q3.mean(1, keepdims=True)
    count = len(COLORS)
    pale = np.array([PALE_BLUE if name == "blue" else PALE for name in COLORS], np.float32)
    colours_Q = np.concatenate([np.arange(count), np.full(len(rgb_Q3) - count, -1)])
    return (
        np.concatenate([hues_Q3, pale[:, None] * hues_Q3[:count]]),
        np.concatenate([colours_Q, np.arange(count)]),
    )


_HUES_Q3, _COLOURS_Q = _palette()


@dataclass(frozen=True)
class Regions:
    """The coloured parts of a clip.

    Args:
        masks_ETHW: bool, the region of each named subject; false throughout where it is not shown.
        parts_T: how many separate parts, of any of the world's colours, each frame shows.
    """

    masks_ETHW: Tensor
    parts_T: Tensor


def find_subjects(video_THWC: Tensor, phrases: tuple[str, ...]) -> Regions:
    """Looks for the subjects that phrases such as "red striped circle" name.

    A pixel belongs to the colour whose hue (its RGB less their mean) is nearest, full or paled;
    backgrounds and accents of the world are candidates too. Gaps as wide as a stripe are closed
    and a rim as wide as an outline is added, except where another colour lies. Parts smaller than
    1.5% of the frame are no subject.

    Args:
        video_THWC: uint8 frames.
        phrases: of the shapes world; the first word is the colour.

    Raises:
        ValueError: a phrase begins with no colour of that world.
    """
    video = video_THWC.cpu().numpy().astype(np.float32)
    # |a - b|^2 without |a|^2, which is the same for all; a hue's sum is 0, so the mean drops out
    distance_THWQ = (_HUES_Q3**2).sum(1) - 2.0 * video @ _HUES_Q3.T
    colour_THW = _COLOURS_Q[distance_THWQ.argmin(-1)]
    wanted = [_colour_of(phrase) for phrase in phrases]
    masks = np.zeros((len(phrases), *colour_THW.shape), np.bool_)
    parts = np.zeros(len(colour_THW), np.int64)
    for t, colour_HW in enumerate(colour_THW):
        for colour in range(len(NAMES)):
            region_HW, count = _region(colour_HW, colour)
            parts[t] += count
            if colour in wanted:
                masks[wanted.index(colour), t] = region_HW
    return Regions(torch.from_numpy(masks), torch.from_numpy(parts))


def direction(mask_THW: Tensor) -> str | None:
    """Where a region's centre moves most, as captions call it; None: it stays, or is seen once."""
    seen = mask_THW.flatten(1).any(1).nonzero()[:, 0].tolist()
    if len(seen) < 2:
        return None
    first, last = (mask_THW[t].nonzero().double().mean(0) for t in (seen[0], seen[-1]))
    dy, dx = (last - first).tolist()
    if dx == dy == 0:
        return None
    return max(MOTIONS, key=lambda name: dx * MOTIONS[name][0] + dy * MOTIONS[name][1])


def _colour_of(phrase: str) -> int:
    name = phrase.split()[0]
    if name not in NAMES:
        raise ValueError(f"{phrase!r} begins with no colour of the shapes world")
    return NAMES.index(name)


def _region(colour_HW: NDArray[np.int64], colour: int) -> tuple[NDArray[np.bool_], int]:
    """The parts of a colour that are large enough, and how many there are."""
    own = (colour_HW == colour).astype(np.uint8)
    if not own.any():
        return own.astype(np.bool_), 0
    side = min(own.shape)
    closed = cv2.morphologyEx(own, cv2.MORPH_CLOSE, _disc(GAP * side))
    other = (colour_HW >= 0) & (colour_HW != colour)
    closed[other] = 0
    count, labels, stats, _ = cv2.connectedComponentsWithStats(closed, connectivity=8)
    large = [i for i in range(1, count) if stats[i, cv2.CC_STAT_AREA] >= SMALLEST * own.size]
    region = np.isin(labels, large).astype(np.uint8)
    rimmed = cv2.dilate(region, _disc(2 * OUTLINE * side)).astype(np.bool_)
    return rimmed & ~other, len(large)


def _disc(diameter: float) -> NDArray[np.uint8]:
    width = 2 * round(diameter / 2) + 1
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width)), np.uint8)
