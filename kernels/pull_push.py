"""Pull same-token features together, push tokens of different subjects apart.

With cosines c_ij between student token i and teacher token j:

    pull = mean over valid i                              [(1 - c_ii) - pos_margin]_+
    push = mean over valid (i, j) of different subjects   [neg_margin - (1 - c_ij)]_+

Shape letters: N tokens, C channels; `...` leading dimensions (batch, blocks), one value each.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from alignlab.kernels.cosine import accumulation_dtype, refuse_teacher_gradient, unit
from alignlab.kernels.dispatch import Impl as Impl
from alignlab.kernels.dispatch import Operation
from alignlab.kernels.pull_push_chunked import pull_push_chunked
from alignlab.kernels.pull_push_terms import PullPush as PullPush

EAGER_TOKENS = 256


def pull_push_eager(
    student: Tensor,
    teacher: Tensor,
    subject_ids: Tensor,
    pos_margin: float,
    neg_margin: float,
) -> PullPush:
    """Computes both terms from the full similarity matrix in plain torch.

    This is the reference that every other implementation is tested and timed against.
    """
    dtype = accumulation_dtype(student, teacher)
    subject_ids = subject_ids.expand(student.shape[:-1])
    valid = subject_ids >= 0
    # Padding is zeroed before anything is computed from it: garbage there, even NaN, then reaches
    # neither a value nor a gradient.
    student = unit(student.masked_fill(~valid.unsqueeze(-1), 0.0), dtype)
    teacher = unit(teacher.masked_fill(~valid.unsqueeze(-1), 0.0), dtype)

    miss = (1.0 - (student * teacher).sum(-1) - pos_margin).relu()
    pull = torch.where(valid, miss, 0.0).sum(-1) / valid.sum(-1).clamp_min(1)

    cross = subject_ids.unsqueeze(-1) != subject_ids.unsqueeze(-2)
    cross = cross & valid.unsqueeze(-1) & valid.unsqueeze(-2)
    overlap = (student @ teacher.mT - (1.0 - neg_margin)).relu()
    push = torch.where(cross, overlap, 0.0).sum((-2, -1)) / cross.sum((-2, -1)).clamp_min(1)
    return PullPush(pull, push)


def pull_push_triton(
    student: Tensor, teacher: Tensor, subject_ids: Tensor, pos_margin: float, neg_margin: float
) -> PullPush:
    """Computes the same with Triton, which is imported when first used: it exists for Linux only
    and takes a second."""
    from alignlab.kernels import pull_push_triton as module

    return module.pull_push_triton(student, teacher, subject_ids, pos_margin, neg_margin)


OPERATION: Operation[Callable[[Tensor, Tensor, Tensor, float, float], PullPush]] = Operation(
    "pull_push",
    {"eager": pull_push_eager, "chunked": pull_push_chunked, "triton": pull_push_triton},
    eager_tokens=EAGER_TOKENS,
)
implementations = OPERATION.implementations


def pull_push(
    student: Tensor,
    teacher: Tensor,
    subject_ids: Tensor,
    *,
    pos_margin: float = 0.0,
    neg_margin: float = 1.0,
    impl: Impl = "auto",
) -> PullPush:
    """Computes the pull and push terms of RefAlign's reference alignment, per leading index.

    Sums are accumulated in float32 (float64 if an input is float64), also under autocast. The
    gradient reaches `student` only: the teacher is a constant. Vectors are divided by
    `max(norm, 1e-12)`, so a zero vector has cosine 0 with everything.

    Args:
        student: (..., N, C).
        teacher: broadcastable to `student`.
        subject_ids: (..., N) integers, broadcastable over the leading dimensions; tokens with the
            same id show the same subject, a negative id (-1) marks padding, which is in no mean.
        pos_margin: same-token cosine distance that is free of charge (RefAlign code: 0).
        neg_margin: cosine distance that different subjects should keep (RefAlign code: 1).
        impl: "auto" picks an implementation for this device, dtype and shape; a name asks for
            exactly that one.

    Returns:
        `PullPush(pull, push)`, each of the leading shape. No valid token: both 0. No pair of
        different subjects: push 0.

    Raises:
        ValueError: shapes do not fit, ids are not integers, the teacher requires a gradient, or
            `impl` cannot run.
    """
    _check(student, teacher, subject_ids)
    refuse_teacher_gradient("pull_push", teacher)
    compute = OPERATION.choose(impl, student)
    with torch.autocast(student.device.type, enabled=False):
        return compute(student, teacher, subject_ids, pos_margin, neg_margin)


def _check(student: Tensor, teacher: Tensor, subject_ids: Tensor) -> None:
    if student.ndim < 2:
        raise ValueError(f"student must be (..., N, C), got shape {tuple(student.shape)}")
    if not _expands_to(teacher.shape, student.shape):
        raise ValueError(
            f"teacher {tuple(teacher.shape)} does not broadcast to student {tuple(student.shape)}"
        )
    if subject_ids.is_floating_point() or subject_ids.dtype == torch.bool:
        raise ValueError(f"subject_ids must be integers, got {subject_ids.dtype}")
    tokens = student.shape[:-1]
    if subject_ids.shape[-1:] != tokens[-1:] or not _expands_to(subject_ids.shape, tokens):
        raise ValueError(
            f"subject_ids {tuple(subject_ids.shape)} does not match the tokens {tuple(tokens)}"
        )


def _expands_to(shape: torch.Size, target: torch.Size) -> bool:
    if len(shape) > len(target):
        return False
    tail = target[len(target) - len(shape) :]
    return all(have in (1, want) for have, want in zip(shape, tail, strict=True))
