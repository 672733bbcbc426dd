"""Distance between two clouds of features, each seen as a Gaussian.

Shape letters: N and M rows, D width.
"""

import torch
from torch import Tensor

from alignlab.metrics.features import feature_rows


def frechet_distance(left_ND: Tensor, right_MD: Tensor) -> float:
    """Squared Frechet distance of the two Gaussians with the sets' means and covariances.

    `|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1^(1/2) S2 S1^(1/2))^(1/2))`, covariances with `N - 1`, all
    in float64 through symmetric eigenvalues. FID and FVD are this number on features of their own
    networks; on other features it is not comparable with published FID or FVD. Estimates from
    few rows are biased upwards: compare sets of equal size only.

    Raises:
        ValueError: widths that differ, NaN or infinity, fewer than 2 rows on a side.
    """
    left_ND = feature_rows("left_ND", left_ND, minimum=2)
    right_MD = feature_rows("right_MD", right_MD, minimum=2)
    if left_ND.shape[1] != right_MD.shape[1]:
        raise ValueError(
            f"left_ND and right_MD must have one width, got {left_ND.shape[1]} "
            f"and {right_MD.shape[1]}"
        )
    left_DD, right_DD = _covariance(left_ND), _covariance(right_MD)
    root_DD = _square_root(left_DD)
    product_DD = root_DD @ right_DD @ root_DD
    # A rank-deficient product has eigenvalues a hair below zero.
    eigenvalues_D = torch.linalg.eigvalsh(product_DD).clamp_min(0.0)
    shift = (left_ND.mean(0) - right_MD.mean(0)).square().sum()
    spread = left_DD.trace() + right_DD.trace() - 2.0 * eigenvalues_D.sqrt().sum()
    return float((shift + spread).clamp_min(0.0))


def _covariance(rows_ND: Tensor) -> Tensor:
    centred_ND = rows_ND - rows_ND.mean(0)
    return centred_ND.T @ centred_ND / (rows_ND.shape[0] - 1)


def _square_root(matrix_DD: Tensor) -> Tensor:
    values_D, vectors_DD = torch.linalg.eigh(matrix_DD)
    return torch.einsum("ij,j,kj->ik", vectors_DD, values_D.clamp_min(0.0).sqrt(), vectors_DD)
