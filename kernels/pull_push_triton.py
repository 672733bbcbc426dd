"""The pull and push terms in Triton: two matrix products, and a mask of the pairs between them.

Forward: the similarities of a tile of pairs go straight into row sums and a packed mask of the
active pairs. Backward: the mask times the teacher, then the gradient of the L2 norm. Both skip
pairs of one subject and padding, where these fill whole kernels.

Shape letters: Z leading index of the student, B of teacher and ids (z belongs to sample z % B), N
tokens, C channels, T tiles, W packed words, S sums.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from alignlab.kernels import pull_push_triton_kernels as kernels
from alignlab.kernels.pull_push import PullPush
from alignlab.kernels.triton_common import words_per_row


def pull_push_triton(
    student: Tensor,
    teacher: Tensor,
    subject_ids: Tensor,
    pos_margin: float,
    neg_margin: float,
) -> PullPush:
    """Computes both terms on a GPU, or in Triton's interpreter, without an (N, N) matrix of floats.

    Leading dimensions that teacher and ids merely repeat cost them no memory. What the kernels
    cannot compute `dispatch.refuse_for_triton` has refused.
    """
    if student.numel() == 0:
        zero = student.sum((-2, -1), dtype=torch.float32)
        return PullPush(zero, zero)
    lead = student.shape[:-2]
    teacher_BNC, ids_BN = _per_sample(teacher.detach().expand_as(student), subject_ids)
    subject_BN, others_BN = pull_push_triton_subjects(ids_BN)
    cosine_ZN, overlap_ZN, *_ = pull_push_triton_rows(
        student.reshape(math.prod(lead), *student.shape[-2:]).contiguous(),
        teacher_BNC,
        subject_BN,
        1.0 - neg_margin,
        torch.is_grad_enabled() and student.requires_grad,
    )
    valid_BN = subject_BN >= 0
    miss_LBN = (1.0 - cosine_ZN.unflatten(0, (-1, len(valid_BN))) - pos_margin).relu()
    pull_LB = torch.where(valid_BN, miss_LBN, 0.0).sum(-1) / valid_BN.sum(-1).clamp_min(1)
    overlap_LBN = overlap_ZN.view_as(miss_LBN)
    push_LB = overlap_LBN.sum(-1) / others_BN.sum(-1).clamp_min(1)
    return PullPush(pull_LB.reshape(lead), push_LB.reshape(lead))


def _per_sample(teacher: Tensor, subject_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Takes off the leading dimensions that both merely repeat, and flattens the rest into one."""
    ids = subject_ids.expand(teacher.shape[:-1])
    while teacher.ndim > 2 and _repeats(teacher) and _repeats(ids):
        teacher, ids = teacher[0], ids[0]
    batch = math.prod(teacher.shape[:-2])
    teacher_BNC = teacher.reshape(batch, *teacher.shape[-2:]).contiguous()
    return teacher_BNC, ids.reshape(batch, -1).long().contiguous()


def _repeats(x: Tensor) -> bool:
    return x.shape[0] == 1 or x.stride(0) == 0


@torch.library.custom_op("alignlab::pull_push_triton_subjects", mutates_args=())
def pull_push_triton_subjects(ids_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Names each token's subject by the index of its first token, -1 for padding, and counts the
    tokens of other subjects, 0 for padding. Both int32."""
    subject_BN = torch.empty_like(ids_BN, dtype=torch.int32)
    others_BN = torch.empty_like(subject_BN)
    batch, tokens = ids_BN.shape
    with torch.cuda.device_of(ids_BN):
        kernels.subjects_kernel[(triton.cdiv(tokens, kernels.SUBJECT_TILE), batch)](
            ids_BN, subject_BN, others_BN, tokens, TILE=kernels.SUBJECT_TILE
        )
    return subject_BN, others_BN


@pull_push_triton_subjects.register_fake
def _(ids_BN: Tensor) -> tuple[Tensor, Tensor]:
    subject_BN = torch.empty_like(ids_BN, dtype=torch.int32)
    return subject_BN, torch.empty_like(subject_BN)


def _empty_outputs(student_ZNC: Tensor, teacher_BNC: Tensor, keep: bool) -> tuple[Tensor, ...]:
    """Makes the outputs of `pull_push_triton_rows`, but for the two sums."""
    blocks, tokens, _ = student_ZNC.shape
    plane = kernels.GRADIENT_TILES[student_ZNC.element_size()].depth
    words = words_per_row(tokens, kernels.MASK_BITS, plane) if keep else 0
    cosine_ZN = student_ZNC.new_empty(blocks, tokens, dtype=torch.float32)
    words_ZNW = student_ZNC.new_empty(blocks, tokens, words, dtype=torch.uint8)
    unit_BNC = torch.empty_like(teacher_BNC, dtype=student_ZNC.dtype)
    return cosine_ZN, torch.empty_like(cosine_ZN), unit_BNC, words_ZNW


@torch.library.custom_op("alignlab::pull_push_triton_rows", mutates_args=())
def pull_push_triton_rows(
    student_ZNC: Tensor, teacher_BNC: Tensor, subject_BN: Tensor, threshold: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes for each student token i, 0 for padding,

        cosine_i = cos_ii,    overlap_i = sum over tokens j of other subjects [cos_ij - threshold]_+

    and, for the backward pass: the sum of cos_ij over the active pairs ("reach"), the norm, the
    teacher's unit vectors in the student's dtype, and the packed mask of the active pairs. Reach
    and mask are empty unless `keep`.
    """
    outputs = _empty_outputs(student_ZNC, teacher_BNC, keep)
    cosine_ZN, norm_ZN, unit_BNC, words_ZNW = outputs
    (blocks, tokens, width), batch = student_ZNC.shape, len(teacher_BNC)
    tile = kernels.overlap_tile(student_ZNC)
    column_tiles = triton.cdiv(tokens, tile.columns)
    sums_SZTN = cosine_ZN.new_empty(1 + keep, blocks, column_tiles, tokens)
    constants = kernels.unit_constants(width)
    with torch.cuda.device_of(student_ZNC):
        kernels.unit_kernel[(triton.cdiv(tokens, constants["ROWS"]), batch)](
            *(student_ZNC, teacher_BNC, subject_BN, unit_BNC, norm_ZN, cosine_ZN),
            *(tokens, batch, blocks // batch),
            **constants,
        )
        kernels.overlap_kernel[(triton.cdiv(tokens, tile.rows) * column_tiles, blocks)](
            *(student_ZNC, unit_BNC, subject_BN, norm_ZN, sums_SZTN, words_ZNW),
            *(tokens, batch, blocks, threshold),
            **kernels.overlap_constants(tile, student_ZNC.element_size(), width, keep),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    # One fixed order of summation, so that runs are equal bit for bit.
    overlap_ZN = sums_SZTN[0].sum(1)
    active_ZN = sums_SZTN[1].sum(1) if keep else None
    reach_ZN = cosine_ZN.new_empty(0) if active_ZN is None else overlap_ZN + threshold * active_ZN
    return cosine_ZN, overlap_ZN, reach_ZN, norm_ZN, unit_BNC, words_ZNW


@pull_push_triton_rows.register_fake
def _(
    student_ZNC: Tensor, teacher_BNC: Tensor, subject_BN: Tensor, threshold: float, keep: bool
) -> tuple[Tensor, ...]:
    cosine_ZN, norm_ZN, unit_BNC, words_ZNW = _empty_outputs(student_ZNC, teacher_BNC, keep)
    reach_ZN = torch.empty_like(cosine_ZN) if keep else cosine_ZN.new_empty(0)
    return cosine_ZN, torch.empty_like(cosine_ZN), reach_ZN, norm_ZN, unit_BNC, words_ZNW


@torch.library.custom_op("alignlab::pull_push_triton_backward", mutates_args=())
def pull_push_triton_backward(
    grad_cosine_ZN: Tensor,
    grad_overlap_ZN: Tensor,
    student_ZNC: Tensor,
    unit_BNC: Tensor,
    subject_BN: Tensor,
    cosine_ZN: Tensor,
    reach_ZN: Tensor,
    norm_ZN: Tensor,
    words_ZNW: Tensor,
) -> Tensor:
    """Computes the student's gradient from those of cosine and overlap and from what was kept."""
    grad_ZNC = torch.empty_like(student_ZNC)
    (blocks, tokens, width), batch = student_ZNC.shape, len(unit_BNC)
    tile = kernels.GRADIENT_TILES[student_ZNC.element_size()]
    row_tiles = triton.cdiv(tokens, tile.rows)
    hole_BT3 = subject_BN.new_empty(batch, row_tiles, 3)
    with torch.cuda.device_of(student_ZNC):
        kernels.hole_kernel[(row_tiles, batch)](
            subject_BN, hole_BT3, tokens, ROWS=tile.rows, COLUMNS=kernels.HOLE_COLUMNS, Q=tile.depth
        )
        kernels.gradient_kernel[(row_tiles * triton.cdiv(width, tile.columns), blocks)](
            *(grad_cosine_ZN.contiguous(), grad_overlap_ZN.contiguous(), student_ZNC, unit_BNC),
            *(subject_BN, cosine_ZN, reach_ZN, norm_ZN, words_ZNW, hole_BT3, grad_ZNC),
            *(tokens, batch),
            **kernels.gradient_constants(student_ZNC.element_size(), width),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return grad_ZNC


@pull_push_triton_backward.register_fake
def _(grad_cosine_ZN: Tensor, grad_overlap_ZN: Tensor, student_ZNC: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(student_ZNC)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student_ZNC, _, subject_BN, _, _ = inputs
    cosine_ZN, _, reach_ZN, norm_ZN, unit_BNC, words_ZNW = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        student_ZNC, unit_BNC, subject_BN, cosine_ZN, reach_ZN, norm_ZN, words_ZNW
    )


def _backward(
    ctx: Any, grad_cosine_ZN: Tensor | None, grad_overlap_ZN: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    cosine_ZN = ctx.saved_tensors[3]
    upstream = (
        torch.zeros_like(cosine_ZN) if grad is None else grad
        for grad in (grad_cosine_ZN, grad_overlap_ZN)
    )
    return pull_push_triton_backward(*upstream, *ctx.saved_tensors), None, None, None, None


pull_push_triton_rows.register_autograd(_backward, setup_context=_setup_context)
