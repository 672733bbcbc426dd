"""Rows of features as every metric of this folder reads them.

Shape letters: N and M rows (tokens, frames or images), D width, K neighbours.
"""

import torch
from torch import Tensor

from alignlab.kernels.cosine import unit

EPS = 1e-12
_CHUNK = 1024


def feature_rows(name: str, features_ND: Tensor, *, minimum: int = 1) -> Tensor:
    """Give `features_ND` back in float64, or say what is wrong with it.

    Raises:
        ValueError: not two-dimensional, not floating point, fewer than `minimum` rows, no
            columns, or a NaN or infinity among the values.
    """
    if features_ND.ndim != 2 or features_ND.shape[1] == 0:
        raise ValueError(f"{name} must be (rows, width), got {tuple(features_ND.shape)}")
    if not features_ND.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {features_ND.dtype}")
    if features_ND.shape[0] < minimum:
        raise ValueError(f"{name} needs at least {minimum} rows, got {features_ND.shape[0]}")
    if not bool(torch.isfinite(features_ND).all()):
        raise ValueError(f"{name} holds a NaN or an infinity")
    return features_ND.detach().to(torch.float64)


def label_rows(name: str, labels_N: Tensor, rows: int) -> Tensor:
    """Give `labels_N` back as int64, one label for each of `rows` rows.

    Raises:
        ValueError: not one-dimensional, another length, or not integers.
    """
    if tuple(labels_N.shape) != (rows,):
        raise ValueError(f"{name} must be ({rows},), got {tuple(labels_N.shape)}")
    if labels_N.is_floating_point() or labels_N.is_complex():
        raise ValueError(f"{name} must be integers, got {labels_N.dtype}")
    return labels_N.to(torch.int64)


def unit_rows(features_ND: Tensor) -> Tensor:
    """L2-normalise each row, the norm clamped at 1e-12 (a zero row stays zero)."""
    return unit(features_ND, features_ND.dtype)


def nearest(
    query_ND: Tensor,
    gallery_MD: Tensor,
    k: int,
    *,
    query_ids_N: Tensor | None = None,
    gallery_ids_M: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the `k` rows of `gallery_MD` with the highest cosine to each row of `query_ND`.

    A gallery row whose id equals the query's is never a neighbour (ids are given for both sides
    or for neither). Works in slices of 1024 queries, so memory is `1024 * M`, never `N * M`.

    Returns:
        `(indices_NK, cosines_NK)`, nearest first; a cosine of minus infinity marks a place left
        empty because fewer than `k` rows were allowed.
    """
    query_ND, gallery_MD = unit_rows(query_ND), unit_rows(gallery_MD)
    indices, cosines = [], []
    for start in range(0, query_ND.shape[0], _CHUNK):
        part = slice(start, start + _CHUNK)
        cosine_NM = query_ND[part] @ gallery_MD.T
        if query_ids_N is not None and gallery_ids_M is not None:
            same_NM = query_ids_N[part, None] == gallery_ids_M
            cosine_NM = cosine_NM.masked_fill(same_NM, -torch.inf)
        top = cosine_NM.topk(k, dim=1)
        indices.append(top.indices)
        cosines.append(top.values)
    return torch.cat(indices), torch.cat(cosines)
