"""Two noise levels in one sample (Self-Flow): a share of the video's tokens has a second one.

Level and tokens are drawn by the address of the sample, as all else is. Shape letters: B batch, C
channels, T latent frames, H, W of latents or of tokens, N = T*H*W video tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from alignlab.config.parts import FlowConfig
from alignlab.models.experts import WHOLE, Window
from alignlab.randomness import generator
from alignlab.training.flow_matching import draw_sigma


@dataclass(frozen=True)
class SecondLevel:
    """The second noise levels of a batch.

    Args:
        sigma_B: of each sample, drawn as the first one is.
        has_BTHW: bool, which tokens of the video have it; the others have the first one.
        patch_HW: of a token, in latents.
    """

    sigma_B: Tensor
    has_BTHW: Tensor
    patch_HW: tuple[int, int]

    def changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with changed tensors, such as moved ones."""
        return replace(self, sigma_B=change(self.sigma_B), has_BTHW=change(self.has_BTHW))

    def cleaner(self, sigma_B: Tensor) -> Tensor:
        """The lower of the two levels of each sample, (B,)."""
        return torch.minimum(sigma_B, self.sigma_B)

    def mixed(
        self, clean_BCTHW: Tensor, noise_BCTHW: Tensor, sigma_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Latents of which each token has its own noise level, and the timesteps of tokens.

        Args:
            clean_BCTHW: latents of the videos.
            noise_BCTHW: as many numbers of noise.
            sigma_B: the first levels.

        Returns:
            (B, C, T, H, W), and (B, N) from 0 to 1000.
        """
        first, second = (x.view(-1, 1, 1, 1) for x in (sigma_B, self.sigma_B))
        level_BTHW = torch.where(self.has_BTHW, second, first)
        height, width = self.patch_HW
        of_latents = level_BTHW.repeat_interleave(height, 2).repeat_interleave(width, 3)[:, None]
        noisy_BCTHW = (1 - of_latents) * clean_BCTHW + of_latents * noise_BCTHW
        return noisy_BCTHW, level_BTHW.flatten(1) * 1000


@dataclass(frozen=True)
class TwoLevels:
    """How second levels are drawn.

    Args:
        mask_ratio: probability of each token to have it.
        patch_HW: of a token, in latents.
    """

    mask_ratio: float
    patch_HW: tuple[int, int]

    def drawn(
        self,
        flow: FlowConfig,
        size: Sequence[int],
        *,
        seed: int,
        step: int,
        samples: range,
        window: Window = WHOLE,
    ) -> SecondLevel:
        """Those of some samples of a step, on the CPU.

        Args:
            flow: distribution of the levels.
            size: (T, H, W) of the latents.
            seed: the run's.
            step: from 0.
            samples: positions inside the step's batch.
            window: where levels are drawn.
        """
        frames, height, width = size
        grid = (frames, height // self.patch_HW[0], width // self.patch_HW[1])
        sigma, has = [], []
        for sample in samples:
            sigma.append(draw_sigma(flow, generator(seed, "second-sigma", step, sample), window))
            rng = generator(seed, "second-tokens", step, sample)
            has.append(torch.rand(grid, generator=rng) < self.mask_ratio)
        return SecondLevel(
            torch.tensor(sigma, dtype=torch.float32), torch.stack(has), self.patch_HW
        )
