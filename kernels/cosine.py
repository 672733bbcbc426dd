"""Unit vectors and cosines: the one definition that every similarity op here shares.

Shape letters: N tokens, C channels; `...` any leading dimensions.
"""

import torch
from torch import Tensor

# Same rule as torch.nn.functional.normalize: the norm is clamped from below, nothing is added.
NORM_EPS = 1e-12


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Gives the dtype that similarities are computed in: float64 if an input is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def unit(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Casts `x` (..., C) to `dtype` and divides each vector by `max(norm, NORM_EPS)`.

    A zero vector stays zero, so its cosine with anything is 0.
    """
    x = x.to(dtype)
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp_min(NORM_EPS)


def paired_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes the cosine of each student token with the teacher token at the same place.

    Args:
        student: (..., N, C).
        teacher: broadcastable to `student`.

    Returns:
        (..., N), in float32 (float64 if an input is float64) whatever the input dtype.
    """
    dtype = accumulation_dtype(student, teacher)
    return (unit(student, dtype) * unit(teacher, dtype)).sum(-1)
