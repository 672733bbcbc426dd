"""How far the similarities among the student's tokens are from those among the teacher's.

With cosines s_ij among student tokens and t_ij among teacher tokens of one sample, an ordered pair
of tokens costs d_ij = [ |s_ij - t_ij| - margin ]_+ (distance "l1") or its square ("l2"), and d_ii =
0. W_ij is the pair's weight, made
of the saliencies of its tokens; f(i) is the frame of a token:

    spatial  = sum W_ij d_ij / (sum W_ij + 1e-6)              over pairs of one frame
    temporal = sum W_ij v_ij d_ij / (sum W_ij v_ij + 1e-6)    over pairs of different frames,
                                                              v_ij = exp(-|f(i) - f(j)| / tau)
    joint    = sum W_ij d_ij / (sum W_ij + 1e-6)              over all pairs

Pairs i = j are counted in the denominators.

Below: the three means and their weights, the plain reference, the chunked implementation, and the
operation that chooses among them (Triton's is in relation_triton.py).

Shape letters: B batch, T frames, P tokens per frame, N = T*P tokens, D width; in tiles, R rows
(tokens of one frame), U frames from that one on, S sums.
"""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from alignlab.kernels.cosine import (
    accumulation_dtype,
    add_product,
    factor_dtype,
    refuse_teacher_gradient,
    unit,
    unit_backward,
)
from alignlab.kernels.dispatch import Impl as Impl
from alignlab.kernels.dispatch import Operation

Routing = Literal["or", "and", "xor", "uniform"]
Distance = Literal["l1", "l2"]

DENOMINATOR_EPS = 1e-6

# CPU time, D=128, both passes, eager / chunked ms: N=144 1.1 / 1.7, 256 3.4 / 3.4, 832 35 / 8.8.
EAGER_TOKENS = 256
# Pairs of a tile, over the whole batch: 8 MiB in float32, of which about four are alive at a time.
TILE_PAIRS = 2**21


class Relation(NamedTuple):
    """The three weighted means, (B,) each, all >= 0."""

    spatial: Tensor
    temporal: Tensor
    joint: Tensor


def pair_weight(first: Tensor, second: Tensor, routing: Routing) -> Tensor:
    """Computes how much a pair of tokens counts from the saliencies of the two (SARA).

    "or": a + b - ab; "and": ab; "xor": |a - b|; "uniform": 1.
    """
    match routing:
        case "or":
            return first + second - first * second
        case "and":
            return first * second
        case "xor":
            return (first - second).abs()
        case "uniform":
            return torch.ones_like(first * second)


def plain_means(relation: Relation, frames: int, tokens: int, tau: float = math.inf) -> Relation:
    """Turns weighted means of uniform routing into plain ones: sums divided by counts of pairs.

    Only the decay and the 1e-6 are weights there, so this is a constant factor each: VideoREPA and
    MoAlign divide by the number of pairs, SARA by the sum of weights. A mean over no pairs stays 0.

    Args:
        relation: what `relation_distance` gave for `routing="uniform"` and this `tau`.
        frames: T.
        tokens: P.
        tau: the decay that `relation` was computed with.
    """
    pairs = tokens * tokens
    spatial, temporal = frames * pairs, frames * (frames - 1) * pairs
    decayed = pairs * sum(
        2 * (frames - apart) * math.exp(-apart / tau) for apart in range(1, frames)
    )
    return Relation(
        relation.spatial * ((spatial + DENOMINATOR_EPS) / max(spatial, 1)),
        relation.temporal * ((decayed + DENOMINATOR_EPS) / max(temporal, 1)),
        relation.joint * ((spatial + temporal + DENOMINATOR_EPS) / max(spatial + temporal, 1)),
    )


def plain_relation(
    student_BTPD: Tensor,
    teacher_BTPD: Tensor,
    *,
    margin: float = 0.0,
    tau: float = math.inf,
    distance: Distance = "l1",
    impl: Impl = "auto",
) -> Relation:
    """Computes the three means of uniform routing divided by counts of pairs: see `plain_means`.

    Arguments and errors are those of `relation_distance`, but the teacher may require a gradient:
    none reaches it.
    """
    relation = relation_distance(
        student_BTPD,
        teacher_BTPD.detach(),
        margin=margin,
        tau=tau,
        distance=distance,
        impl=impl,
    )
    return plain_means(relation, student_BTPD.shape[1], student_BTPD.shape[2], tau)


def mean_relation(relations: Sequence[Relation]) -> Relation:
    """Averages each of the three means over several relations, such as those of several blocks."""
    return Relation(*(torch.stack(terms).mean(0) for terms in zip(*relations, strict=True)))


def relation_eager(
    student_BTPD: Tensor,
    teacher_BTPD: Tensor,
    saliency_BTP: Tensor,
    routing: Routing,
    margin: float,
    tau: float,
    distance: Distance = "l1",
) -> Relation:
    """Computes the three means from full (N, N) matrices in plain torch.

    This is the reference that every other implementation is tested and timed against.
    """
    dtype = accumulation_dtype(student_BTPD, teacher_BTPD)
    return relation_plain(
        student_BTPD, teacher_BTPD, saliency_BTP, routing, margin, tau, dtype, distance
    )


def relation_plain(
    student_BTPD: Tensor,
    teacher_BTPD: Tensor,
    saliency_BTP: Tensor,
    routing: Routing,
    margin: float,
    tau: float,
    dtype: torch.dtype,
    distance: Distance = "l1",
) -> Relation:
    """Computes the formula as it stands, every norm, product and sum in `dtype`."""
    frames, tokens = student_BTPD.shape[1:3]
    student_BND = unit(student_BTPD, dtype).flatten(1, 2)
    teacher_BND = unit(teacher_BTPD, dtype).flatten(1, 2)
    gap_BNN = (student_BND @ student_BND.mT - teacher_BND @ teacher_BND.mT).abs()
    itself_NN = torch.eye(frames * tokens, dtype=torch.bool, device=student_BTPD.device)
    distance_BNN = (gap_BNN - margin).relu().masked_fill(itself_NN, 0.0)
    if distance == "l2":
        distance_BNN = distance_BNN.square()

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


def relation_chunked(
    student_BTPD: Tensor,
    teacher_BTPD: Tensor,
    saliency_BTP: Tensor,
    routing: Routing,
    margin: float,
    tau: float,
    distance: Distance = "l1",
) -> Relation:
    """Computes the same from tiles of pairs in plain torch, on any device.

    Memory is O(N*D + TILE_PAIRS): no (N, N) matrix is ever held. The gradient is computed along
    with the values, since it needs the same tiles.
    """
    frames = student_BTPD.shape[1]
    dtype = accumulation_dtype(student_BTPD, teacher_BTPD)
    apart_T = torch.arange(frames, dtype=dtype, device=student_BTPD.device)
    # One row for each sum (pairs of one frame, of different frames, and with decay if there is
    # any) with the factor for each distance in frames. A pair of different frames is met once, in
    # the frame that comes first, and stands for both its orders.
    same_T = (apart_T == 0).to(dtype)
    factors = [same_T, 2.0 * (1.0 - same_T)]
    if tau < math.inf:
        factors.append(factors[1] * torch.exp(-apart_T / tau))
    with_slopes = student_BTPD.requires_grad and torch.is_grad_enabled()
    sums_SB, weights_SB, _ = _pair_sums(
        student_BTPD,
        teacher_BTPD,
        saliency_BTP,
        torch.stack(factors),
        routing,
        margin,
        with_slopes,
        distance == "l2",
    )
    total_SB = torch.stack([sums_SB[0], sums_SB[-1], sums_SB[0] + sums_SB[1]])
    weight_SB = torch.stack([weights_SB[0], weights_SB[-1], weights_SB[0] + weights_SB[1]])
    return Relation(*(total_SB / (weight_SB + DENOMINATOR_EPS)))


class _Rows(NamedTuple):
    """The rows of a tile: tokens `start` to `stop` of a frame. Its columns are the tokens of that
    frame and of all later ones."""

    frame: int
    start: int
    stop: int

    def of(self, x_BTP: Tensor) -> Tensor:
        return x_BTP[:, self.frame, self.start : self.stop]


@torch.library.custom_op("alignlab::relation_chunked", mutates_args=())
def _pair_sums(
    student_BTPD: Tensor,
    teacher_BTPD: Tensor,
    saliency_BTP: Tensor,
    factor_ST: Tensor,
    routing: str,
    margin: float,
    with_slopes: bool,
    is_squared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the sums of weighted distances and of weights over pairs, (S, B) each, and the
    slopes of the former towards unit student vectors, (S, B, T, P, D), empty unless
    `with_slopes`. `factor_ST` says how much a pair counts in each sum by its distance in frames."""
    batch, frames, tokens, _ = student_BTPD.shape
    sums_SB = factor_ST.new_zeros(len(factor_ST), batch)
    weights_SB = torch.zeros_like(sums_SB)
    slopes = factor_ST.new_zeros(len(factor_ST) if with_slopes else 0, *student_BTPD.shape)
    dtype = factor_ST.dtype
    factor = factor_dtype(student_BTPD, dtype)
    # contiguous: tokens of several frames are then a view
    student_BTPD = unit(student_BTPD, dtype).to(factor).contiguous()
    teacher_BTPD = unit(teacher_BTPD, dtype).to(factor).contiguous()
    saliency_BTP = saliency_BTP.to(dtype)
    height = _tile_rows(tokens, TILE_PAIRS // max(1, batch * frames * tokens))
    for frame, start in product(range(frames), range(0, tokens, height)):
        rows = _Rows(frame, start, min(start + height, tokens))
        factor_S1U = factor_ST[:, None, : frames - frame]
        gap_BRUP = _shrunk_gaps(student_BTPD, teacher_BTPD, margin, rows)
        weight_BRUP = pair_weight(
            rows.of(saliency_BTP)[:, :, None, None],
            saliency_BTP[:, None, frame:],
            cast(Routing, routing),  # torch.library knows no Literal
        )
        size_BRUP = gap_BRUP.square() if is_squared else gap_BRUP.abs()
        distance_BU = size_BRUP.mul_(weight_BRUP).sum((1, 3))
        sums_SB += (distance_BU * factor_S1U).sum(-1)
        weights_SB += (weight_BRUP.sum((1, 3)) * factor_S1U).sum(-1)
        if with_slopes:
            slope_BRUP = gap_BRUP.mul_(2.0) if is_squared else gap_BRUP.sign_()
            slope_BRUP.mul_(weight_BRUP)
            _add_slopes(slopes, slope_BRUP, student_BTPD, factor_ST, rows)
    return sums_SB, weights_SB, slopes


def _tile_rows(tokens: int, most: int) -> int:
    """Rows of a tile, at most `most`, such that the tiles of a frame are of about the same size."""
    return math.ceil(tokens / math.ceil(tokens / max(1, most))) if tokens else 1


def _shrunk_gaps(student_BTPD: Tensor, teacher_BTPD: Tensor, margin: float, rows: _Rows) -> Tensor:
    """Computes s_ij - t_ij of a tile, moved towards zero by the margin, (B, R, U, P).

    The magnitude is the pair's distance (or the root of it) and the sign its slope's; both are 0 in
    the dead zone and for a token with itself.
    """
    frame, start, stop = rows
    gap_BRN = rows.of(teacher_BTPD) @ teacher_BTPD[:, frame:].flatten(1, 2).mT
    gap_BRN.baddbmm_(rows.of(student_BTPD), student_BTPD[:, frame:].flatten(1, 2).mT, beta=-1)
    gap_BRN[:, :, start:stop].diagonal(dim1=1, dim2=2).zero_()
    torch.ops.aten.softshrink.out(gap_BRN, margin, out=gap_BRN)
    gap_BRUP: Tensor = gap_BRN.unflatten(2, (-1, student_BTPD.shape[2]))
    return gap_BRUP


def _add_slopes(
    slopes_SBTPD: Tensor,
    slope_BRUP: Tensor,
    student_BTPD: Tensor,
    factor_ST: Tensor,
    rows: _Rows,
) -> None:
    """Adds a tile's share to the slope of each sum, from d(s_i.s_j) = s_j ds_i + s_i ds_j."""
    frame = rows.frame
    # Both orders of a pair within a frame are met, each with its own rows, and their gradients are
    # equal: hence the 2. A pair of different frames is met once, with the 2 in its factor.
    add_product(rows.of(slopes_SBTPD[0]), 2.0 * slope_BRUP[:, :, 0], student_BTPD[:, frame])
    if slope_BRUP.shape[2] == 1:
        return
    later_BND = student_BTPD[:, frame + 1 :].flatten(1, 2)
    for out_BTPD, factor_T in zip(slopes_SBTPD[1:], factor_ST[1:], strict=True):
        factor_UP = factor_T[1 : slope_BRUP.shape[2], None].to(slope_BRUP.dtype)
        across_BRN = (slope_BRUP[:, :, 1:] * factor_UP).flatten(2)
        add_product(rows.of(out_BTPD), across_BRN, later_BND)
        add_product(out_BTPD[:, frame + 1 :].flatten(1, 2), across_BRN.mT, rows.of(student_BTPD))


@_pair_sums.register_fake
def _(
    student_BTPD: Tensor,
    teacher_BTPD: Tensor,
    saliency_BTP: Tensor,
    factor_ST: Tensor,
    routing: str,
    margin: float,
    with_slopes: bool,
    is_squared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = len(factor_ST)
    sums_SB = factor_ST.new_empty(sums, len(student_BTPD))
    slopes = factor_ST.new_empty(sums if with_slopes else 0, *student_BTPD.shape)
    return sums_SB, torch.empty_like(sums_SB), slopes


def _setup_chunked(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weights_SB, slopes = output
    ctx.mark_non_differentiable(weights_SB, slopes)
    ctx.set_materialize_grads(False)  # the slopes' own gradient would be as large as they are
    ctx.save_for_backward(inputs[0], slopes)


def _backward_chunked(ctx: Any, upstream_SB: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream_SB is None:
        return (None,) * 8
    student_BTPD, slopes = ctx.saved_tensors
    grad_BTPD = slopes[0] * upstream_SB[0][:, None, None, None]
    for slope_BTPD, upstream_B in zip(slopes[1:], upstream_SB[1:], strict=True):
        grad_BTPD.addcmul_(slope_BTPD, upstream_B[:, None, None, None])
    return unit_backward(grad_BTPD, student_BTPD), *[None] * 7


_pair_sums.register_autograd(_backward_chunked, setup_context=_setup_chunked)


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


OPERATION: Operation[Callable[..., Relation]]
OPERATION = Operation(
    "relation",
    {"eager": relation_eager, "chunked": relation_chunked, "triton": relation_triton},
    eager_tokens=EAGER_TOKENS,
    terms=Relation._fields,
    token_dims=3,
)


def relation_distance(
    student_BTPD: Tensor,
    teacher_BTPD: Tensor,
    *,
    saliency_BTP: Tensor | None = None,
    routing: Routing = "uniform",
    margin: float = 0.0,
    tau: float = math.inf,
    distance: Distance = "l1",
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
        distance: "l1", or "l2": what a pair costs beyond the margin is squared. `eager` and
            `chunked` alone compute the latter; "auto" is one of them.
        impl: "auto" picks an implementation for this device, dtype and shape; a name asks for
            exactly that one, which may be of another package (docs/own-kernel.md); a function with
            the signature of `relation_eager` is called.

    Returns:
        `Relation(spatial, temporal, joint)`, (B,) each.

    Raises:
        ValueError: shapes do not fit, a setting has no meaning, the teacher requires a gradient,
            or `impl` cannot run.
    """
    _check(student_BTPD, teacher_BTPD, saliency_BTP, routing, margin, tau)
    refuse_teacher_gradient("relation_distance", teacher_BTPD)
    check_distance(distance, impl)
    tokens = student_BTPD.shape[1] * student_BTPD.shape[2]
    if distance == "l2" and impl == "auto" and student_BTPD.device.type != "cpu":
        impl = "chunked"  # where the fastest may be one that cannot
    compute = OPERATION.choose(impl, student_BTPD, teacher_BTPD, tokens)
    if saliency_BTP is None:
        saliency_BTP = torch.ones_like(student_BTPD[..., 0])
    with torch.autocast(student_BTPD.device.type, enabled=False):
        arguments = (student_BTPD, teacher_BTPD, saliency_BTP.detach(), routing, margin, tau)
        # without it where it is the default: implementations of other packages do not take it
        terms = compute(*arguments) if distance == "l1" else compute(*arguments, distance)
    return Relation(*terms)


def check_distance(distance: Distance, impl: Impl) -> None:
    """Refuses a distance that an implementation does not compute.

    Raises:
        ValueError: as said, or there is no such distance.
    """
    if distance not in get_args(Distance):
        raise ValueError(f"unknown distance {distance!r}: choose {', '.join(get_args(Distance))}")
    if distance == "l2" and impl not in ("auto", "eager", "chunked"):
        raise ValueError(
            f"distance: l2 is computed by eager and chunked alone, not by {impl}; set impl: auto"
        )


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
