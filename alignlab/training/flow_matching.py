"""Flow matching: noise levels, loss weights, and Euler sampling.

sigma in (0, 1] is the noise level after the shift, 1 is pure noise; the model's timestep is
1000 sigma, and the target is `noise - clean`. Shape letters: B batch, then latent dimensions.
"""

from collections.abc import Callable
from itertools import islice, pairwise, product

import torch
from torch import Tensor

from alignlab.config.parts import FlowConfig
from alignlab.config.run import RunConfig
from alignlab.randomness import generator

HISTOGRAM_DRAWS = 10_000
TRAIN_STEPS = 1000  # the discrete noise levels of Wan and of RefAlign's code


def shifted(u: Tensor, shift: float) -> Tensor:
    """`shift u / (1 + (shift - 1) u)`: more of the levels near pure noise for shift > 1."""
    return shift * u / (1 + (shift - 1) * u)


def train_levels(config: FlowConfig) -> Tensor:
    """The 1000 noise levels that `shifted` and `uniform` draw from, ascending, float64."""
    u = torch.arange(1, TRAIN_STEPS + 1, dtype=torch.float64) / TRAIN_STEPS
    return u if config.sampler == "uniform" else shifted(u, config.shift)


def representative_levels(config: FlowConfig) -> Tensor:
    """Noise levels that stand for what `draw_sigma` draws, ascending, float64.

    All 1000 of `train_levels`, or 10,000 evenly spaced quantiles of `logit_normal`.
    """
    if config.sampler != "logit_normal":
        return train_levels(config)
    share = (torch.arange(HISTOGRAM_DRAWS, dtype=torch.float64) + 0.5) / HISTOGRAM_DRAWS
    z = torch.special.ndtri(share)
    return shifted(torch.sigmoid(config.logit_mean + config.logit_std * z), config.shift)


def draw_sigma(config: FlowConfig, rng: torch.Generator) -> float:
    """One noise level.

    `uniform` and `shifted` pick one of `train_levels` (RefAlign's code: shifted, shift 5);
    `logit_normal` draws `u = sigmoid(N(mean, std))` and shifts it (SARA: shift 12).
    """
    if config.sampler == "logit_normal":
        z = torch.randn((), generator=rng, dtype=torch.float64)
        u = torch.sigmoid(config.logit_mean + config.logit_std * z)
        return float(shifted(u, config.shift))
    pick = int(torch.randint(TRAIN_STEPS, (), generator=rng))
    return float(train_levels(config)[pick])


def timestep_histogram(config: RunConfig) -> dict[str, float]:
    """Share of the noise levels in each tenth of [0, 1], over the run's first 10,000 draws."""
    every = product(range(config.steps), range(config.optim.batch_size))
    addresses = list(islice(every, HISTOGRAM_DRAWS))
    counts = [0] * 10
    for step, sample in addresses:
        sigma = draw_sigma(config.flow, generator(config.seed, "sigma", step, sample))
        counts[min(9, int(sigma * 10))] += 1
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
