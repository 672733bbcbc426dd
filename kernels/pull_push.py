"""Pull same-token features together, push tokens of different subjects apart.

With cosines c_ij between student token i and teacher token j:

    pull = mean over valid i                              [(1 - c_ii) - pos_margin]_+
    push = mean over valid (i, j) of different subjects   [neg_margin - (1 - c_ij)]_+

Below: the terms, the plain reference, the chunked implementation, and the operation that chooses
among them (Triton's is in pull_push_triton.py).

Shape letters: N tokens, C channels, V valid tokens, R rows of a panel, W columns of it; `...`
leading dimensions (batch, blocks), one value each.
"""

import math
from collections.abc import Callable
from itertools import accumulate, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignlab.kernels.cosine import (
    NORM_EPS,
    accumulation_dtype,
    add_product,
    factor_dtype,
    refuse_teacher_gradient,
    unit,
    unit_backward,
)
from alignlab.kernels.dispatch import Impl as Impl
from alignlab.kernels.dispatch import Operation
from alignlab.kernels.host_copy import to_device

EAGER_TOKENS = 256
PANEL_ROWS = 512


class PullPush(NamedTuple):
    """The two terms, one value per leading index, both >= 0."""

    pull: Tensor
    push: Tensor


def pull_push_eager(
    student: Tensor,
    teacher: Tensor,
    subject_ids: Tensor,
    pos_margin: float,
    neg_margin: float,
    host_ids: Tensor | None = None,
) -> PullPush:
    """Computes both terms from the full similarity matrix in plain torch.

    This is the reference that every other implementation is tested and timed against.
    """
    dtype = accumulation_dtype(student, teacher)
    return pull_push_plain(student, teacher, subject_ids, pos_margin, neg_margin, dtype)


def pull_push_plain(
    student: Tensor,
    teacher: Tensor,
    subject_ids: Tensor,
    pos_margin: float,
    neg_margin: float,
    dtype: torch.dtype,
) -> PullPush:
    """Computes the formula as it stands, every norm, product and sum in `dtype`."""
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


def pull_push_chunked(
    student: Tensor,
    teacher: Tensor,
    subject_ids: Tensor,
    pos_margin: float,
    neg_margin: float,
    host_ids: Tensor | None = None,
) -> PullPush:
    """Computes the same from panels of at most `PANEL_ROWS` student tokens; memory is O(N*C).

    The push's slope towards unit student vectors is (panel > 0) @ teacher, nearly free once the
    panel is there, so it is computed in the forward pass. No (N, N) matrix is ever held, and only
    pairs of different subjects are computed at all.

    Half-precision inputs on a GPU are multiplied in their own dtype, unit vectors rounded to it;
    sums are float32 all the same.
    """
    host_ids = subject_ids.cpu() if host_ids is None else host_ids
    with_slope = student.requires_grad and torch.is_grad_enabled()
    pull, push, _, _ = _pull_push(
        student, teacher, subject_ids, host_ids, pos_margin, neg_margin, with_slope
    )
    return PullPush(pull, push)


@torch.library.custom_op("alignlab::pull_push_chunked", mutates_args=())
def _pull_push(
    student: Tensor,
    teacher: Tensor,
    subject_ids: Tensor,
    host_ids: Tensor,
    pos_margin: float,
    neg_margin: float,
    with_slope: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes pull and push (...), each token's cosine with its own teacher token (..., N), and
    the push's slope towards unit student vectors (..., N, C), empty unless `with_slope`."""
    *lead, tokens, width = student.shape
    push = student.new_zeros(lead, dtype=accumulation_dtype(student, teacher))
    cosine = push.new_zeros(*lead, tokens)
    slope = push.new_zeros(*lead, tokens if with_slope else 0, width)
    teacher = teacher.expand_as(student)
    ids = host_ids.reshape(math.prod(subject_ids.shape[:-1]), tokens)
    subjects = [_subjects(ids_N, student.device) for ids_N in ids]
    which = torch.arange(len(ids)).view(subject_ids.shape[:-1]).expand(lead)
    for index in product(*map(range, lead)):
        sample = student[index], teacher[index], subjects[int(which[index])]
        push[index] = _sample(*sample, 1.0 - neg_margin, cosine[index], slope[index])
    pays, share = _pull_parts(cosine, subject_ids, pos_margin)
    return (pays * share).sum(-1), push, cosine, slope


@_pull_push.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    subject_ids: Tensor,
    host_ids: Tensor,
    pos_margin: float,
    neg_margin: float,
    with_slope: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *lead, tokens, width = student.shape
    pull = student.new_empty(lead, dtype=accumulation_dtype(student, teacher))
    slope = pull.new_empty(*lead, tokens if with_slope else 0, width)
    return pull, torch.empty_like(pull), pull.new_empty(*lead, tokens), slope


def _pull_parts(cosine: Tensor, subject_ids: Tensor, pos_margin: float) -> tuple[Tensor, Tensor]:
    """What each token pays for the pull and its share in the mean, (..., N) each."""
    valid = (subject_ids >= 0).expand_as(cosine)
    share = valid.to(cosine.dtype) / valid.sum(-1, keepdim=True).clamp_min(1)
    return (1.0 - cosine - pos_margin).relu(), share


class _Subjects(NamedTuple):
    """The valid tokens of one sample, subject after subject."""

    tokens: slice | Tensor
    runs: list[tuple[int, int]]  # each subject's part of `tokens`
    pairs: int  # ordered pairs of different subjects


def _subjects(ids_N: Tensor, device: torch.device) -> _Subjects:
    """Sorts ids that are on the CPU."""
    valid_V = (ids_N >= 0).nonzero()[:, 0]
    order_V = valid_V[ids_N[valid_V].argsort(stable=True)]
    sizes = ids_N[order_V].unique_consecutive(return_counts=True)[1].tolist()
    stops = list(accumulate(sizes))
    runs = list(zip([0, *stops], stops, strict=False))
    pairs = len(order_V) ** 2 - sum(size**2 for size in sizes)
    first = int(valid_V[0]) if runs else 0
    together = slice(first, first + len(order_V))
    if torch.equal(order_V, torch.arange(together.start, together.stop)):
        return _Subjects(together, runs, pairs)  # a slice of the student is a view
    return _Subjects(to_device(order_V, device), runs, pairs)


def _sample(
    student_NC: Tensor,
    teacher_NC: Tensor,
    subjects: _Subjects,
    threshold: float,
    cosine_N: Tensor,
    slope_NC: Tensor,
) -> Tensor | float:
    """Gives the push of one sample, and fills in its cosines and, if it has any rows, the slope."""
    tokens, runs, pairs = subjects
    dtype = cosine_N.dtype
    factor = factor_dtype(student_NC, dtype)
    student_VC, teacher_VC = student_NC[tokens], unit(teacher_NC[tokens], dtype).to(factor)
    cosine_V = cosine_N.new_empty(len(teacher_VC))
    slope_VC = slope_NC[tokens] if len(slope_NC) else None
    buffer = teacher_VC.new_empty(PANEL_ROWS * len(teacher_VC))
    total = cosine_N.new_zeros(())
    for start, stop in runs:
        for first in range(start, stop, PANEL_ROWS):
            rows = slice(first, min(first + PANEL_ROWS, stop))
            unit_RC = unit(student_VC[rows], dtype).to(factor)
            cosine_V[rows] = torch.linalg.vecdot(unit_RC, teacher_VC[rows])
            for others_WC in (teacher_VC[:start], teacher_VC[stop:]):
                panel_RW = buffer[: len(unit_RC) * len(others_WC)].view(len(unit_RC), -1)
                torch.mm(unit_RC, others_WC.T, out=panel_RW)
                if threshold != 0:
                    panel_RW.sub_(threshold)
                total += panel_RW.relu_().sum(dtype=dtype)
                if slope_VC is not None:
                    add_product(slope_VC[rows], panel_RW.sign_(), others_WC)
    cosine_N[tokens] = cosine_V
    if slope_VC is not None:
        slope_VC.div_(max(pairs, 1))
        if isinstance(tokens, Tensor):
            slope_NC[tokens] = slope_VC
    return total / max(pairs, 1)


def _setup_chunked(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, subject_ids, _, ctx.pos_margin, *_ = inputs
    _, _, cosine, slope = output
    ctx.mark_non_differentiable(cosine, slope)
    ctx.save_for_backward(student, teacher, subject_ids, cosine, slope)
    ctx.set_materialize_grads(False)


def _backward_chunked(
    ctx: Any, pull_grad: Tensor | None, push_grad: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    student, teacher, subject_ids, cosine, slope = ctx.saved_tensors
    dtype = cosine.dtype
    grad = torch.zeros_like(slope) if push_grad is None else slope * push_grad[..., None, None]
    if pull_grad is not None:
        pays, share = _pull_parts(cosine, subject_ids, ctx.pos_margin)
        pulled = torch.where(pays > 0, share, 0.0) * pull_grad[..., None]
        norm = torch.linalg.vector_norm(teacher, dim=-1, dtype=dtype).clamp_min(NORM_EPS)
        grad.addcmul_((pulled / norm)[..., None], teacher, value=-1)
    grad = unit_backward(grad, student).masked_fill((subject_ids < 0)[..., None], 0.0)
    return grad, *[None] * 6


_pull_push.register_autograd(_backward_chunked, setup_context=_setup_chunked)


def pull_push_triton(
    student: Tensor,
    teacher: Tensor,
    subject_ids: Tensor,
    pos_margin: float,
    neg_margin: float,
    host_ids: Tensor | None = None,
) -> PullPush:
    """Computes the same with Triton, which is imported when first used: it exists for Linux only
    and takes a second."""
    from alignlab.kernels import pull_push_triton as module

    return module.pull_push_triton(student, teacher, subject_ids, pos_margin, neg_margin)


OPERATION: Operation[Callable[[Tensor, Tensor, Tensor, float, float, Tensor | None], PullPush]]
OPERATION = Operation(
    "pull_push",
    {"eager": pull_push_eager, "chunked": pull_push_chunked, "triton": pull_push_triton},
    eager_tokens=EAGER_TOKENS,
    terms=PullPush._fields,
)


def pull_push(
    student: Tensor,
    teacher: Tensor,
    subject_ids: Tensor,
    *,
    host_ids: Tensor | None = None,
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
        host_ids: the same on the CPU, for `chunked`, which goes subject by subject; without them it
            waits for the device to have `subject_ids`.
        pos_margin: same-token cosine distance that is free of charge (RefAlign code: 0).
        neg_margin: cosine distance that different subjects should keep (RefAlign code: 1).
        impl: "auto" picks an implementation for this device, dtype and shape; a name asks for
            exactly that one, which may be of another package (docs/own-kernel.md); a function with
            the signature of `pull_push_eager` is called.

    Returns:
        `PullPush(pull, push)`, each of the leading shape. No valid token: both 0. No pair of
        different subjects: push 0.

    Raises:
        ValueError: shapes do not fit, ids are not integers, the teacher requires a gradient, or
            `impl` cannot run.
    """
    _check(student, teacher, subject_ids)
    if host_ids is not None and (
        host_ids.device.type != "cpu" or host_ids.shape != subject_ids.shape
    ):
        raise ValueError(
            f"host_ids must be subject_ids on the CPU, got {tuple(host_ids.shape)} on "
            f"{host_ids.device} for {tuple(subject_ids.shape)}"
        )
    refuse_teacher_gradient("pull_push", teacher)
    compute = OPERATION.choose(impl, student, teacher, student.shape[-2])
    with torch.autocast(student.device.type, enabled=False):
        return PullPush(*compute(student, teacher, subject_ids, pos_margin, neg_margin, host_ids))


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
