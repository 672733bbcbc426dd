"""Weights that are measured: what a sequence of gradients makes of them, and what they refuse."""

import doctest

import pytest
import torch

from alignlab.losses import weight as weights
from alignlab.losses.repa import RepaConfig
from alignlab.losses.search_space import NumberRange
from alignlab.losses.weight import MAX_WEIGHT, GradientShare, MeasuredWeight

SHARE = GradientShare(gradient_share=0.1, steps=3)
NORMS = [(2.0, 8.0), (3.0, 0.0), (1.0, 4.0), (9.0, 1.0)]
"""Of the flow loss's gradient and of the objective's, step by step; the last one comes too late."""


def seen(weight: MeasuredWeight, norms: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """After each step, the share that the objective had in it and the weight of the next one."""
    found = []
    for pair in norms:
        share = weight.see(torch.tensor(pair).square())
        found.append((float(share), float(weight.value)))
    return found


def test_a_measured_weight_is_the_share_of_sums_and_is_held() -> None:
    weight = MeasuredWeight(SHARE)
    assert float(weight.value) == 0.0 and not weight.is_held
    first, second, third, late = seen(weight, NORMS)
    assert first == pytest.approx((0.0, 0.1 * 2 / 8))  # no weight was in force yet
    assert second == pytest.approx((0.0, 0.1 * 5 / 8))  # nothing to align, and no infinite weight
    assert third == pytest.approx((0.1 * 5 / 8 * 4 / 1, 0.1 * 6 / 12))
    assert weight.is_held and weight.num_measured == 3
    assert late == pytest.approx((0.1 * 6 / 12 / 9, 0.1 * 6 / 12)) and late[1] == third[1]
    assert weight.why_useless() == ""


def test_a_measured_weight_goes_on_from_its_state() -> None:
    whole, before, after = (MeasuredWeight(SHARE) for _ in range(3))
    expected = seen(whole, NORMS)
    found = seen(before, NORMS[:2])
    after.load_state_dict(before.state_dict())
    assert found + seen(after, NORMS[2:]) == expected
    assert after.is_held


@pytest.mark.parametrize(
    ("norms", "why"),
    [
        ((1.0, 0.0), "its loss had no gradient in the 3 steps"),
        ((0.0, 1.0), "the flow loss had no gradient in the 3 steps"),
        ((1.0, 1e-9), "so small that the weight would be 1e.08, more than 1e.06"),
    ],
)
def test_a_weight_that_no_gradient_gives_is_told_and_never_infinite(
    norms: tuple[float, float], why: str
) -> None:
    weight = MeasuredWeight(SHARE)
    for share, value in seen(weight, [norms] * 3):
        assert 0.0 <= share < float("inf") and 0.0 <= value <= MAX_WEIGHT
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(weight.why_useless())
    assert MeasuredWeight(SHARE).why_useless() == ""  # not all steps were measured


def test_a_share_is_searched_in_the_place_of_a_number() -> None:
    config = RepaConfig.model_validate({"teacher": "dino", "weight": SHARE})
    space = config.search_space
    assert list(space)[:2] == ["weight.gradient_share", "blocks"]
    assert space["weight.gradient_share"] == NumberRange(0.01, 1.0, log=True)


def test_a_weight_is_told_in_words() -> None:
    assert doctest.testmod(weights).attempted == 3 and doctest.testmod(weights).failed == 0
