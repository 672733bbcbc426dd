"""Do reference tokens tell their subjects apart?

All distances are cosine distances (1 - cos) in float64. A negative label marks padding: such rows
are left out of everything. RefAlign (arXiv 2603.25743) shows separability as a t-SNE picture only;
these are the numbers behind such a picture.

Shape letters: N tokens, D width, S subjects.
"""

import torch
from torch import Tensor

from alignlab.metrics.features import EPS, feature_rows, label_rows, unit_rows

_CHUNK = 1024


def silhouette(features_ND: Tensor, labels_N: Tensor) -> float:
    """Mean silhouette with cosine distance, in [-1, 1]; higher means better separated.

    Per token `(b - a) / max(a, b)`: a the mean distance to the other tokens of its subject, b the
    lowest mean distance to another subject; 0 for a subject's only token (as scikit-learn does).
    Costs `N * S`, not `N * N`.

    Raises:
        ValueError: bad shapes or values, fewer than two subjects.
    """
    unit_ND, subject_N, subjects = _labelled(features_ND, labels_N)
    sums_SD, counts_S = _subject_sums(unit_ND, subject_N, subjects)
    total_NS = counts_S - unit_ND @ sums_SD.T
    own_N1 = subject_N[:, None]
    # The distance to itself is no distance to another token.
    itself_N = 1.0 - unit_ND.square().sum(1)
    others_N = counts_S[subject_N] - 1.0
    a_N = (total_NS.gather(1, own_N1).squeeze(1) - itself_N) / others_N.clamp_min(1.0)
    b_N = (total_NS / counts_S).scatter(1, own_N1, torch.inf).amin(1)
    score_N = (b_N - a_N) / torch.maximum(a_N, b_N).clamp_min(EPS)
    return float(score_N.masked_fill(others_N == 0, 0.0).mean())


def cross_subject_cosine(
    left_ND: Tensor, labels_N: Tensor, right_ND: Tensor | None = None
) -> float:
    """Mean `[cos]_+` over all ordered pairs of tokens of different subjects; lower is better.

    With `right_ND` (the teacher's features of the same tokens) this is RefAlign's push term at
    margin 1; without it, the same quantity within one set of features.

    Raises:
        ValueError: bad shapes or values, fewer than two subjects.
    """
    left_unit_ND, subject_N, _ = _labelled(left_ND, labels_N)
    right_unit_ND = left_unit_ND
    if right_ND is not None:
        if right_ND.shape != left_ND.shape:
            raise ValueError(
                f"right_ND must be {tuple(left_ND.shape)}, got {tuple(right_ND.shape)}"
            )
        right_unit_ND, _, _ = _labelled(right_ND, labels_N)
    total, pairs = 0.0, 0
    for start in range(0, left_unit_ND.shape[0], _CHUNK):
        part = slice(start, start + _CHUNK)
        cross_NN = subject_N[part, None] != subject_N
        cosine_NN = left_unit_ND[part] @ right_unit_ND.T
        total += float((cosine_NN.clamp_min(0.0) * cross_NN).sum())
        pairs += int(cross_NN.sum())
    return total / pairs


def _labelled(features_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, int]:
    """Unit rows and subject numbers 0 .. S - 1 of the tokens that are not padding, and S."""
    features_ND = feature_rows("features_ND", features_ND)
    labels_N = label_rows("labels_N", labels_N, features_ND.shape[0]).to(features_ND.device)
    real_N = labels_N >= 0
    names_S, subject_N = torch.unique(labels_N[real_N], return_inverse=True)
    if names_S.numel() < 2:
        raise ValueError(f"labels_N must name at least two subjects, got {names_S.numel()}")
    return unit_rows(features_ND[real_N]), subject_N, names_S.numel()


def _subject_sums(unit_ND: Tensor, subject_N: Tensor, subjects: int) -> tuple[Tensor, Tensor]:
    sums_SD = unit_ND.new_zeros(subjects, unit_ND.shape[1]).index_add_(0, subject_N, unit_ND)
    return sums_SD, torch.bincount(subject_N, minlength=subjects).to(unit_ND.dtype)
