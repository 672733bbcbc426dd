"""The Triton kernels of pull_push, and the tiles that they are compiled for.

What they are for is said in pull_push_triton.py. Shape letters: M rows of a tile (student tokens),
N columns (teacher tokens), Q columns of a plane of the mask, C channels of a step.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from alignlab.kernels.cosine import NORM_EPS
from alignlab.kernels.triton_common import (
    clamped,
    first_word,
    has_wgmma,
    plane_bit,
    product_precision,
    rows_per_program,
)


class Tile(NamedTuple):
    """An outcome of `rows` x `columns`, computed in steps of `depth`, and how that is launched."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By bytes per element and architecture (80 stands for all before 90). The largest that compile
# without spilling registers. An overlap tile is as wide as a group of the packed mask, which has
# four planes; a gradient tile is as deep as one.
OVERLAP_TILES = {
    (2, 80): Tile(64, 256, 64, 8, 3),
    (2, 90): Tile(128, 256, 64, 8, 3),
    (4, 80): Tile(64, 128, 32, 8, 3),
    (4, 90): Tile(128, 128, 32, 8, 3),
}
GRADIENT_TILES = {2: Tile(128, 256, 64, 8, 3), 4: Tile(128, 64, 32, 8, 3)}
MASK_BITS = 2
SUBJECT_TILE = 64
HOLE_COLUMNS = 1024


def overlap_tile(x: Tensor) -> Tile:
    """Gives the entry of `OVERLAP_TILES` for the device of `x`; the interpreter counts as sm_90."""
    return OVERLAP_TILES[x.element_size(), 90 if has_wgmma(x) or not x.is_cuda else 80]


def unit_constants(width: int) -> dict[str, Any]:
    """What `unit_kernel` is compiled for."""
    channels = triton.next_power_of_2(width)
    return dict(C=width, BLOCK_C=channels, ROWS=rows_per_program(channels), EPS=NORM_EPS)


def overlap_constants(tile: Tile, element_size: int, width: int, keep: bool) -> dict[str, Any]:
    """What `overlap_kernel` is compiled for."""
    return dict(
        C=width,
        KEEP=keep,
        ROWS=tile.rows,
        DEPTH=tile.depth,
        Q=GRADIENT_TILES[element_size].depth,
        BITS=MASK_BITS,
        PRECISION=product_precision(element_size),
        EPS=NORM_EPS,
    )


def gradient_constants(element_size: int, width: int) -> dict[str, Any]:
    """What `gradient_kernel` is compiled for."""
    tile = GRADIENT_TILES[element_size]
    return dict(
        C=width,
        ROWS=tile.rows,
        CHANNELS=tile.columns,
        Q=tile.depth,
        BITS=MASK_BITS,
        PRECISION=product_precision(element_size),
        EPS=NORM_EPS,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def subjects_kernel(ids_ptr, subject_ptr, others_ptr, num_tokens, TILE: tl.constexpr):
    """Names subjects by their first token and counts the tokens of others, for TILE tokens."""
    base = tl.program_id(1).to(tl.int64) * num_tokens
    row_M = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside_M = row_M < num_tokens
    id_M = tl.load(ids_ptr + base + row_M, mask=inside_M, other=-1)
    first_M = tl.zeros((TILE,), tl.int32) + num_tokens
    others_M = tl.zeros((TILE,), tl.int32)
    for start in range(0, num_tokens, TILE):
        column_N = start + tl.arange(0, TILE)
        id_N = tl.load(ids_ptr + base + column_N, mask=column_N < num_tokens, other=-1)
        same_MN = id_M[:, None] == id_N[None, :]
        first_M = tl.minimum(first_M, tl.min(tl.where(same_MN, column_N[None, :], num_tokens), 1))
        others_M += tl.sum(tl.where(same_MN | (id_N < 0)[None, :], 0, 1), 1)
    tl.store(subject_ptr + base + row_M, tl.where(id_M < 0, -1, first_M), mask=inside_M)
    tl.store(others_ptr + base + row_M, tl.where(id_M < 0, 0, others_M), mask=inside_M)


@triton.jit(do_not_specialize=["num_tokens", "batch", "blocks"])
def unit_kernel(
    student_ptr,
    teacher_ptr,
    subject_ptr,
    unit_ptr,
    norm_ptr,
    cosine_ptr,
    num_tokens,
    batch,
    blocks,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
):
    """Normalises ROWS teacher tokens, and takes norm and cosine of the student's in every block."""
    sample = tl.program_id(1)
    row_M = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside_M = row_M < num_tokens
    channel_C = tl.arange(0, BLOCK_C)
    at_M = sample.to(tl.int64) * num_tokens + row_M
    at_MC = at_M[:, None] * C + channel_C[None, :]
    # Padding is not read: whatever it holds, it counts as zeros.
    valid_M = tl.load(subject_ptr + at_M, mask=inside_M, other=-1) >= 0
    read_MC = valid_M[:, None] & (channel_C < C)[None, :]
    teacher_MC = tl.load(teacher_ptr + at_MC, mask=read_MC, other=0.0).to(tl.float32)
    norm_M = tl.sqrt_rn(tl.sum(teacher_MC * teacher_MC, 1))
    unit_MC = teacher_MC / clamped(norm_M, EPS)[:, None]
    write_MC = inside_M[:, None] & (channel_C < C)[None, :]
    tl.store(unit_ptr + at_MC, unit_MC.to(unit_ptr.dtype.element_ty), mask=write_MC)
    for block in range(0, blocks):
        at_M = tl.cast(block * batch + sample, tl.int64) * num_tokens + row_M
        at_MC = at_M[:, None] * C + channel_C[None, :]
        student_MC = tl.load(student_ptr + at_MC, mask=read_MC, other=0.0).to(tl.float32)
        norm_M = tl.sqrt_rn(tl.sum(student_MC * student_MC, 1))
        cosine_M = tl.sum(student_MC * unit_MC, 1) / clamped(norm_M, EPS)
        tl.store(norm_ptr + at_M, norm_M, mask=inside_M)
        tl.store(cosine_ptr + at_M, cosine_M, mask=inside_M)


@triton.jit
def _quarter(x_MN, PART: tl.constexpr):
    """Gives one quarter of a tile's columns: what is done by quarters needs fewer registers."""
    M: tl.constexpr = x_MN.shape[0]
    HALF: tl.constexpr = x_MN.shape[1] // 2
    halves = tl.split(tl.permute(tl.reshape(x_MN, (M, 2, HALF)), (0, 2, 1)))
    half_MH = halves[PART // 2]
    quarters = tl.split(tl.permute(tl.reshape(half_MH, (M, 2, HALF // 2)), (0, 2, 1)))
    return quarters[PART % 2]


@triton.jit
def _swizzled(index, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Orders tiles by groups of GROUP tile rows, so that neighbours in time share operands."""
    group = index // (GROUP * column_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = index - group * GROUP * column_tiles
    return group * GROUP + within % height, within // height


@triton.jit
def _subject_range(subject_M):
    """Gives the lowest and the highest subject of a tile, 2**31 - 1 and -1 if it has none."""
    return tl.min(tl.where(subject_M < 0, 2**31 - 1, subject_M)), tl.max(subject_M)


@triton.jit
def _kind_of_tile(subject_ptr, row_M, column_N, num_tokens):
    """Tells whether a tile has any pair that counts, and whether all of its pairs do."""
    subject_M = tl.load(subject_ptr + row_M, mask=row_M < num_tokens, other=-1)
    subject_N = tl.load(subject_ptr + column_N, mask=column_N < num_tokens, other=-1)
    low_M, high_M = _subject_range(subject_M)
    low_N, high_N = _subject_range(subject_N)
    one_subject = tl.minimum(low_M, low_N) == tl.maximum(high_M, high_N)
    apart = (high_M < low_N) | (high_N < low_M)
    full = (tl.min(subject_M) >= 0) & (tl.min(subject_N) >= 0)
    return (high_M >= 0) & (high_N >= 0) & (not one_subject), apart & full


@triton.jit
def _products(
    student_ptr,
    unit_ptr,
    row_M,
    column_N,
    last,
    C: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Rows that are not there are read as the last one, since masks cost registers.
    student_ptr += tl.minimum(row_M, last).to(tl.int64)[:, None] * C
    unit_ptr += tl.minimum(column_N, last).to(tl.int64)[None, :] * C
    product_MN = tl.zeros((row_M.shape[0], column_N.shape[0]), tl.float32)
    for start in range(0, C, DEPTH):
        channel_C = start + tl.arange(0, DEPTH)
        if C % DEPTH == 0:
            student_MC = tl.load(student_ptr + channel_C[None, :])
            unit_CN = tl.load(unit_ptr + channel_C[:, None])
        else:
            read_C = channel_C < C
            student_MC = tl.load(student_ptr + channel_C[None, :], mask=read_C[None, :], other=0.0)
            unit_CN = tl.load(unit_ptr + channel_C[:, None], mask=read_C[:, None], other=0.0)
        product_MN = tl.dot(student_MC, unit_CN, product_MN, input_precision=PRECISION)
    return product_MN


@triton.jit
def _reduced(product_MN, least_M, all_count, subject_ptr, row_M, column_N, num_tokens):
    """Gives each row's sum of what exceeds `least`, and the active pairs as 0 and 1."""
    if not all_count:
        # Read again (volatile, or it would not be): kept through the loop, they cost registers.
        inside_M, inside_N = row_M < num_tokens, column_N < num_tokens
        subject_M = tl.load(subject_ptr + row_M, mask=inside_M, other=-1, volatile=True)
        subject_N = tl.load(subject_ptr + column_N, mask=inside_N, other=-1, volatile=True)
        cross_MN = subject_M[:, None] != subject_N[None, :]
        cross_MN = cross_MN & (subject_M >= 0)[:, None] & (subject_N >= 0)[None, :]
        product_MN = tl.where(cross_MN, product_MN, least_M[:, None])
    excess_MN = product_MN - least_M[:, None]
    excess_MN = tl.maximum(excess_MN, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.sum(excess_MN, 1), (excess_MN > 0.0).to(tl.int32)


@triton.jit(do_not_specialize=["num_tokens", "batch", "blocks"])
def overlap_kernel(
    student_ptr,
    unit_ptr,
    subject_ptr,
    norm_ptr,
    sums_ptr,
    words_ptr,
    num_tokens,
    batch,
    blocks,
    threshold,
    C: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    Q: tl.constexpr,
    BITS: tl.constexpr,
    PRECISION: tl.constexpr,
    EPS: tl.constexpr,
):
    """Computes a tile of similarities and reduces it to row sums and a mask of the active pairs.

    A tile is one group of the mask wide. Sums are (2, blocks, column tiles, tokens): overlap, and
    the number of active pairs if KEEP.
    """
    COLUMNS: tl.constexpr = 4 * Q
    row_tiles, column_tiles = tl.cdiv(num_tokens, ROWS), tl.cdiv(num_tokens, COLUMNS)
    block = tl.program_id(1).to(tl.int64)
    sample = block % batch
    row_tile, column_tile = _swizzled(tl.program_id(0), row_tiles, column_tiles, 8)
    row_M = row_tile * ROWS + tl.arange(0, ROWS)
    column_N = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    inside_M = row_M < num_tokens
    subject_ptr += sample * num_tokens

    overlap_M = tl.zeros((ROWS,), tl.float32)
    active_M = tl.zeros((ROWS,), tl.int32)
    words_MQ = tl.zeros((ROWS, Q), tl.int32)
    some_count, all_count = _kind_of_tile(subject_ptr, row_M, column_N, num_tokens)
    if some_count:
        student_ptr += block * num_tokens * C
        unit_ptr += sample * num_tokens * C
        product_MN = _products(
            student_ptr, unit_ptr, row_M, column_N, num_tokens - 1, C, DEPTH, PRECISION
        )
        # The student is not normalised: what its products are compared with is scaled instead.
        norm_M = tl.load(norm_ptr + block * num_tokens + row_M, mask=inside_M, other=0.0)
        scale_M = clamped(norm_M, EPS)
        least_M = threshold * scale_M
        for plane in tl.static_range(4):
            column_Q = column_tile * COLUMNS + plane * Q + tl.arange(0, Q)
            product_MQ = _quarter(product_MN, plane)
            excess_M, active_MQ = _reduced(
                product_MQ, least_M, all_count, subject_ptr, row_M, column_Q, num_tokens
            )
            overlap_M += excess_M
            active_M += tl.sum(active_MQ, 1)
            words_MQ |= active_MQ << (plane * BITS)
        overlap_M /= scale_M

    sums_ptr += (block * column_tiles + column_tile) * num_tokens + row_M
    tl.store(sums_ptr, overlap_M, mask=inside_M)
    if KEEP:
        second = blocks.to(tl.int64) * column_tiles * num_tokens
        tl.store(sums_ptr + second, active_M.to(tl.float32), mask=inside_M)
        words_ptr += ((block * num_tokens + row_M) * column_tiles + column_tile)[:, None] * Q
        words_ptr += tl.arange(0, Q)[None, :]
        tl.store(words_ptr, words_MQ.to(tl.uint8), mask=inside_M[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def hole_kernel(
    subject_ptr, hole_ptr, num_tokens, ROWS: tl.constexpr, COLUMNS: tl.constexpr, Q: tl.constexpr
):
    """Finds columns that a tile of rows need not visit: the widest run around its own place without
    a token of another subject, and what follows the last such token.

    Writes (first, skipped, steps) in units of Q columns: visit `steps` of them, and from `first` on
    the one that is `skipped` further on.
    """
    place = tl.program_id(0) * ROWS
    subject_ptr += tl.program_id(1).to(tl.int64) * num_tokens
    row_M = place + tl.arange(0, ROWS)
    low, high = _subject_range(tl.load(subject_ptr + row_M, mask=row_M < num_tokens, other=-1))
    before, after, last = -1, num_tokens, -1
    for start in range(0, num_tokens, COLUMNS):
        column_N = start + tl.arange(0, COLUMNS)
        subject_N = tl.load(subject_ptr + column_N, mask=column_N < num_tokens, other=-1)
        live_N = (subject_N >= 0) & (high >= 0) & ((low != high) | (subject_N != low))
        at_N = tl.where(live_N, column_N, -1)
        before = tl.maximum(before, tl.max(tl.where(column_N < place, at_N, -1)))
        after = tl.minimum(after, tl.min(tl.where(live_N & (column_N >= place), column_N, after)))
        last = tl.maximum(last, tl.max(at_N))
    first, end = tl.cdiv(before + 1, Q), tl.cdiv(last + 1, Q)
    skipped = tl.maximum(tl.minimum(after // Q, end) - first, 0)
    sample = tl.program_id(1).to(tl.int64)
    hole_ptr += (sample * tl.cdiv(num_tokens, ROWS) + tl.program_id(0)) * 3
    tl.store(hole_ptr, first)
    tl.store(hole_ptr + 1, skipped)
    tl.store(hole_ptr + 2, end - skipped)


@triton.jit(do_not_specialize=["num_tokens", "batch"])
def gradient_kernel(
    grad_cosine_ptr,
    grad_overlap_ptr,
    student_ptr,
    unit_ptr,
    subject_ptr,
    cosine_ptr,
    reach_ptr,
    norm_ptr,
    words_ptr,
    hole_ptr,
    grad_ptr,
    num_tokens,
    batch,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    Q: tl.constexpr,
    BITS: tl.constexpr,
    PRECISION: tl.constexpr,
    EPS: tl.constexpr,
):
    """Sums the teacher's unit vectors over the active pairs of a tile of rows, and goes back
    through the student's norm n: with u the gradient of s / n, s gets (u - (u.s) s / n^2) / n.
    """
    row_tiles, channel_tiles = tl.cdiv(num_tokens, ROWS), tl.cdiv(C, CHANNELS)
    row_tile = tl.program_id(0) // channel_tiles
    block = tl.program_id(1).to(tl.int64)
    sample = block % batch
    row_M = row_tile * ROWS + tl.arange(0, ROWS)
    inside_M = row_M < num_tokens
    channel_C = tl.program_id(0) % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    at_M = block * num_tokens + row_M
    unit_ptr += sample * num_tokens * C

    hole_ptr += (sample * row_tiles + row_tile) * 3
    first, skipped, steps = tl.load(hole_ptr), tl.load(hole_ptr + 1), tl.load(hole_ptr + 2)
    # Rows that are not there are read as the last one: masks cost registers.
    last = num_tokens - 1
    words_in_row = tl.cdiv(num_tokens, Q * 8 // BITS) * Q
    words_ptr += block * num_tokens * words_in_row
    words_ptr += tl.minimum(row_M, last).to(tl.int64)[:, None] * words_in_row
    sum_MC = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in range(0, steps):
        plane = tl.where(step < first, step, step + skipped)
        word_Q = first_word(plane, BITS, Q) + tl.arange(0, Q)
        words_MQ = tl.load(words_ptr + word_Q[None, :])
        # The offset of the plane has 64 bits, those within it need 32.
        plane_ptr = unit_ptr + (plane * Q).to(tl.int64) * C
        column_Q = tl.minimum(tl.arange(0, Q), last - plane * Q)
        at_QC = column_Q[:, None] * C + channel_C[None, :]
        if C % CHANNELS == 0:
            unit_QC = tl.load(plane_ptr + at_QC)
        else:
            unit_QC = tl.load(plane_ptr + at_QC, mask=(channel_C < C)[None, :], other=0.0)
        active_MQ = tl.where(plane_bit(words_MQ, plane, 0, BITS), 1.0, 0.0).to(unit_QC.dtype)
        sum_MC = tl.dot(active_MQ, unit_QC, sum_MC, input_precision=PRECISION)

    subject_ptr += sample * num_tokens
    valid_M = tl.load(subject_ptr + row_M, mask=inside_M, other=-1) >= 0
    cosine_M = tl.load(cosine_ptr + at_M, mask=inside_M, other=0.0)
    reach_M = tl.load(reach_ptr + at_M, mask=inside_M, other=0.0)
    norm_M = tl.load(norm_ptr + at_M, mask=inside_M, other=0.0)
    pull_M = tl.load(grad_cosine_ptr + at_M, mask=inside_M, other=0.0)
    push_M = tl.load(grad_overlap_ptr + at_M, mask=inside_M, other=0.0)
    scale_M = 1.0 / clamped(norm_M, EPS)
    # Below EPS the norm is a constant.
    slope_M = tl.where(norm_M < EPS, 0.0, pull_M * cosine_M + push_M * reach_M) * scale_M
    first_channel = tl.program_id(0) % channel_tiles * CHANNELS
    PART: tl.constexpr = CHANNELS // 4
    for part in tl.static_range(4):
        part_MC = _quarter(sum_MC, part)
        channel_C = first_channel + part * PART + tl.arange(0, PART)
        use_MC = valid_M[:, None] & (channel_C < C)[None, :]
        at_MC = at_M[:, None] * C + channel_C[None, :]
        own_MC = row_M.to(tl.int64)[:, None] * C + channel_C[None, :]
        student_MC = tl.load(student_ptr + at_MC, mask=use_MC, other=0.0).to(tl.float32)
        unit_MC = tl.load(unit_ptr + own_MC, mask=use_MC, other=0.0).to(tl.float32)
        grad_MC = push_M[:, None] * part_MC + pull_M[:, None] * unit_MC
        grad_MC = (grad_MC - slope_M[:, None] * student_MC) * scale_M[:, None]
        grad_MC = tl.where(valid_M[:, None], grad_MC, 0.0).to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + at_MC, grad_MC, mask=inside_M[:, None] & (channel_C < C)[None, :])
