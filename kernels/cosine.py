"""Unit vectors, cosines and their products: the one definition that every similarity op shares.

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


def unit_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gives the gradient of `x` (..., C) from that of `unit(x)`, which is overwritten.

    d(x/|x|) leaves out what points along x; where the norm is clamped it is a constant.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=grad.dtype)
    clamped = norm.clamp_min(NORM_EPS)
    along = torch.linalg.vecdot(grad, x.to(grad.dtype))[..., None] / clamped
    grad.addcmul_(torch.where(norm >= NORM_EPS, along / clamped, 0.0), x, value=-1)
    return grad.div_(clamped).to(x.dtype)


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


def refuse_teacher_gradient(operation: str, teacher: Tensor) -> None:
    """Refuses to return silently without the gradient that somebody waits for.

    Raises:
        ValueError: the teacher requires a gradient, and gradients are recorded.
    """
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{operation}: the teacher is a constant: detach it")


def factor_dtype(x: Tensor, accumulation: torch.dtype) -> torch.dtype:
    """Gives the dtype that unit vectors of `x` are multiplied in.

    Half precision on a GPU keeps its own, for the tensor cores; everything else takes the dtype of
    the sums, which costs a CPU nothing.
    """
    return x.dtype if x.is_cuda and x.element_size() == 2 else accumulation


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to `out` (..., R, C), in place unless `out` has a wider dtype."""
    if out.dtype != left.dtype:
        out += left @ right
    elif out.ndim == 2:
        out.addmm_(left, right)
    else:
        out.baddbmm_(left, right)
