"""Noise levels of one expert: the run's own density, given that the level is that expert's."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from alignlab.config.parts import FlowConfig
from alignlab.errors import UserError
from alignlab.models.experts import WHOLE, Window
from alignlab.randomness import generator
from alignlab.training.flow_matching import (
    check_window,
    draw_sigma,
    representative_levels,
    train_levels,
)
from alignlab.training.two_levels import TwoLevels

HIGH, LOW = Window(0.875, 1.0), Window(0.0, 0.875)
DRAWS = 2000
SARA = {"sampler": "logit_normal", "shift": 12.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "sara": SARA,
    "upper tail": {"sampler": "logit_normal", "shift": 0.01, "logit_std": 0.7},
    "lower tail": {"sampler": "logit_normal", "shift": 900.0, "logit_mean": 2.0},
    "shifted": {"sampler": "shifted", "shift": 5.0},
    "uniform": {"sampler": "uniform"},
}


def draws(config: FlowConfig, window: Window, count: int = DRAWS) -> Tensor:
    levels = [draw_sigma(config, generator(0, "sigma", i), window) for i in range(count)]
    return torch.tensor(levels, dtype=torch.float64)


def distribution(config: FlowConfig, sigma: Any) -> Any:
    """Share of all draws up to a level, of a continuous density; written anew."""
    u = sigma / (config.shift - (config.shift - 1) * sigma)
    with np.errstate(divide="ignore"):
        z = (np.log(u) - np.log1p(-u) - config.logit_mean) / config.logit_std
    return stats.norm.cdf(z), stats.norm.sf(z)


def given(config: FlowConfig, window: Window) -> Any:
    """The distribution function of the draws that lie in the window.

    In the upper tail from the shares above, of which floats have digits there.
    """

    def below(sigma: Any) -> Any:
        (low, sigma_cdf, high), (low_sf, sigma_sf, high_sf) = zip(
            *(distribution(config, x) for x in (window.low, sigma, window.high)), strict=True
        )
        if low > 0.5:
            return (low_sf - sigma_sf) / (low_sf - high_sf)
        return (sigma_cdf - low) / (high - low)

    return below


@pytest.mark.parametrize("window", [HIGH, LOW], ids=["high", "low"])
@pytest.mark.parametrize("name", ["sara", "upper tail", "lower tail"])
def test_logit_normal_levels_have_the_density_of_the_run_in_the_window(
    name: str, window: Window
) -> None:
    config = FlowConfig.model_validate(SETTINGS[name])
    drawn = draws(config, window)
    assert stats.kstest(drawn.numpy(), given(config, window)).pvalue > 0.01
    if name == "sara":  # of other settings it is another
        other = FlowConfig.model_validate({**SARA, "shift": 18.0})
        assert stats.kstest(drawn.numpy(), given(other, window)).pvalue < 1e-3


@pytest.mark.parametrize("window", [HIGH, LOW], ids=["high", "low"])
@pytest.mark.parametrize("name", ["shifted", "uniform"])
def test_levels_of_a_table_are_all_drawn_alike_that_are_in_the_window(
    name: str, window: Window
) -> None:
    config = FlowConfig.model_validate(SETTINGS[name])
    table = train_levels(config)
    inside = table[(table >= window.low) & ((table < window.high) | (window.high == 1.0))]
    drawn = draws(config, window, 600)
    places = torch.searchsorted(inside, drawn)
    assert torch.equal(inside[places], drawn)
    counts = torch.histc(places.double(), 10, 0, len(inside))
    expected = torch.histc(torch.arange(len(inside)).double(), 10, 0, len(inside))
    assert stats.chisquare(counts, expected * len(drawn) / len(inside)).pvalue > 0.01


@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.3, 0.05])
@pytest.mark.parametrize("name", SETTINGS)
def test_no_timestep_is_the_other_experts(name: str, boundary: float) -> None:
    """In fp32, as a batch holds levels and a step makes timesteps of them."""
    config = FlowConfig.model_validate(SETTINGS[name])
    high, low = Window(boundary, 1.0), Window(0.0, boundary)
    for window in (high, low):
        sigma_B = draws(config, window, 100).float()
        ends_B = torch.tensor(window.ends, dtype=torch.float32)
        for t in (torch.cat([sigma_B, ends_B]) * 1000).tolist():
            assert (t >= 1000 * boundary) == (window is high) and 0 <= t <= 1000
    assert math.nextafter(low.ends[1], 1.0) < high.ends[0] < low.ends[1] + 1e-7


def test_second_levels_of_a_sample_are_of_the_window_too() -> None:
    levels = TwoLevels(0.5, (2, 2))
    flow = FlowConfig.model_validate(SARA)
    second = levels.drawn(flow, (2, 4, 4), seed=0, step=0, samples=range(60), window=HIGH)
    assert float(second.sigma_B.min()) >= HIGH.low


def test_representative_levels_stand_for_the_draws_of_a_window() -> None:
    for settings in SETTINGS.values():
        config = FlowConfig.model_validate(settings)
        levels = representative_levels(config, HIGH)
        assert (levels.diff() >= 0).all()
        assert float(levels.float()[0]) >= HIGH.low and levels[-1] <= 1.0
        drawn = draws(config, HIGH, 400)
        assert levels.mean().item() == pytest.approx(drawn.mean().item(), abs=6e-3)


def test_without_a_window_nothing_is_drawn_otherwise() -> None:
    for settings in SETTINGS.values():
        config = FlowConfig.model_validate(settings)
        for i in range(20):
            plain = draw_sigma(config, generator(0, "sigma", i))
            assert draw_sigma(config, generator(0, "sigma", i), WHOLE) == plain
    assert [WHOLE.at(share) for share in (0.05, 0.25, 1 / 3)] == [0.05, 0.25, 1 / 3]


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        ({"sampler": "logit_normal", "logit_mean": -30.0, "logit_std": 0.5}, HIGH),
        ({"sampler": "logit_normal", "logit_mean": 30.0, "logit_std": 0.5}, LOW),
        ({"sampler": "shifted", "shift": 1000.0}, Window(0.0, 0.4)),
    ],
)
def test_a_window_in_which_nothing_is_drawn_is_refused(
    settings: dict[str, Any], window: Window
) -> None:
    config = FlowConfig.model_validate(settings)
    with pytest.raises(UserError, match=r"model\.expert: .* draws no noise level") as refused:
        check_window(config, window)
    assert "\n" not in str(refused.value)
    check_window(config, WHOLE)
    check_window(FlowConfig(), HIGH)
