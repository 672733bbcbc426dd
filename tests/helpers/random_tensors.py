"""Tensors for objectives and kernels: drawn from a seed, or those of the golden values."""

import math

import torch
from torch import Tensor


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_double(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def draw_saliency(*shape: int, seed: int = 9) -> Tensor:
    """Numbers between 0 and 1 in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def golden_pair(*shape: int) -> tuple[Tensor, Tensor]:
    """Student and teacher of the golden values: sin(k), cos(k / 2), k = 1, 2, ..., in float64."""
    k = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape)
    return torch.sin(k), torch.cos(k / 2)


def golden_saliency() -> Tensor:
    """Saliencies (1, 3, 2) of the golden values, in float64."""
    return 0.5 * torch.sin(torch.arange(1, 7, dtype=torch.float64)).reshape(1, 3, 2) + 0.5
