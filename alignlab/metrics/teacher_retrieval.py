"""Do student tokens, read linearly, find the teacher's tokens of the same subject?

Student and teacher features live in different spaces. A variant trained without alignment has no
projector into the teacher's, and a trained projector would judge its variant with a head that the
loss itself tuned. So every variant is judged alike: by the best *linear* map (ridge regression)
from its tokens to the teacher's, fitted on other clips.

Shape letters: M fit rows, N held-out rows, D student width, E teacher width.
"""

import torch
from torch import Tensor

from alignlab.metrics.features import feature_rows
from alignlab.metrics.retrieval import subject_retrieval


def teacher_retrieval(
    student_fit_MD: Tensor,
    teacher_fit_ME: Tensor,
    student_ND: Tensor,
    teacher_NE: Tensor,
    labels_N: Tensor,
    *,
    ridge: float = 1e-2,
    images_N: Tensor | None = None,
) -> float:
    """Share of student tokens whose nearest *teacher* token, after a linear map, is of its subject.

    1. Standardise both sides per channel with mean and (population) standard deviation of the fit
       rows; a channel that is constant over the fit rows becomes 0.
    2. `W = (X'X / M + ridge I)^-1 X'Y / M` on the standardised fit rows X, Y. Channels have unit
       variance, so `ridge` is a fraction of a channel's variance, whatever the features' scale.
    3. Map the held-out student rows with W; look each up by cosine among the standardised teacher
       rows of `teacher_NE`.

    The gallery is the teacher's alone, hence the same for every variant: differences are
    differences of the students. Sound only if fit and held-out rows come from different clips and
    M is well above D. Chance level: `retrieval_chance(labels_N, labels_N, ...)` with the same
    images; 1 / S for S balanced subjects. A student that carries nothing of the subject scores
    about chance.

    Args:
        student_fit_MD, teacher_fit_ME: the same tokens seen by both, from the fit clips.
        student_ND, teacher_NE: the same tokens seen by both, from held-out clips.
        labels_N: int subject of each held-out token, negative = padding.
        ridge: no published value; 1e-2 is small against the unit variance of a channel.
        images_N: int, the image a held-out token is of. When given, teacher tokens of the query's
            own image are left out, so a hit needs another image of the subject; when not, the
            query's own teacher token is in the gallery.

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
    return subject_retrieval(
        held_out_ND @ map_DE,
        labels_N,
        gallery_NE,
        labels_N,
        query_images_N=images_N,
        gallery_images_M=images_N,
    )


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
