"""Does a token's nearest neighbour belong to the same subject?

Cosine similarity, float64. A negative label marks padding, which is left out on both sides.

Shape letters: N query rows, M gallery or fit rows, D and E widths.
"""

import torch
from torch import Tensor

from alignlab.metrics.features import feature_rows, label_rows, nearest

_CHUNK = 1024


def subject_retrieval(
    query_ND: Tensor, query_labels_N: Tensor, gallery_MD: Tensor, gallery_labels_M: Tensor
) -> float:
    """Share of query tokens whose nearest gallery token by cosine carries the same label.

    A query without any gallery token of its label cannot succeed and is not counted. Query and
    gallery are two sets: of one set, every token would be its own neighbour.

    Args:
        query_ND, query_labels_N: tokens to look up and their subjects.
        gallery_MD, gallery_labels_M: tokens to look in and their subjects.

    Raises:
        ValueError: bad shapes or values, or no query that could succeed.
    """
    query_ND = feature_rows("query_ND", query_ND)
    gallery_MD = feature_rows("gallery_MD", gallery_MD)
    if query_ND.shape[1] != gallery_MD.shape[1]:
        raise ValueError(
            f"query_ND and gallery_MD must have one width, got {query_ND.shape[1]} "
            f"and {gallery_MD.shape[1]}"
        )
    query_labels_N = label_rows("query labels", query_labels_N, len(query_ND)).to(query_ND.device)
    gallery_labels_M = label_rows("gallery labels", gallery_labels_M, len(gallery_MD))
    gallery_labels_M = gallery_labels_M.to(gallery_MD.device)
    real_N, real_M = query_labels_N >= 0, gallery_labels_M >= 0
    query_labels_N, gallery_labels_M = query_labels_N[real_N], gallery_labels_M[real_M]
    counted_N = _positives(query_labels_N, gallery_labels_M) > 0
    indices_N1, _ = nearest(query_ND[real_N], gallery_MD[real_M], 1)
    is_right_N = gallery_labels_M[indices_N1[:, 0]] == query_labels_N
    return float(is_right_N[counted_N].double().mean())


def retrieval_chance(query_labels_N: Tensor, gallery_labels_M: Tensor) -> float:
    """What `subject_retrieval` gives for neighbours drawn at random.

    The mean, over the same counted queries, of the share of gallery tokens that carry the query's
    label: 1 / S for S subjects with equally many tokens.

    Raises:
        ValueError: as `subject_retrieval`.
    """
    query_labels_N = label_rows("query labels", query_labels_N, query_labels_N.numel())
    gallery_labels_M = label_rows("gallery labels", gallery_labels_M, gallery_labels_M.numel())
    gallery_labels_M = gallery_labels_M.to(query_labels_N.device)
    gallery_labels_M = gallery_labels_M[gallery_labels_M >= 0]
    positives_N = _positives(query_labels_N[query_labels_N >= 0], gallery_labels_M)
    return float((positives_N[positives_N > 0] / len(gallery_labels_M)).mean())


def teacher_retrieval(
    student_fit_MD: Tensor,
    teacher_fit_ME: Tensor,
    student_ND: Tensor,
    teacher_NE: Tensor,
    labels_N: Tensor,
    *,
    ridge: float = 1e-2,
) -> float:
    """Share of student tokens whose nearest *teacher* token, after a linear map, is of its subject.

    Student and teacher features live in different spaces. A student trained without alignment has
    no projector into the teacher's, and a trained projector would be a head that the loss itself
    tuned. So every student is read alike: by the best *linear* map (ridge regression) from its
    tokens to the teacher's, fitted on other clips.

    1. Standardise both sides per channel with mean and (population) standard deviation of the fit
       rows; a channel that is constant over the fit rows becomes 0.
    2. `W = (X'X / M + ridge I)^-1 X'Y / M` on the standardised fit rows X, Y. Channels have unit
       variance, so `ridge` is a fraction of a channel's variance, whatever the features' scale.
    3. Map the held-out student rows with W; look each up by cosine among the standardised teacher
       rows of `teacher_NE`, its own among them.

    The gallery is the teacher's alone, hence the same for every student: differences are
    differences of the students. Sound only if fit and held-out rows come from different clips and
    M is well above D. Chance level: `retrieval_chance(labels_N, labels_N)`; 1 / S for S balanced
    subjects. A student that carries nothing of the subject scores about chance.

    Args:
        student_fit_MD, teacher_fit_ME: the same tokens seen by both, from the fit clips.
        student_ND, teacher_NE: the same tokens seen by both, from held-out clips.
        labels_N: int subject of each held-out token, negative = padding.
        ridge: no published value; 1e-2 is small against the unit variance of a channel.

    Raises:
        ValueError: shapes that do not pair up, bad values, fewer than 2 fit rows, ridge <= 0, or no
            token that could succeed.
    """
    student_fit_MD = feature_rows("student_fit_MD", student_fit_MD, minimum=2)
    teacher_fit_ME = feature_rows("teacher_fit_ME", teacher_fit_ME, minimum=2)
    student_ND = feature_rows("student_ND", student_ND)
    teacher_NE = feature_rows("teacher_NE", teacher_NE)
    _same("rows", "student_fit_MD", student_fit_MD, "teacher_fit_ME", teacher_fit_ME)
    _same("rows", "student_ND", student_ND, "teacher_NE", teacher_NE)
    _same("width", "student_fit_MD", student_fit_MD, "student_ND", student_ND)
    _same("width", "teacher_fit_ME", teacher_fit_ME, "teacher_NE", teacher_NE)
    if not ridge > 0.0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    inputs_MD, held_out_ND = _standardise(student_fit_MD, student_ND)
    targets_ME, gallery_NE = _standardise(teacher_fit_ME, teacher_NE)
    rows = inputs_MD.shape[0]
    identity_DD = torch.eye(inputs_MD.shape[1], dtype=inputs_MD.dtype, device=inputs_MD.device)
    moment_DD = inputs_MD.T @ inputs_MD / rows + ridge * identity_DD
    map_DE = torch.linalg.solve(moment_DD, inputs_MD.T @ targets_ME / rows)
    return subject_retrieval(held_out_ND @ map_DE, labels_N, gallery_NE, labels_N)


def _positives(query_labels_N: Tensor, gallery_labels_M: Tensor) -> Tensor:
    """Per query, how many gallery tokens have its label, float64."""
    if not len(query_labels_N):
        raise ValueError("every query token is padding")
    chunks = query_labels_N.split(_CHUNK)
    positives_N = torch.cat([(part[:, None] == gallery_labels_M).sum(1) for part in chunks])
    if not bool((positives_N > 0).any()):
        raise ValueError("no query has a gallery token of its own label")
    return positives_N.double()


def _standardise(fit_MD: Tensor, other_ND: Tensor) -> tuple[Tensor, Tensor]:
    mean_D = fit_MD.mean(0)
    spread_D = fit_MD.std(0, correction=0)
    # A constant channel has no scale; what float64 rounding leaves of it is no signal.
    constant_D = spread_D <= 1e-10 * (mean_D.abs() + spread_D.max())
    scale_D = torch.where(constant_D, torch.inf, spread_D)
    return (fit_MD - mean_D) / scale_D, (other_ND - mean_D) / scale_D


def _same(what: str, left: str, left_tensor: Tensor, right: str, right_tensor: Tensor) -> None:
    axis = 0 if what == "rows" else 1
    if left_tensor.shape[axis] != right_tensor.shape[axis]:
        raise ValueError(
            f"{left} and {right} must have the same {what}, got {left_tensor.shape[axis]} "
            f"and {right_tensor.shape[axis]}"
        )
