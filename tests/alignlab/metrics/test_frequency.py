"""Spatial frequencies of tokens, and how steady they are from frame to frame."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignlab.metrics import frequency_bands, temporal_stability


def wave(size: tuple[int, int], rows: int, columns: int) -> Tensor:
    """Tokens of width 2 that are one cosine over the grid, and a constant."""
    height, width = size
    h = torch.cos(torch.pi * rows * (torch.arange(height) + 0.5) / height)
    w = torch.cos(torch.pi * columns * (torch.arange(width) + 0.5) / width)
    grid = h[:, None] * w
    return torch.stack([grid.flatten(), torch.full((height * width,), 5.0)], 1)


@pytest.mark.parametrize(
    ("rows", "columns", "band"),
    [(1, 0, 0), (0, 2, 0), (3, 0, 1), (0, 6, 2), (4, 6, 2), (7, 0, 3), (7, 11, 3), (6, 6, 3)],
)
def test_a_wave_is_in_the_band_of_its_frequency(rows: int, columns: int, band: int) -> None:
    frequency = math.hypot(rows / 8, columns / 12)
    assert band == min(3, int(frequency * 4))
    found = frequency_bands(wave((8, 12), rows, columns), (8, 12))
    assert found == pytest.approx([float(i == band) for i in range(4)], abs=1e-9)


def test_a_slope_over_the_frame_has_no_high_frequencies() -> None:
    ramp = torch.arange(16.0).repeat(16, 1).flatten()[:, None]
    low, *_, high = frequency_bands(ramp, (16, 16))
    assert low > 0.99 and high < 0.001  # a Fourier transform would see an edge


def test_tokens_without_neighbours_have_the_powers_that_are_documented() -> None:
    tokens = torch.randn(64 * 64, 40, generator=torch.Generator().manual_seed(0))
    assert frequency_bands(tokens, (64, 64)) == pytest.approx([0.05, 0.15, 0.25, 0.56], abs=0.02)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**31))
def test_shares_sum_to_one_or_there_are_none(height: int, width: int, dim: int, seed: int) -> None:
    tokens = torch.randn(height * width, dim, generator=torch.Generator().manual_seed(seed))
    found = frequency_bands(tokens, (height, width))
    assert found == () if height * width == 1 else sum(found) == pytest.approx(1)
    assert frequency_bands(tokens * 3 + 7, (height, width)) == pytest.approx(found, abs=1e-5)


def test_equal_tokens_have_no_frequency_and_wrong_grids_are_refused() -> None:
    assert frequency_bands(torch.full((12, 3), 0.1), (3, 4)) == ()
    assert frequency_bands(torch.zeros(12, 3), (3, 4)) == ()
    with pytest.raises(ValueError, match="do not fill"):
        frequency_bands(torch.zeros(12, 3), (3, 5))


def test_stability_is_a_cosine_of_what_lies_beside_the_mean() -> None:
    mean = torch.tensor([10.0, 10.0])
    still = mean + torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert temporal_stability(torch.stack([still, still]), mean) == pytest.approx(1)
    swapped = still.flip(0)
    assert temporal_stability(torch.stack([still, swapped]), mean) == pytest.approx(0)
    assert temporal_stability(torch.stack([still, 2 * mean - still]), mean) == pytest.approx(-1)
    assert temporal_stability(still[None], mean) is None
