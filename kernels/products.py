"""Matrix products of the chunked implementations: which dtype they multiply in, and summing up."""

import torch
from torch import Tensor


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
