"""Flow matching: noise levels, loss weights, and Euler sampling.

sigma in (0, 1] is the noise level after the shift, 1 is pure noise; the model's timestep is
1000 sigma, and the target is `noise - clean`. Shape letters: B batch, then latent dimensions.
"""

import math
from collections.abc import Callable
from itertools import islice, pairwise, product
from typing import Any

import numpy as np
import torch
from scipy.special import expit, logit, ndtr, ndtri
from torch import Tensor

from alignlab.config.parts import FlowConfig
from alignlab.config.run import RunConfig
from alignlab.errors import UserError
from alignlab.models.experts import WHOLE, Window, noise_window
from alignlab.randomness import generator

HISTOGRAM_DRAWS = 10_000
SMALLEST_SHARE = 1e-250  # of the draws in a window: below it floats run out of digits
TRAIN_STEPS = 1000  # the discrete noise levels of Wan and of RefAlign's code


def shifted(u: Tensor, shift: float) -> Tensor:
    """`shift u / (1 + (shift - 1) u)`: more of the levels near pure noise for shift > 1."""
    return shift * u / (1 + (shift - 1) * u)


def train_levels(config: FlowConfig) -> Tensor:
    """The 1000 noise levels that `shifted` and `uniform` draw from, ascending, float64."""
    u = torch.arange(1, TRAIN_STEPS + 1, dtype=torch.float64) / TRAIN_STEPS
    return u if config.sampler == "uniform" else shifted(u, config.shift)


def representative_levels(config: FlowConfig, window: Window = WHOLE) -> Tensor:
    """Noise levels that stand for what `draw_sigma` draws, ascending, float64.

    All of `train_levels` in the window, or 10,000 evenly spaced quantiles of `logit_normal` there.
    """
    if config.sampler != "logit_normal":
        return _levels_within(config, window)
    share = (torch.arange(HISTOGRAM_DRAWS, dtype=torch.float64) + 0.5) / HISTOGRAM_DRAWS
    if window == WHOLE:
        z = torch.special.ndtri(share)
        return shifted(torch.sigmoid(config.logit_mean + config.logit_std * z), config.shift)
    return torch.from_numpy(np.sort(_logit_normal_within(config, window, share.numpy())))


def draw_sigma(config: FlowConfig, rng: torch.Generator, window: Window = WHOLE) -> float:
    """One noise level.

    `uniform` and `shifted` pick one of `train_levels` (RefAlign's code: shifted, shift 5);
    `logit_normal` draws `u = sigmoid(N(mean, std))` and shifts it (SARA: shift 12). In a window it
    is the same distribution, given that the level lies there: one number is drawn for each.
    """
    if config.sampler == "logit_normal" and window == WHOLE:
        z = torch.randn((), generator=rng, dtype=torch.float64)
        u = torch.sigmoid(config.logit_mean + config.logit_std * z)
        return float(shifted(u, config.shift))
    if config.sampler == "logit_normal":
        share = 1 - float(torch.rand((), generator=rng, dtype=torch.float64))  # in (0, 1]
        return float(_logit_normal_within(config, window, share))
    levels = _levels_within(config, window)
    return float(levels[int(torch.randint(len(levels), (), generator=rng))])


def check_window(config: FlowConfig, window: Window) -> None:
    """Refuses a window in which no noise level is ever drawn.

    Raises:
        UserError: it names the settings.
    """
    if config.sampler == "logit_normal":
        _, below, above = _normal_ends(config, window)
        is_empty = not above - below > SMALLEST_SHARE
    else:
        is_empty = not len(_levels_within(config, window))
    if is_empty:
        raise UserError(
            f"model.expert: it denoises t from {1000 * window.low:g} to {1000 * window.high:g}, "
            f"where flow.sampler={config.sampler} with these settings draws no noise level"
        )


def _levels_within(config: FlowConfig, window: Window) -> Tensor:
    levels = train_levels(config)
    if window == WHOLE:
        return levels
    low, high = window.ends
    return levels[(levels.float() >= low) & (levels.float() <= high)]


def _logit_normal_within(config: FlowConfig, window: Window, share: Any) -> Any:
    """Quantiles of `logit_normal` given the window: exact, by the inverse distribution function.

    Args:
        config: the distribution.
        window: levels after the shift.
        share: which quantiles, in (0, 1]; a number, or an array of them.
    """
    sign, below, above = _normal_ends(config, window)
    z = sign * ndtri(below + (above - below) * share)
    # the shift adds its logarithm to the logit
    sigma = expit(config.logit_mean + config.logit_std * z + math.log(config.shift))
    return np.clip(sigma, *window.ends)  # rounding may go past them


def _normal_ends(config: FlowConfig, window: Window) -> tuple[int, float, float]:
    """A sign, and the normal distribution function at both ends of a window times that sign.

    The sign brings a window in the upper tail into the lower one, where floats are dense (and
    scipy's functions exact: torch's ndtr has no digits below -6).
    """
    ends = np.array([window.low, window.high])
    z = (logit(ends) - math.log(config.shift) - config.logit_mean) / config.logit_std
    sign = -1 if z[0] > 0 else 1
    below, above = sorted(float(x) for x in ndtr(sign * z))
    return sign, below, above


def timestep_histogram(config: RunConfig) -> dict[str, float]:
    """Share of the noise levels in each tenth of [0, 1], over the run's first 10,000 draws.

    With `model.expert` in each tenth of its window.
    """
    window = noise_window(config.model)
    every = product(range(config.steps), range(config.optim.batch_size))
    addresses = list(islice(every, HISTOGRAM_DRAWS))
    counts = [0] * 10
    for step, sample in addresses:
        sigma = draw_sigma(config.flow, generator(config.seed, "sigma", step, sample), window)
        counts[min(9, int(window.share(sigma) * 10))] += 1
    return {f"timesteps/t{i}": count / len(addresses) for i, count in enumerate(counts)}


class FlowWeights:
    """Weight of the flow loss at a noise level.

    `none` is 1. `wan_gaussian` is RefAlign's code: `exp(-2 ((t - 500) / 1000)^2)` over the training
    levels, minus its minimum, scaled to mean 1. It is 0 at pure noise, where the flow loss then
    trains nothing.
    """

    def __init__(self, config: FlowConfig) -> None:
        self.config = config
        bell = self._bell(train_levels(config))
        self._floor = float(bell.min())
        self._scale = 1.0 / float((bell - self._floor).mean())

    def __call__(self, sigma_B: Tensor) -> Tensor:
        """Weights of a batch, `(B,)`, of the dtype of `sigma_B`."""
        if self.config.weighting == "none":
            return torch.ones_like(sigma_B)
        return (self._bell(sigma_B) - self._floor) * self._scale

    @staticmethod
    def _bell(sigma: Tensor) -> Tensor:
        return torch.exp(-2 * (sigma - 0.5) ** 2)


def interpolate(clean: Tensor, noise: Tensor, sigma_B: Tensor) -> Tensor:
    """`(1 - sigma) clean + sigma noise`, per sample."""
    sigma = sigma_B.view(-1, *[1] * (clean.ndim - 1))
    return (1 - sigma) * clean + sigma * noise


def flow_loss(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error against `noise - clean`, one value per sample, `(B,)`, in float32."""
    return (velocity.float() - (noise - clean)).square().flatten(1).mean(1)


def euler_sample(
    velocity_at: Callable[[Tensor, float], Tensor], noise: Tensor, *, steps: int, shift: float
) -> Tensor:
    """Integrates from noise to a clean latent over `steps` shifted Euler steps (RefAlign: 50).

    Args:
        velocity_at: `(latents, sigma) -> velocity`, guidance included.
        noise: the starting latents.
        steps: number of model evaluations.
        shift: shift of the evenly spaced levels 1 .. 0.
    """
    levels = shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()
    latents = noise
    for now, then in pairwise(levels):
        latents = latents + (then - now) * velocity_at(latents, now)
    return latents
