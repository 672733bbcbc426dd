"""The relation distance in Triton: two passes over the pairs, and 2 bits per pair between them.

Forward: a tile of cosine differences goes straight into sums of weighted distances, and into codes
that say where the distance grows with the cosine and where it falls; tiles below the diagonal are
mirrored, not computed. Backward: codes times weights are one factor of a product with the unit
vectors, then comes the gradient of the L2 norm.

A frame fills whole blocks of Q tokens, so the kernels know blocks only: frames, decay and
denominators are plain torch on matrices of (T, T).

Shape letters: B batch, T frames, P tokens per frame, D width, N places of tokens, K = N / Q blocks,
W = N / 4 packed words.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from alignlab.kernels.cosine import NORM_EPS
from alignlab.kernels.relation import DENOMINATOR_EPS, Relation, Routing
from alignlab.kernels.relation_triton_kernels import (
    Tiles,
    distance_constants,
    distance_kernel,
    norm_gradient_kernel,
    row_constants,
    slope_constants,
    slope_kernel,
    tiles_for,
    unit_kernel,
)

# Up to so many squares in a row, all vectors stay in the L2 cache; beyond, tiles are visited by
# super-tiles of SUPER squares, whose vectors do.
CACHED_SQUARES = 32
SUPER = 8
_FIXED_POINT = 2.0**40


class Places(NamedTuple):
    """Where tokens lie: frame f from place f * `stride` on, of `total` places."""

    frames: int
    tokens: int
    stride: int
    total: int


def _places(saliency_BTP: Tensor, tiles: Tiles) -> Places:
    """Fills up each frame to whole blocks, and all of them to whole tiles."""
    _, frames, tokens = saliency_BTP.shape
    stride = _multiple(tokens, tiles.block)
    total = _multiple(frames * stride, 4 * tiles.block * tiles.squares)
    return Places(frames, tokens, stride, total)


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of


def relation_triton(
    student_BTPD: Tensor,
    teacher_BTPD: Tensor,
    saliency_BTP: Tensor,
    routing: Routing,
    margin: float,
    tau: float,
) -> Relation:
    """Computes the same on a GPU (or in Triton's interpreter) without any (N, N) matrix of floats.

    Unit vectors are rounded to the dtype of the input, or to the wider one if student and teacher
    differ; sums are float32. Beside the unit vectors, memory is 2 bits per pair if a gradient is
    needed, and 4 bytes per 1,024 pairs. Frames are filled up to a multiple of 32 tokens: clips of
    many tiny frames are better left to the other implementations. What the kernels cannot compute
    `dispatch.refuse_for_triton` has refused.
    """
    saliency_BTP = saliency_BTP.float()
    sums_BTT, _ = relation_triton_sums(
        student_BTPD,
        teacher_BTPD.detach(),
        saliency_BTP,
        routing,
        margin,
        torch.promote_types(student_BTPD.dtype, teacher_BTPD.dtype),
        torch.is_grad_enabled() and student_BTPD.requires_grad,
    )
    weights_BTT = weight_sums(saliency_BTP, routing).float()
    frame_T = torch.arange(student_BTPD.shape[1], device=student_BTPD.device)
    apart_TT = (frame_T[:, None] - frame_T).abs().float()
    same_TT = (apart_TT == 0).float()
    decay_TT = torch.exp(-apart_TT / tau) * (1.0 - same_TT)

    def weighted_mean(share_TT: Tensor) -> Tensor:
        weight_B = (weights_BTT * share_TT).sum((1, 2))
        mean_B: Tensor = (sums_BTT * share_TT).sum((1, 2)) / (weight_B + DENOMINATOR_EPS)
        return mean_B

    return Relation(
        weighted_mean(same_TT), weighted_mean(decay_TT), weighted_mean(torch.ones_like(same_TT))
    )


def weight_sums(saliency_BTP: Tensor, routing: str) -> Tensor:
    """Sums the weights of the pairs of each pair of frames in closed form, (B, T, T) in float64."""
    batch, frames, tokens = saliency_BTP.shape
    total_BT = saliency_BTP.double().sum(-1)
    first_BT1, second_B1T = total_BT[:, :, None], total_BT[:, None, :]
    if routing == "uniform":
        return total_BT.new_full((batch, frames, frames), float(tokens * tokens))
    if routing == "and":
        return first_BT1 * second_B1T
    if routing == "or":
        return tokens * (first_BT1 + second_B1T) - first_BT1 * second_B1T
    # sum_i |a_i - b| = (2 rank - P) b + sum_i a_i - 2 (sum of the `rank` smallest a_i). In fixed
    # point, because a cumsum of floats on a GPU is not deterministic.
    level_BTP = (saliency_BTP.double() * _FIXED_POINT).round().long()
    rising_BTP = level_BTP.sort(-1).values
    below_BTP = F.pad(rising_BTP.cumsum(-1), (1, 0))
    level_BTN = level_BTP.flatten(1)[:, None].expand(-1, frames, -1).contiguous()
    rank_BTN = torch.searchsorted(rising_BTP, level_BTN)
    apart_BTN = (2 * rank_BTN - tokens) * level_BTN + below_BTP[..., -1:]
    apart_BTN -= 2 * below_BTP.gather(-1, rank_BTN)
    apart_BTTP = (apart_BTN.double() / _FIXED_POINT).view(batch, frames, frames, tokens)
    return apart_BTTP.sum(-1)


@torch.library.custom_op("alignlab::relation_triton_sums", mutates_args=())
def relation_triton_sums(
    student_BTPD: Tensor,
    teacher_BTPD: Tensor,
    saliency_BTP: Tensor,
    routing: str,
    margin: float,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Sums the weighted distances of the pairs of each pair of frames, (B, T, T) in float32.

    Unit vectors are rounded to `dtype`. Also gives the codes of the pairs for the backward pass,
    (B, N, W), empty unless `keep`.
    """
    sums_BTT, codes_BNW = _outputs(
        student_BTPD, teacher_BTPD, saliency_BTP, routing, margin, dtype, keep
    )
    tiles = tiles_for(student_BTPD, dtype)
    places = _places(saliency_BTP, tiles)
    if student_BTPD.numel() == 0:
        return sums_BTT.zero_(), codes_BNW
    student_BND = _unit(student_BTPD, places, tiles, dtype)
    teacher_BND = _unit(teacher_BTPD, places, tiles, dtype)
    batch, blocks = len(student_BTPD), places.total // tiles.block
    sums_BKK = sums_BTT.new_empty(batch, blocks, blocks)
    side = tiles.squares if blocks // 4 <= CACHED_SQUARES else SUPER
    supers = _multiple(triton.cdiv(blocks // 4, side), 2)
    programs = supers // 2 * (supers + 1) * side**2 // tiles.squares
    with torch.cuda.device_of(student_BTPD):
        distance_kernel[(programs, batch)](
            *(student_BND, teacher_BND, _in_places(saliency_BTP, places), sums_BKK, codes_BNW),
            *(margin, blocks // 4, side),
            **distance_constants(student_BND, teacher_BND, tiles, routing, keep),
        )
    used = places.frames * places.stride // tiles.block
    by_frame = (places.frames, used // places.frames)
    sums_BTKTK = sums_BKK[:, :used, :used].unflatten(2, by_frame).unflatten(1, by_frame)
    return sums_BTKTK.sum((2, 4)), codes_BNW


@relation_triton_sums.register_fake
def _outputs(
    student_BTPD: Tensor,
    teacher_BTPD: Tensor,
    saliency_BTP: Tensor,
    routing: str,
    margin: float,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    batch, frames, _ = saliency_BTP.shape
    total = _places(saliency_BTP, tiles_for(student_BTPD, dtype)).total if keep else 0
    return (
        student_BTPD.new_empty((batch, frames, frames), dtype=torch.float32),
        student_BTPD.new_empty((batch, total, total // 4), dtype=torch.uint8),
    )


def _unit(x_BTPD: Tensor, places: Places, tiles: Tiles, dtype: torch.dtype) -> Tensor:
    """Gives unit vectors, (B, N, D); what is filled up, width included, is 0."""
    shape = len(x_BTPD), places.total, _multiple(x_BTPD.shape[-1], tiles.depth)
    unit_BND = x_BTPD.new_empty(shape, dtype=dtype)
    constants = row_constants(x_BTPD, unit_BND)
    grid = (triton.cdiv(places.total, constants["ROWS"]), len(x_BTPD))
    with torch.cuda.device_of(x_BTPD):
        unit_kernel[grid](x_BTPD.contiguous(), unit_BND, *places, NORM_EPS, **constants)
    return unit_BND


def _in_places(saliency_BTP: Tensor, places: Places) -> Tensor:
    """Lays out saliencies like the unit vectors, (B, N)."""
    filled_BN = F.pad(saliency_BTP, (0, places.stride - places.tokens)).flatten(1)
    return F.pad(filled_BN, (0, places.total - filled_BN.shape[1]))


@torch.library.custom_op("alignlab::relation_triton_gradient", mutates_args=())
def relation_triton_gradient(
    upstream_BTT: Tensor,
    student_BTPD: Tensor,
    saliency_BTP: Tensor,
    codes_BNW: Tensor,
    routing: str,
    dtype: torch.dtype,
) -> Tensor:
    """Computes the gradient of `relation_triton_sums` with respect to the student."""
    grad_BTPD = torch.empty_like(student_BTPD, memory_format=torch.contiguous_format)
    if student_BTPD.numel() == 0:
        return grad_BTPD
    tiles = tiles_for(student_BTPD, dtype)
    places = _places(saliency_BTP, tiles)
    # A pair counts for both its orders. Factors end at 1, which half precision represents exactly.
    factor_BTT = (upstream_BTT + upstream_BTT.mT).float()
    scale_B = factor_BTT.abs().amax((1, 2))
    factor_BTT = factor_BTT / scale_B.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]
    blocks = places.total // tiles.block
    block_K = torch.arange(blocks, device=student_BTPD.device) * tiles.block
    frame_K = (block_K // places.stride).clamp_max(places.frames - 1)
    student_BND = _unit(student_BTPD, places, tiles, dtype)
    slope_BND = torch.empty_like(student_BND, dtype=torch.float32)
    constants = slope_constants(student_BND, tiles, routing)
    grid = (student_BND.shape[-1] // constants["CHANNELS"], blocks // 4, len(student_BND))
    with torch.cuda.device_of(student_BTPD):
        slope_kernel[grid](
            *(student_BND, codes_BNW, _in_places(saliency_BTP, places)),
            *(factor_BTT[:, frame_K[:, None], frame_K].contiguous(), slope_BND, blocks // 4),
            **constants,
        )
        rows = row_constants(student_BTPD, student_BND)
        tokens = places.frames * places.tokens
        norm_gradient_kernel[(triton.cdiv(tokens, rows["ROWS"]), len(student_BND))](
            *(student_BTPD.contiguous(), slope_BND, scale_B, grad_BTPD, *places, NORM_EPS), **rows
        )
    return grad_BTPD


@relation_triton_gradient.register_fake
def _(upstream_BTT: Tensor, student_BTPD: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(student_BTPD, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student_BTPD, _, saliency_BTP, ctx.routing, _, ctx.dtype, _ = inputs
    ctx.save_for_backward(student_BTPD, saliency_BTP, output[1])


def _backward(ctx: Any, upstream_BTT: Tensor, _: None) -> tuple[Tensor | None, ...]:
    grad_BTPD = relation_triton_gradient(upstream_BTT, *ctx.saved_tensors, ctx.routing, ctx.dtype)
    return grad_BTPD, None, None, None, None, None, None


relation_triton_sums.register_autograd(_backward, setup_context=_save)
