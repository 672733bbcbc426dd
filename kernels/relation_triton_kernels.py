"""The Triton kernels of the relation distance, and the tiles that they are compiled for.

What they are for is said in relation_triton.py. Shape letters: M rows of a tile, N columns, D
channels of a step, C channels of a tile, Q tokens of a block, S = 4 Q of a square of pairs, W = Q
packed words of a square, R rows of vectors.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alignlab.kernels.triton_common import (
    clamped,
    has_wgmma,
    pack_planes,
    plane_bit,
    product_precision,
    rows_per_program,
)


class Tiles(NamedTuple):
    """How the kernels cut their work. A word packs 4 codes, hence squares of 4 x 4 blocks of pairs.

    Args:
        block: Q, tokens of a block.
        squares: side by side in a tile of cosines.
        depth: channels of a step of the cosines.
        channels: of a tile of the gradient, which is as high as a square.
        planes: blocks of a step of the gradient: 1, 2 or 4.
        stages: of the pipelines of cosines and gradient.
    """

    block: int
    squares: int
    depth: int
    channels: int
    planes: int
    stages: tuple[int, int]


# By bytes per element and whether the GPU has wgmma. None spills a register.
TILES = {
    (2, True): Tiles(32, 2, 64, 256, 2, (4, 4)),
    (2, False): Tiles(32, 1, 64, 256, 1, (4, 4)),
    (4, True): Tiles(32, 1, 32, 128, 1, (4, 4)),
    (4, False): Tiles(16, 2, 32, 128, 1, (4, 4)),
}
WARPS = 8


def tiles_for(x: Tensor, dtype: torch.dtype) -> Tiles:
    """Gives the entry of `TILES` for unit vectors of `dtype` on the device of `x`."""
    return TILES[dtype.itemsize, has_wgmma(x)]


def row_constants(x_BTPD: Tensor, unit_BND: Tensor) -> dict[str, Any]:
    """What the two kernels of single vectors are compiled for."""
    channels = triton.next_power_of_2(unit_BND.shape[-1])
    return {
        "WIDTH": x_BTPD.shape[-1],
        "UNIT_WIDTH": unit_BND.shape[-1],
        "ROWS": rows_per_program(channels),
        "CHANNELS": channels,
    }


def distance_constants(
    student_BND: Tensor, teacher_BND: Tensor, tiles: Tiles, routing: str, keep: bool
) -> dict[str, Any]:
    """What `distance_kernel` is compiled for."""
    return {
        "STUDENT_WIDTH": student_BND.shape[-1],
        "TEACHER_WIDTH": teacher_BND.shape[-1],
        "ROUTING": routing,
        "KEEP": keep,
        "Q": tiles.block,
        "SQUARES": tiles.squares,
        "DEPTH": tiles.depth,
        "PRECISION": product_precision(student_BND.element_size()),
        "num_warps": WARPS,
        "num_stages": tiles.stages[0],
    }


def slope_constants(student_BND: Tensor, tiles: Tiles, routing: str) -> dict[str, Any]:
    """What `slope_kernel` is compiled for."""
    width = student_BND.shape[-1]
    return {
        "WIDTH": width,
        "ROUTING": routing,
        "Q": tiles.block,
        "CHANNELS": math.gcd(tiles.channels, width),
        "PLANES": tiles.planes,
        "PRECISION": product_precision(student_BND.element_size()),
        "num_warps": WARPS,
        "num_stages": tiles.stages[1],
    }


# Codes: the distance grows with the student's cosine (bit 0), falls (bit 1) or is flat (no bit).
_GROWS = tl.constexpr(1)
_FALLS = tl.constexpr(2)


@triton.jit
def unit_kernel(
    tokens_ptr, unit_ptr, frames, tokens, stride, places, eps,
    WIDTH: tl.constexpr, UNIT_WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Writes unit vectors: those of the tokens at these places, zeros where there are none."""
    sample = tl.program_id(1).to(tl.int64)
    place_R1 = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    frame_R1, token_R1 = place_R1 // stride, place_R1 % stride
    channel_1C = tl.arange(0, CHANNELS)[None, :]
    row_R1 = (sample * frames + frame_R1) * tokens + token_R1
    real_RC = (frame_R1 < frames) & (token_R1 < tokens) & (channel_1C < WIDTH)
    vector_RC = tl.load(tokens_ptr + row_R1 * WIDTH + channel_1C, mask=real_RC, other=0.0)
    vector_RC = vector_RC.to(tl.float32)
    vector_RC /= clamped(_norm(vector_RC), eps)
    unit_RC = unit_ptr + (sample * places + place_R1) * UNIT_WIDTH + channel_1C
    tl.store(unit_RC, vector_RC, mask=(place_R1 < places) & (channel_1C < UNIT_WIDTH))


@triton.jit
def _norm(vector_RC):
    return tl.sqrt(tl.sum(vector_RC * vector_RC, axis=1))[:, None]


@triton.jit
def distance_kernel(
    student_ptr, teacher_ptr, saliency_ptr, sums_ptr, codes_ptr, margin, squares, side,
    STUDENT_WIDTH: tl.constexpr, TEACHER_WIDTH: tl.constexpr, ROUTING: tl.constexpr,
    KEEP: tl.constexpr, Q: tl.constexpr, SQUARES: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums the distances of a tile of pairs by pairs of blocks and packs their codes.

    A tile is SQUARES squares of S x S pairs side by side. Those on and above the diagonal are
    computed, and written a second time mirrored. Super-tiles are `side` squares wide and high.
    """
    S: tl.constexpr = 4 * Q
    above, left = _square_of(tl.program_id(0), squares, side, SQUARES)
    if (above >= left + SQUARES) | (left >= squares):
        return
    sample = tl.program_id(1).to(tl.int64)
    places = squares * S
    row_M = above * S + tl.arange(0, S)
    col_N = left * S + tl.arange(0, S * SQUARES)
    teacher_ptr += sample * places * TEACHER_WIDTH
    student_ptr += sample * places * STUDENT_WIDTH
    # One accumulator: the teacher's cosines, negated, then the student's.
    gap_MN = tl.zeros((S, S * SQUARES), tl.float32)
    gap_MN = _add_products(gap_MN, teacher_ptr, row_M, col_N, TEACHER_WIDTH, DEPTH, PRECISION)
    gap_MN = _add_products(-gap_MN, student_ptr, row_M, col_N, STUDENT_WIDTH, DEPTH, PRECISION)

    saliency_ptr += sample * places
    sums_ptr += sample * (squares * 4) * (squares * 4)
    codes_ptr += sample * places * (places // 4)
    # One square at a time has half the temporaries of both, so that none is spilled.
    for square in tl.static_range(SQUARES):
        if SQUARES == 1:
            gap_SS = gap_MN
        else:
            gap_SS = _half(gap_MN, square, S)
        if above <= left + square:
            _finish_square(
                gap_SS, above, left + square, saliency_ptr, sums_ptr, codes_ptr, margin, squares,
                ROUTING, KEEP, Q,
            )  # fmt: skip


@triton.jit
def _half(tile_MN, which: tl.constexpr, S: tl.constexpr):
    left_SS, right_SS = tl.split(tl.permute(tl.reshape(tile_MN, (S, 2, S)), (0, 2, 1)))
    if which == 0:
        half_SS = left_SS
    else:
        half_SS = right_SS
    return half_SS


@triton.jit
def _square_of(program, squares, side, SQUARES: tl.constexpr):
    """Maps a program to the first square of its tile, (row, column), super-tile by super-tile.

    The triangle of super-tiles is folded into a rectangle without square roots: an even number n
    of them in a row makes n/2 rows of n+1; what sticks out of row r belongs to row n-1-r.
    """
    columns = side // SQUARES
    count = tl.cdiv(squares, side)
    count += count % 2
    outer, inner = program // (side * columns), program % (side * columns)
    row = outer // (count + 1)
    col = row + outer % (count + 1)
    folded = col >= count
    col = tl.where(folded, col - row - 1, col)
    row = tl.where(folded, count - 1 - row, row)
    return row * side + inner // columns, col * side + inner % columns * SQUARES


@triton.jit
def _add_products(
    acc_MN, unit_ptr, row_M, col_N,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    channel_D = tl.arange(0, DEPTH)
    left_ptr = unit_ptr + row_M.to(tl.int64)[:, None] * WIDTH
    right_ptr = unit_ptr + col_N.to(tl.int64)[None, :] * WIDTH
    for start in range(0, WIDTH, DEPTH):
        left_MD = tl.load(left_ptr + (start + channel_D)[None, :])
        right_DN = tl.load(right_ptr + (start + channel_D)[:, None])
        acc_MN = tl.dot(left_MD, right_DN, acc_MN, input_precision=PRECISION)
    return acc_MN


@triton.jit
def _finish_square(
    gap_SS, above, left, saliency_ptr, sums_ptr, codes_ptr, margin, squares,
    ROUTING: tl.constexpr, KEEP: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Writes sums and codes of the square in row `above` and column `left` of all squares."""
    S: tl.constexpr = 4 * Q
    row_S = above * S + tl.arange(0, S)
    col_S = left * S + tl.arange(0, S)
    # The cosine of a rounded unit vector with itself is not quite 1.
    gap_SS = tl.where(row_S[:, None] == col_S[None, :], 0.0, gap_SS)
    distance_SS = tl.abs(gap_SS)
    # Not a maximum, which would hide a NaN.
    distance_SS = tl.where(distance_SS <= margin, 0.0, distance_SS - margin)
    if ROUTING != "uniform":
        first_S = tl.load(saliency_ptr + row_S)
        second_S = tl.load(saliency_ptr + col_S)
        distance_SS *= _pair_weight(first_S[:, None], second_S[None, :], 1.0, ROUTING)
    sums_S4 = tl.sum(tl.reshape(distance_SS, (S, 4, Q)), axis=2)
    sums_44 = tl.sum(tl.reshape(sums_S4, (4, Q, 4)), axis=1)
    row_4 = (above * 4 + tl.arange(0, 4)[:, None]).to(tl.int64)
    col_4 = (left * 4 + tl.arange(0, 4)[None, :]).to(tl.int64)
    tl.store(sums_ptr + row_4 * (squares * 4) + col_4, sums_44)
    if above != left:
        tl.store(sums_ptr + col_4 * (squares * 4) + row_4, sums_44)
    if KEEP:
        code_SS = tl.where(gap_SS > margin, _GROWS, 0)
        code_SS = tl.where(gap_SS < -margin, _FALLS, code_SS)
        word_W = tl.arange(0, Q)
        stride = (squares * Q).to(tl.int64)
        words_SW = pack_planes(code_SS, BITS=2, Q=Q)
        tl.store(codes_ptr + row_S[:, None] * stride + (left * Q + word_W)[None, :], words_SW)
        if above != left:
            words_SW = pack_planes(tl.trans(code_SS.to(tl.int8)), BITS=2, Q=Q)
            tl.store(codes_ptr + col_S[:, None] * stride + (above * Q + word_W)[None, :], words_SW)


@triton.jit
def _pair_weight(first, second, scale, ROUTING: tl.constexpr):
    """Gives `scale` times the weight of a pair; one instruction per pair if `first` is a column."""
    if ROUTING == "or":
        weight = scale * first + (scale * (1.0 - first)) * second
    elif ROUTING == "and":
        weight = (scale * first) * second
    else:
        tl.static_assert(ROUTING == "xor")
        weight = scale * tl.abs(first - second)
    return weight


@triton.jit
def slope_kernel(
    student_ptr, codes_ptr, saliency_ptr, factor_ptr, slope_ptr, squares,
    WIDTH: tl.constexpr, ROUTING: tl.constexpr, Q: tl.constexpr, CHANNELS: tl.constexpr,
    PLANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes a tile of the derivative by the student's unit vectors, S tokens x CHANNELS.

    It is the sum over all tokens j of factor * weight_ij * (1, -1 or 0 by the code of ij) * unit_j;
    the factor belongs to the pair of blocks of i and j.
    """
    S: tl.constexpr = 4 * Q
    sample = tl.program_id(2).to(tl.int64)
    places, blocks = squares * S, squares * 4
    student_ptr += sample * places * WIDTH
    codes_ptr += sample * places * (places // 4)
    saliency_ptr += sample * places
    factor_ptr += sample * blocks * blocks
    slope_ptr += sample * places * WIDTH
    row_S = tl.program_id(1) * S + tl.arange(0, S)
    channel_C = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    token_Q = tl.arange(0, Q)
    codes_S = codes_ptr + row_S.to(tl.int64) * (squares * Q)
    factor_S = factor_ptr + (row_S // Q).to(tl.int64) * blocks
    slope_SC = tl.zeros((S, CHANNELS), tl.float32)
    for step in range(0, blocks // PLANES):
        words_SQ = tl.load(codes_S[:, None] + (step * PLANES // 4 * Q + token_Q)[None, :])
        for plane in tl.static_range(PLANES):
            block = step * PLANES + plane
            other_Q = block * Q + token_Q
            # The offset of the block has 64 bits, those within it need 32.
            block_ptr = student_ptr + (block * Q).to(tl.int64) * WIDTH
            unit_QC = tl.load(block_ptr + token_Q[:, None] * WIDTH + channel_C[None, :])
            factor_S1 = tl.load(factor_S + block)[:, None]
            grows_SQ = plane_bit(words_SQ, block, BIT=0, BITS=2)
            falls_SQ = plane_bit(words_SQ, block, BIT=1, BITS=2)
            if ROUTING == "uniform":
                # A selection among factors is done in 16 bits, with a third more instructions.
                slope_SQ = tl.where(grows_SQ, 1.0, tl.where(falls_SQ, -1.0, 0.0)) * factor_S1
            else:
                first_S1 = tl.load(saliency_ptr + row_S)[:, None]
                second_1Q = tl.load(saliency_ptr + other_Q)[None, :]
                weight_SQ = _pair_weight(first_S1, second_1Q, factor_S1, ROUTING)
                slope_SQ = tl.where(grows_SQ, weight_SQ, tl.where(falls_SQ, -weight_SQ, 0.0))
            slope_SC = tl.dot(
                slope_SQ.to(unit_QC.dtype), unit_QC, slope_SC, input_precision=PRECISION
            )
    slope_ptr += row_S.to(tl.int64)[:, None] * WIDTH
    tl.store(slope_ptr + channel_C[None, :], slope_SC)


@triton.jit
def norm_gradient_kernel(
    tokens_ptr, slope_ptr, scale_ptr, grad_ptr, frames, tokens, stride, places, eps,
    WIDTH: tl.constexpr, UNIT_WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Turns derivatives by unit vectors into those by the tokens themselves."""
    sample = tl.program_id(1).to(tl.int64)
    index_R1 = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    place_R1 = index_R1 // tokens * stride + index_R1 % tokens
    channel_1C = tl.arange(0, CHANNELS)[None, :]
    real_RC = (index_R1 < frames * tokens) & (channel_1C < WIDTH)
    offset_RC = (sample * frames * tokens + index_R1) * WIDTH + channel_1C
    vector_RC = tl.load(tokens_ptr + offset_RC, mask=real_RC, other=0.0).to(tl.float32)
    slope_ptr += (sample * places + place_R1) * UNIT_WIDTH
    slope_RC = tl.load(slope_ptr + channel_1C, mask=real_RC, other=0.0)
    slope_RC *= tl.load(scale_ptr + sample)
    norm_R1 = _norm(vector_RC)
    clamped_R1 = clamped(norm_R1, eps)
    unit_RC = vector_RC / clamped_R1
    # A clamped norm is a constant, as for torch.
    along_R1 = tl.where(norm_R1 < eps, 0.0, tl.sum(slope_RC * unit_RC, axis=1)[:, None])
    tl.store(grad_ptr + offset_RC, (slope_RC - along_R1 * unit_RC) / clamped_R1, mask=real_RC)
