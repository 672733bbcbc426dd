"""Flow matching: noise levels, loss weights, Euler sampling."""

import math

import pytest
import torch
from torch import Tensor

from alignlab.config.parts import FlowConfig
from alignlab.losses.gate import PowerGate, gate_weights
from alignlab.randomness import generator
from alignlab.training.flow_matching import (
    FlowWeights,
    draw_sigma,
    euler_sample,
    flow_loss,
    interpolate,
    shifted,
    train_levels,
)

DRAWS = 4000


def draws(**settings: object) -> Tensor:
    config = FlowConfig.model_validate(settings)
    levels = [draw_sigma(config, generator(0, "sigma", i)) for i in range(DRAWS)]
    return torch.tensor(levels, dtype=torch.float64)


def test_shift_five_is_refaligns_formula() -> None:
    u = torch.tensor([0.0, 0.1, 0.5, 0.999, 1.0], dtype=torch.float64)
    torch.testing.assert_close(shifted(u, 5.0), 5 * u / (1 + 4 * u))
    assert torch.equal(shifted(u, 1.0), u)


def test_training_levels_are_a_thousand_up_to_pure_noise() -> None:
    levels = train_levels(FlowConfig())
    assert len(levels) == 1000 and levels[-1] == 1.0
    torch.testing.assert_close(levels[0].item(), 5 * 0.001 / (1 + 4 * 0.001))
    assert (levels.diff() > 0).all()
    torch.testing.assert_close(
        train_levels(FlowConfig(sampler="uniform")),
        torch.arange(1, 1001, dtype=torch.float64) / 1000,
    )


def test_wan_gaussian_weights_are_refaligns() -> None:
    levels = train_levels(FlowConfig())
    weights = FlowWeights(FlowConfig(weighting="wan_gaussian"))(levels)
    assert weights[-1] == 0.0
    assert weights.mean().item() == pytest.approx(1.0, abs=1e-9)
    assert (weights >= 0).all()
    assert weights.max().item() == pytest.approx(2.08, abs=0.005)
    assert levels[weights.argmax()].item() == pytest.approx(0.5, abs=0.005)


def test_without_weighting_every_level_counts_as_one() -> None:
    levels = torch.tensor([0.01, 0.5, 1.0])
    assert torch.equal(FlowWeights(FlowConfig())(levels), torch.ones(3))


def test_mean_of_refaligns_cubic_gate_over_training() -> None:
    levels = train_levels(FlowConfig())
    gate = gate_weights(PowerGate(kind="power", p=3), levels)
    assert gate.mean().item() == pytest.approx(0.534, abs=5e-4)


def test_uniform_draws_every_level_alike() -> None:
    sigma = draws(sampler="uniform")
    assert sigma.min() >= 0.001 and sigma.max() <= 1.0
    counts = torch.histc(sigma, 10, 0, 1)
    assert ((counts / DRAWS - 0.1).abs() < 0.025).all()


def test_shifted_draws_are_the_shift_of_uniform_ones() -> None:
    torch.testing.assert_close(
        draws(sampler="shifted", shift=3.0), shifted(draws(sampler="uniform"), 3.0)
    )


@pytest.mark.parametrize("shift", [1.0, 12.0])
def test_logit_normal_has_its_mean_and_spread_before_the_shift(shift: float) -> None:
    sigma = draws(sampler="logit_normal", shift=shift, logit_mean=-0.5, logit_std=0.8)
    logit = torch.logit(sigma) - math.log(shift)  # the shift adds log(shift) to the logit
    assert logit.mean().item() == pytest.approx(-0.5, abs=0.05)
    assert logit.std().item() == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(
    ("sampler", "change"),
    [
        ("shifted", {"shift": 3.0}),
        ("shifted", {"sampler": "uniform"}),
        ("logit_normal", {"shift": 3.0}),
        ("logit_normal", {"logit_mean": 1.0}),
        ("logit_normal", {"logit_std": 2.0}),
        ("logit_normal", {"sampler": "shifted"}),
    ],
)
def test_every_sampler_setting_moves_the_levels(sampler: str, change: dict[str, object]) -> None:
    base = FlowConfig.model_validate({"sampler": sampler})
    other = FlowConfig.model_validate({"sampler": sampler, **change})
    one, two = (draw_sigma(config, generator(0, "sigma", 3)) for config in (base, other))
    assert abs(one - two) > 1e-3


def test_the_target_of_the_flow_is_noise_minus_clean() -> None:
    rng = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, 2, 2, generator=rng), torch.randn(2, 3, 4, 2, 2)
    sigma_B = torch.tensor([0.25, 0.75])
    noisy = interpolate(clean, noise, sigma_B)
    torch.testing.assert_close(noisy[0], 0.75 * clean[0] + 0.25 * noise[0])
    assert torch.equal(flow_loss(noise - clean, clean, noise), torch.zeros(2))
    # the loss of a sample is its own mean of squares
    off = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(
        flow_loss(noise - clean + off, clean, noise), torch.tensor([1.0, 4.0])
    )


@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (7, 5.0), (50, 1.0)])
def test_euler_reaches_the_clean_end_of_a_straight_path(steps: int, shift: float) -> None:
    rng = torch.Generator().manual_seed(0)
    clean = torch.randn(3, 2, 2, generator=rng, dtype=torch.float64)
    noise = torch.randn(3, 2, 2, generator=rng, dtype=torch.float64)
    asked: list[float] = []

    def velocity_at(latents: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        torch.testing.assert_close(latents, (1 - sigma) * clean + sigma * noise)
        return (latents - clean) / sigma  # the field of one data point

    found = euler_sample(velocity_at, noise, steps=steps, shift=shift)
    torch.testing.assert_close(found, clean)
    evenly = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    torch.testing.assert_close(torch.tensor(asked, dtype=torch.float64), shifted(evenly, shift))


def test_euler_follows_a_linear_field_to_first_order() -> None:
    # dx/dsigma = x from 1 to 0 ends at x / e
    errors = []
    for steps in (50, 100):
        end = euler_sample(lambda x, _: x, torch.ones(1), steps=steps, shift=1.0)
        errors.append(abs(end.item() - math.exp(-1)))
    assert errors[1] < 0.002
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.1)
