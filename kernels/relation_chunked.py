"""The relation distance from tiles of pairs, in plain torch on any device.

Shape letters: B batch, T frames, P tokens per frame, N = T*P tokens, D width; in tiles, R rows
(tokens of one frame), U frames from that one on, S sums.
"""

import math
from itertools import product
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from alignlab.kernels.cosine import accumulation_dtype, unit, unit_backward
from alignlab.kernels.products import add_product, factor_dtype
from alignlab.kernels.relation_terms import DENOMINATOR_EPS, Relation, Routing, pair_weight

# Pairs of a tile, over the whole batch: 8 MiB in float32, of which about four are alive at a time.
TILE_PAIRS = 2**21


def relation_chunked(
    student_BTPD: Tensor,
    teacher_BTPD: Tensor,
    saliency_BTP: Tensor,
    routing: Routing,
    margin: float,
    tau: float,
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
        student_BTPD, teacher_BTPD, saliency_BTP, torch.stack(factors), routing, margin, with_slopes
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the sums of weighted distances and of weights over pairs, (S, B) each, and the
    slopes of the former towards unit student vectors, (S, B, T, P, D), without sums unless asked
    for. `factor_ST` says how much a pair counts in each sum by its distance in frames."""
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
        distance_BU = gap_BRUP.abs().mul_(weight_BRUP).sum((1, 3))
        sums_SB += (distance_BU * factor_S1U).sum(-1)
        weights_SB += (weight_BRUP.sum((1, 3)) * factor_S1U).sum(-1)
        if with_slopes:
            slope_BRUP = gap_BRUP.sign_().mul_(weight_BRUP)
            _add_slopes(slopes, slope_BRUP, student_BTPD, factor_ST, rows)
    return sums_SB, weights_SB, slopes


def _tile_rows(tokens: int, most: int) -> int:
    """Rows of a tile, at most `most`, such that the tiles of a frame are of about the same size."""
    return math.ceil(tokens / math.ceil(tokens / max(1, most))) if tokens else 1


def _shrunk_gaps(student_BTPD: Tensor, teacher_BTPD: Tensor, margin: float, rows: _Rows) -> Tensor:
    """Computes s_ij - t_ij of a tile, moved towards zero by the margin, (B, R, U, P).

    The magnitude is the pair's distance and the sign its slope; both are 0 in the dead zone and for
    a token with itself.
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
) -> tuple[Tensor, Tensor, Tensor]:
    sums = len(factor_ST)
    sums_SB = factor_ST.new_empty(sums, len(student_BTPD))
    slopes = factor_ST.new_empty(sums if with_slopes else 0, *student_BTPD.shape)
    return sums_SB, torch.empty_like(sums_SB), slopes


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weights_SB, slopes = output
    ctx.mark_non_differentiable(weights_SB, slopes)
    ctx.set_materialize_grads(False)  # the slopes' own gradient would be as large as they are
    ctx.save_for_backward(inputs[0], slopes)


def _backward(ctx: Any, upstream_SB: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream_SB is None:
        return (None,) * 7
    student_BTPD, slopes = ctx.saved_tensors
    grad_BTPD = slopes[0] * upstream_SB[0][:, None, None, None]
    for slope_BTPD, upstream_B in zip(slopes[1:], upstream_SB[1:], strict=True):
        grad_BTPD.addcmul_(slope_BTPD, upstream_B[:, None, None, None])
    return unit_backward(grad_BTPD, student_BTPD), *[None] * 6


_pair_sums.register_autograd(_backward, setup_context=_setup)
