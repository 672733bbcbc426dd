"""CKA, CKNNA and iREPA's spatial measures against what the authors' code gave."""

import pytest
import torch

from alignlab.metrics import cka, cknna
from alignlab.metrics.spatial import spatial_structure
from authors_values import stored_numbers, wave


def test_cka_and_cknna_are_the_platonic_hypothesis_codes() -> None:
    expected = stored_numbers("platonic")
    left = wave(40, 7, phase=1.0)
    right = left @ wave(7, 9, phase=2.0) + 0.8 * wave(40, 9, phase=3.0)
    for k in (5, 10):
        assert cknna(left, right, k=k) == pytest.approx(expected[f"cknna_{k}"], rel=1e-9)
    # up to the 1e-6 that the code adds to the root
    assert cka(left, right) == pytest.approx(expected["cka"], rel=1e-5)
    assert cka(left, right, unbiased=True) == pytest.approx(expected["unbiased_cka"], rel=1e-4)


def test_spatial_measures_are_irepas() -> None:
    tokens = wave(1, 80, 5, phase=3.0)[0] + wave(1, 5, phase=4.0)
    found = spatial_structure(tokens, (8, 10), (torch.arange(80) % 8 < 4).int())
    assert found == pytest.approx(stored_numbers("spatial"), abs=1e-6)
