"""How far the similarities among the student's tokens are from those among the teacher's.

With cosines s_ij among student tokens and t_ij among teacher tokens of one sample, an ordered pair
of tokens costs d_ij = [ |s_ij - t_ij| - margin ]_+, and d_ii = 0. W_ij is the pair's weight, made
of the saliencies of its tokens; f(i) is the frame of a token:

    spatial  = sum W_ij d_ij / (sum W_ij + 1e-6)              over pairs of one frame
    temporal = sum W_ij v_ij d_ij / (sum W_ij v_ij + 1e-6)    over pairs of different frames,
                                                              v_ij = exp(-|f(i) - f(j)| / tau)
    joint    = sum W_ij d_ij / (sum W_ij + 1e-6)              over all pairs

Pairs i = j are counted in the denominators.
Shape letters: B batch, T frames, P tokens per frame, N = T*P tokens, D width.
"""

import math
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from alignlab.kernels.cosine import accumulation_dtype, refuse_teacher_gradient, unit
from alignlab.kernels.dispatch import Impl as Impl
from alignlab.kernels.dispatch import Operation
from alignlab.kernels.relation_chunked import relation_chunked
from alignlab.kernels.relation_terms import DENOMINATOR_EPS, pair_weight
from alignlab.kernels.relation_terms import Relation as Relation
from alignlab.kernels.relation_terms import Routing as Routing
from alignlab.kernels.relation_terms import mean_relation as mean_relation
from alignlab.kernels.relation_terms import plain_means as plain_means

# CPU time, D=128, both passes, eager / chunked ms: N=144 1.1 / 1.7, 256 3.4 / 3.4, 832 35 / 8.8.
EAGER_TOKENS = 256


def relation_eager(
    student_BTPD: Tensor,
    teacher_BTPD: Tensor,
    saliency_BTP: Tensor,
    routing: Routing,
    margin: float,
    tau: float,
) -> Relation:
    """Computes the three means from full (N, N) matrices in plain torch.

    This is the reference that every other implementation is tested and timed against.
    """
    dtype = accumulation_dtype(student_BTPD, teacher_BTPD)
    frames, tokens = student_BTPD.shape[1:3]
    student_BND = unit(student_BTPD, dtype).flatten(1, 2)
    teacher_BND = unit(teacher_BTPD, dtype).flatten(1, 2)
    gap_BNN = (student_BND @ student_BND.mT - teacher_BND @ teacher_BND.mT).abs()
    itself_NN = torch.eye(frames * tokens, dtype=torch.bool, device=student_BTPD.device)
    distance_BNN = (gap_BNN - margin).relu().masked_fill(itself_NN, 0.0)

    saliency_BN = saliency_BTP.to(dtype).flatten(1)
    weight_BNN = pair_weight(saliency_BN[:, :, None], saliency_BN[:, None, :], routing)
    frame_N = torch.arange(frames, device=student_BTPD.device).repeat_interleave(tokens)
    apart_NN = (frame_N[:, None] - frame_N).abs().to(dtype)
    same_NN = (apart_NN == 0).to(dtype)
    decay_NN = torch.exp(-apart_NN / tau) * (1.0 - same_NN)

    def weighted_mean(weight_BNN: Tensor) -> Tensor:
        total_B = (weight_BNN * distance_BNN).sum((1, 2))
        return total_B / (weight_BNN.sum((1, 2)) + DENOMINATOR_EPS)

    return Relation(
        weighted_mean(weight_BNN * same_NN),
        weighted_mean(weight_BNN * decay_NN),
        weighted_mean(weight_BNN),
    )


def relation_triton(
    student_BTPD: Tensor,
    teacher_BTPD: Tensor,
    saliency_BTP: Tensor,
    routing: Routing,
    margin: float,
    tau: float,
) -> Relation:
    """Computes the same with Triton, which is imported when first used: it exists for Linux only
    and takes a second."""
    from alignlab.kernels import relation_triton as module

    return module.relation_triton(student_BTPD, teacher_BTPD, saliency_BTP, routing, margin, tau)


OPERATION: Operation[Callable[[Tensor, Tensor, Tensor, Routing, float, float], Relation]]
OPERATION = Operation(
    "relation_distance",
    {"eager": relation_eager, "chunked": relation_chunked, "triton": relation_triton},
    eager_tokens=EAGER_TOKENS,
)
implementations = OPERATION.implementations


def relation_distance(
    student_BTPD: Tensor,
    teacher_BTPD: Tensor,
    *,
    saliency_BTP: Tensor | None = None,
    routing: Routing = "uniform",
    margin: float = 0.0,
    tau: float = math.inf,
    impl: Impl = "auto",
) -> Relation:
    """Computes how far the student's token relations are from the teacher's, per sample.

    The formulas are at the top of this file. Sums are accumulated in float32 (float64 if student or
    teacher is float64), also under autocast. The gradient reaches `student_BTPD` only: teacher and
    saliency are constants. Vectors are divided by `max(norm, 1e-12)`. A mean over no pairs is 0.

    Args:
        student_BTPD: student tokens; their width need not be the teacher's.
        teacher_BTPD: teacher tokens at the same places.
        saliency_BTP: in [0, 1]; needed for every routing but "uniform", which does not read it.
        routing: weight of a pair of tokens with saliencies a and b: "or" a + b - ab, "and" ab,
            "xor" |a - b|, "uniform" 1 (VideoREPA). Under a constant saliency, "xor" weighs nothing
            and every mean is 0.
        margin: difference of two cosines that is free of charge, >= 0.
        tau: frames after which the weight of a cross-frame pair has fallen to 1/e, > 0; `temporal`
            only. Infinity: no decay.
        impl: "auto" picks an implementation for this device, dtype and shape; a name asks for
            exactly that one.

    Returns:
        `Relation(spatial, temporal, joint)`, (B,) each.

    Raises:
        ValueError: shapes do not fit, a setting has no meaning, the teacher requires a gradient,
            or `impl` cannot run.
    """
    _check(student_BTPD, teacher_BTPD, saliency_BTP, routing, margin, tau)
    refuse_teacher_gradient("relation_distance", teacher_BTPD)
    compute = OPERATION.choose(impl, student_BTPD.flatten(1, 2))
    if saliency_BTP is None:
        saliency_BTP = torch.ones_like(student_BTPD[..., 0])
    with torch.autocast(student_BTPD.device.type, enabled=False):
        return compute(student_BTPD, teacher_BTPD, saliency_BTP.detach(), routing, margin, tau)


def _check(
    student_BTPD: Tensor,
    teacher_BTPD: Tensor,
    saliency_BTP: Tensor | None,
    routing: Routing,
    margin: float,
    tau: float,
) -> None:
    student, teacher = tuple(student_BTPD.shape), tuple(teacher_BTPD.shape)
    if len(student) != 4 or student[:3] != teacher[:3] or len(teacher) != 4:
        raise ValueError(f"student {student} and teacher {teacher} are not (B, T, P, D) alike")
    if routing not in get_args(Routing):
        raise ValueError(f"unknown routing {routing!r}: choose {', '.join(get_args(Routing))}")
    if routing != "uniform" and saliency_BTP is None:
        raise ValueError(f"routing {routing!r} needs a saliency")
    if saliency_BTP is not None and saliency_BTP.shape != student_BTPD.shape[:3]:
        raise ValueError(
            f"saliency {tuple(saliency_BTP.shape)} does not match the tokens {student[:3]}"
        )
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin must be at least 0 and finite, got {margin}")
    if not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}")
