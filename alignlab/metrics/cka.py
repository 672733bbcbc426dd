"""How alike two sets of features of the same rows are: CKA and its local form CKNNA.

Both compare the rows' similarities with one another, so the two sets may differ in width and in
basis. Definitions follow the Platonic Representation Hypothesis code (arXiv 2405.07987).

Shape letters: N rows, D and E widths, k neighbours.
"""

from dataclasses import dataclass
from typing import Self

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


@dataclass(frozen=True)
class Neighbours:
    """Of each row of a set of features its `k` nearest others by cosine, in float64.

    Args:
        indices_Nk: which rows they are.
        cosines_Nk: how near.
        own: HSIC (unbiased) of these pairs with themselves.
    """

    indices_Nk: Tensor
    cosines_Nk: Tensor
    own: Tensor

    @classmethod
    def of(cls, features_ND: Tensor, k: int = 10, *, name: str = "features_ND") -> Self:
        """Looks for them.

        Args:
            features_ND: one row per token, frame or image.
            k: neighbours per row, 2 .. N - 1.
            name: of the features, for messages.

        Raises:
            ValueError: NaN or infinity, fewer than 4 rows, k out of range.
        """
        unit_ND = unit_rows(feature_rows(name, features_ND, minimum=4))
        rows = len(unit_ND)
        if not 2 <= k < rows:
            raise ValueError(f"k must be in 2 .. {rows - 1} for {rows} rows, got {k}")
        cosines_NN = unit_ND @ unit_ND.T
        cosines_Nk, indices_Nk = cosines_NN.fill_diagonal_(-torch.inf).topk(k, dim=1)
        own = _hsic_of_pairs((indices_Nk, cosines_Nk), (indices_Nk, cosines_Nk), cosines_NN.zero_())
        return cls(indices_Nk, cosines_Nk, own)

    def shared_with(self, other: "Neighbours") -> tuple[Tensor, Tensor]:
        """Indices, and the cosines of those that `other` has as well, 0 of the rest."""
        is_shared_Nk = (self.indices_Nk[:, :, None] == other.indices_Nk[:, None, :]).any(2)
        return self.indices_Nk, self.cosines_Nk * is_shared_Nk


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
    left = Neighbours.of(left_ND, k, name="left_ND")
    return cknna_of(left, Neighbours.of(right_NE, k, name="right_NE"))


def cknna_of(left: Neighbours, right: Neighbours) -> float:
    """`cknna` of sets whose neighbours are known: those of a teacher serve many students.

    Raises:
        ValueError: the sets differ in their number of rows.
    """
    rows = len(left.indices_Nk)
    _check_paired(rows, len(right.indices_Nk))
    zeros_NN = left.cosines_Nk.new_zeros(rows, rows)
    cross = _hsic_of_pairs(left.shared_with(right), right.shared_with(left), zeros_NN)
    return float(cross / (_root(left.own, right.own) + _CKNNA_EPS))


def _kernels(left_ND: Tensor, right_NE: Tensor, *, minimum: int) -> tuple[Tensor, Tensor]:
    left_ND = unit_rows(feature_rows("left_ND", left_ND, minimum=minimum))
    right_NE = unit_rows(feature_rows("right_NE", right_NE, minimum=minimum))
    _check_paired(left_ND.shape[0], right_NE.shape[0])
    return left_ND @ left_ND.T, right_NE @ right_NE.T


def _check_paired(left: int, right: int) -> None:
    if left != right:
        raise ValueError(f"left_ND and right_NE must hold the same rows, got {left} and {right}")


def _hsic_biased(left_NN: Tensor, right_NN: Tensor) -> Tensor:
    centred_NN = left_NN - left_NN.mean(0, keepdim=True)
    centred_NN = centred_NN - centred_NN.mean(1, keepdim=True)
    return (centred_NN * right_NN.T).sum() / (left_NN.shape[0] - 1) ** 2


def _hsic_unbiased(left_NN: Tensor, right_NN: Tensor) -> Tensor:
    left_NN = left_NN.clone().fill_diagonal_(0.0)
    right_NN = right_NN.clone().fill_diagonal_(0.0)
    # sum(K @ L) without the N^3 product.
    chained = left_NN.sum(0) @ right_NN.sum(1)
    cross = (left_NN * right_NN.T).sum()
    return _hsic_of_sums(cross, left_NN.sum(), right_NN.sum(), chained, len(left_NN))


def _hsic_of_pairs(
    left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], zeros_NN: Tensor
) -> Tensor:
    """`_hsic_unbiased` of matrices that are 0 but for a few columns of each row, none diagonal.

    Args:
        left: columns and values, `(N, k)` each.
        right: likewise.
        zeros_NN: is written to. Whole matrices are summed, one after another, so that sums round as
            those of a dense product do.
    """
    (left_Nk, left_values_Nk), (right_Nk, right_values_Nk) = left, right
    matrix_NN = zeros_NN.scatter_(1, right_Nk, right_values_Nk)
    right_sum, right_sums_N = matrix_NN.sum(), matrix_NN.sum(1)
    rows_N1 = torch.arange(len(left_Nk), device=left_Nk.device)[:, None]
    product_Nk = left_values_Nk * matrix_NN[left_Nk, rows_N1]  # with the other one transposed
    matrix_NN.scatter_(1, right_Nk, 0.0).scatter_(1, left_Nk, left_values_Nk)
    left_sum, chained = matrix_NN.sum(), matrix_NN.sum(0) @ right_sums_N
    cross = matrix_NN.scatter_(1, left_Nk, product_Nk).sum()
    return _hsic_of_sums(cross, left_sum, right_sum, chained, len(left_Nk))


def _hsic_of_sums(cross: Tensor, left: Tensor, right: Tensor, chained: Tensor, rows: int) -> Tensor:
    sums = left * right / ((rows - 1) * (rows - 2))
    return (cross + sums - 2.0 * chained / (rows - 2)) / (rows * (rows - 3))


def _root(left: Tensor, right: Tensor) -> Tensor:
    # Rounding can leave the self term of constant features a hair below zero.
    return (left * right).clamp_min(0.0).sqrt()
