"""How alike two sets of features of the same rows are: CKA and its local form CKNNA.

Both compare the rows' similarities with one another, so the two sets may differ in width and in
basis. Definitions follow the Platonic Representation Hypothesis code (arXiv 2405.07987).

Shape letters: N rows, D and E widths, k neighbours.
"""

import torch
from torch import Tensor

from alignlab.metrics.features import feature_rows, unit_rows

_CKNNA_EPS = 1e-6
_CKA_EPS = 1e-12  # well above float64's rounding


def cka(left_ND: Tensor, right_NE: Tensor, *, unbiased: bool = False) -> float:
    """Linear centred kernel alignment of L2-normalised rows, in float64.

    `HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))` with `K`, `L` the two cosine matrices.
    Biased: `HSIC = tr(K H L H) / (N - 1)^2`, in [0, 1], close to 1 for any pair when N is small
    against the width. Unbiased (Song et al. 2012): around 0 for unrelated features at any N; may
    be negative.

    A set whose rows do not vary gives 0: its `HSIC(K, K)` is within 1e-12 of the mean square of
    `K`. The released code adds 1e-6 to the root instead (biased: of HSICs that are not divided by
    `(N - 1)^2`); the unbiased value of a set with itself is then 0.75 at a mean cosine of 0.990,
    and 0.04 at 0.999.

    Args:
        left_ND: one row per token, frame or image.
        right_NE: the same rows seen by another network.
        unbiased: use the unbiased estimate.

    Raises:
        ValueError: shapes that do not pair up, NaN or infinity, fewer than 2 rows (unbiased: 4).
    """
    left_NN, right_NN = _kernels(left_ND, right_NE, minimum=4 if unbiased else 2)
    hsic = _hsic_unbiased if unbiased else _hsic_biased
    own = [hsic(kernel_NN, kernel_NN) for kernel_NN in (left_NN, right_NN)]
    uncentred = [kernel_NN.square().mean() for kernel_NN in (left_NN, right_NN)]
    if any(one <= _CKA_EPS * whole for one, whole in zip(own, uncentred, strict=True)):
        return 0.0
    return float(hsic(left_NN, right_NN) / _root(*own))


def cknna(left_ND: Tensor, right_NE: Tensor, k: int = 10) -> float:
    """CKA (unbiased) restricted to pairs that are among the `k` nearest in both sets, in float64.

    Every row keeps its `k` nearest others by cosine; the cross term keeps the pairs kept by both,
    each self term its own. The masks are not symmetric, so swapping the arguments changes the value
    a little; put the student left and the teacher right everywhere. 1e-6 is added to the root, as
    in the released code: of pairs that were chosen as the nearest, it is small beside it.

    Args:
        left_ND: one row per token, frame or image.
        right_NE: the same rows seen by another network.
        k: neighbours per row, 2 .. N - 1 (REPA reports k = 10).

    Raises:
        ValueError: shapes that do not pair up, NaN or infinity, fewer than 4 rows, k out of range.
    """
    left_NN, right_NN = _kernels(left_ND, right_NE, minimum=4)
    rows = left_NN.shape[0]
    if not 2 <= k < rows:
        raise ValueError(f"k must be in 2 .. {rows - 1} for {rows} rows, got {k}")
    left_mask_NN, right_mask_NN = _neighbours(left_NN, k), _neighbours(right_NN, k)
    both_NN = left_mask_NN * right_mask_NN
    left_own_NN, right_own_NN = left_mask_NN * left_NN, right_mask_NN * right_NN
    root = _root(
        _hsic_unbiased(left_own_NN, left_own_NN), _hsic_unbiased(right_own_NN, right_own_NN)
    )
    cross = _hsic_unbiased(both_NN * left_NN, both_NN * right_NN)
    return float(cross / (root + _CKNNA_EPS))


def _kernels(left_ND: Tensor, right_NE: Tensor, *, minimum: int) -> tuple[Tensor, Tensor]:
    left_ND = unit_rows(feature_rows("left_ND", left_ND, minimum=minimum))
    right_NE = unit_rows(feature_rows("right_NE", right_NE, minimum=minimum))
    if left_ND.shape[0] != right_NE.shape[0]:
        raise ValueError(
            f"left_ND and right_NE must hold the same rows, got {left_ND.shape[0]} "
            f"and {right_NE.shape[0]}"
        )
    return left_ND @ left_ND.T, right_NE @ right_NE.T


def _neighbours(kernel_NN: Tensor, k: int) -> Tensor:
    others_NN = kernel_NN.clone().fill_diagonal_(-torch.inf)
    nearest_Nk = others_NN.topk(k, dim=1).indices
    return torch.zeros_like(kernel_NN).scatter_(1, nearest_Nk, 1.0)


def _hsic_biased(left_NN: Tensor, right_NN: Tensor) -> Tensor:
    centred_NN = left_NN - left_NN.mean(0, keepdim=True)
    centred_NN = centred_NN - centred_NN.mean(1, keepdim=True)
    return (centred_NN * right_NN.T).sum() / (left_NN.shape[0] - 1) ** 2


def _hsic_unbiased(left_NN: Tensor, right_NN: Tensor) -> Tensor:
    rows = left_NN.shape[0]
    left_NN = left_NN.clone().fill_diagonal_(0.0)
    right_NN = right_NN.clone().fill_diagonal_(0.0)
    sums = left_NN.sum() * right_NN.sum() / ((rows - 1) * (rows - 2))
    # sum(K @ L) without the N^3 product.
    chained = left_NN.sum(0) @ right_NN.sum(1)
    cross = (left_NN * right_NN.T).sum()
    return (cross + sums - 2.0 * chained / (rows - 2)) / (rows * (rows - 3))


def _root(left: Tensor, right: Tensor) -> Tensor:
    # Rounding can leave the self term of constant features a hair below zero.
    return (left * right).clamp_min(0.0).sqrt()
