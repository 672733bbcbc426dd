"""The look of charts: colours that everybody can tell apart, and marks where colour does not."""

import itertools
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from alignlab.experiments.charts.look import (
    BASELINE_COLOUR,
    COLOURS,
    DARK_BASELINE,
    DARK_COLOURS,
    PAPERS,
    drawn_variables,
    page_colours,
    styles,
    swatch,
)

Array = npt.NDArray[np.float64]

# Machado, Oliveira and Fernandes (2009), severity 1, in linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
     [0.0193339, 0.1191920, 0.9503041]]
)  # fmt: skip
_WHITE = np.array([0.95047, 1.0, 1.08883])


def linear(colour: str) -> Array:
    parts = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(rgb: Array) -> Array:
    ratio = _TO_XYZ @ np.clip(rgb, 0.0, 1.0) / _WHITE
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", VISION)
@pytest.mark.parametrize(
    "colours", [(*COLOURS, BASELINE_COLOUR), (*DARK_COLOURS, DARK_BASELINE)], ids=PAPERS
)
def test_colours_are_told_apart_with_any_vision(colours: Sequence[str], sight: str) -> None:
    seen = {colour: lab(VISION[sight] @ linear(colour)) for colour in colours}
    nearest = min(
        (float(np.linalg.norm(seen[a] - seen[b])), a, b)
        for a, b in itertools.combinations(colours, 2)
    )
    assert nearest[0] >= 20.0, nearest


def test_colours_stand_out_from_their_paper() -> None:
    weights = np.array([0.2126, 0.7152, 0.0722])
    for pair in page_colours().values():
        for colour, paper in zip(pair, PAPERS, strict=True):
            low, high = sorted((linear(colour) @ weights, linear(paper) @ weights))
            assert (high + 0.05) / (low + 0.05) >= 3.0, (colour, paper)


def test_no_two_of_sixteen_are_drawn_alike() -> None:
    drawn = styles([f"variant-{place}" for place in range(17)], "variant-3")
    assert len({(s.colour, s.line, s.marker, s.face) for s in drawn.values()}) == 17
    in_grey = {(s.dash, s.marker) for s in list(drawn.values())[:9]}
    assert len(in_grey) >= 8, "without colour"
    assert drawn["variant-3"].colour == BASELINE_COLOUR


def test_every_colour_of_a_drawing_is_a_variable_of_the_page() -> None:
    variables = drawn_variables()
    assert {variables[colour] for colour in COLOURS} == {f"--c{place}" for place in range(8)}
    assert len(set(variables.values())) == len(variables)
    for style in styles(["none", "a", "b"], "none").values():
        text = swatch(style)
        assert f"var({style.variable})" in text and not re.search("#[0-9a-f]{6}", text)
