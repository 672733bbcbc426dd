"""Where each token goes in the next frame: a divergence of softmaxes over a window around it.

With p_ik the dot product of token i of frame t with the k-th of the `window` x `window` tokens
around its place in frame t+1, of the student (s) and the teacher (t), tau the temperature, and
softmaxes over those places k that lie within the frame:

    divergence = mean over i of  sum_k softmax(t_i / tau)_k (log softmax(t_i / tau)_k
                                                             - log softmax(s_i / tau)_k)

over all tokens i but the last frame's.

Below: the term, the plain reference, the chunked implementation, and the operation that chooses
among them.

Shape letters: B batch, T frames, H, W tokens of a frame, D width, K = window^2 places; in tiles, L
places of a frame with columns of zeros behind each row, Z tiles of S of them, C = S + window - 1.
"""

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from alignlab.kernels.cosine import (
    accumulation_dtype,
    refuse_teacher_gradient,
    unit,
    unit_backward,
)
from alignlab.kernels.dispatch import Impl as Impl
from alignlab.kernels.dispatch import Operation

OUTSIDE = -1e30  # of a softmax: no share, and finite, so that no gradient is NaN

# CPU time, one thread, D=128, window 7, unit vectors, both passes, eager / chunked ms: N=48
# 4.4 / 5.8 (four samples 6.3 / 10), 256 7.6 / 8.8 (in pairs 0.95), 1024 33 / 12.
EAGER_TOKENS = 256
# Places of a tile. More multiply more that is outside the window, fewer make smaller products. The
# products alone, 5x30x52 tokens, D=256, both passes: 6 64 ms, 8 61, 12 56, 16 55, 24 66, 32 64.
TILE = 16


class LocalGram(NamedTuple):
    """The divergence, (B,), >= 0."""

    divergence: Tensor


Products = Callable[[Tensor, int, bool], Tensor]


def local_gram_eager(
    student_BTHWD: Tensor,
    teacher_BTHWD: Tensor,
    window: int,
    temperature: float,
    normalize: bool,
) -> LocalGram:
    """Computes the divergence one place of the window after the other in plain torch.

    This is the reference that every other implementation is tested and timed against.
    """
    dtype = accumulation_dtype(student_BTHWD, teacher_BTHWD)
    return local_gram_plain(student_BTHWD, teacher_BTHWD, window, temperature, normalize, dtype)


def local_gram_plain(
    student_BTHWD: Tensor,
    teacher_BTHWD: Tensor,
    window: int,
    temperature: float,
    normalize: bool,
    dtype: torch.dtype,
) -> LocalGram:
    """Computes the formula as it stands, every norm, product and sum in `dtype`."""
    student_BTHWK, teacher_BTHWK = (
        next_frame_products(unit(x, dtype) if normalize else x.to(dtype), window)
        for x in (student_BTHWD, teacher_BTHWD)
    )
    return _divergence(student_BTHWK, teacher_BTHWK, window, temperature)


def next_frame_products(tokens_BTHWD: Tensor, window: int) -> Tensor:
    """Computes dot products of each token with those around its place a frame later.

    Returns:
        (B, T-1, H, W, K), K = `window`^2 in row-major order; 0 with what lies outside the frame.
    """
    height, width = tokens_BTHWD.shape[2:4]
    reach = window // 2
    now, later = tokens_BTHWD[:, :-1], F.pad(tokens_BTHWD[:, 1:], (0, 0, *[reach] * 4))
    # one place of the window after the other: each is a view, where an unfold copies K of them
    return torch.stack(
        [
            torch.linalg.vecdot(now, later[:, :, row : row + height, column : column + width])
            for row in range(window)
            for column in range(window)
        ],
        dim=-1,
    )


def _divergence(
    student_BTHWK: Tensor, teacher_BTHWK: Tensor, window: int, temperature: float
) -> LocalGram:
    """Computes the mean divergence of the two softmaxes; 0 where there are no tokens."""
    height, width = student_BTHWK.shape[2:4]
    outside_HWK = _outside(height, width, window, student_BTHWK.device)
    outside = max(OUTSIDE, torch.finfo(student_BTHWK.dtype).min / 2)
    log_student, log_teacher = (
        F.log_softmax((x / temperature).masked_fill(outside_HWK, outside), -1)
        for x in (student_BTHWK, teacher_BTHWK)
    )
    share = log_teacher.exp()
    divergence = share * (log_teacher - log_student)  # 0 outside, where the share is
    divergence_BTHW = divergence.sum(-1)
    if divergence_BTHW.numel() == 0:
        return LocalGram(divergence_BTHW.sum((1, 2, 3)))
    return LocalGram(divergence_BTHW.mean((1, 2, 3)))


def _outside(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """Which places of the window around each token are outside the frame, bool (H, W, K)."""
    offsets = torch.arange(window, device=device) - window // 2
    rows_HR = torch.arange(height, device=device)[:, None] + offsets
    columns_WR = torch.arange(width, device=device)[:, None] + offsets
    row_out, column_out = (
        (rows_HR < 0) | (rows_HR >= height),
        (columns_WR < 0) | (columns_WR >= width),
    )
    return (row_out[:, None, :, None] | column_out[None, :, None, :]).flatten(2)


def local_gram_chunked(
    student_BTHWD: Tensor,
    teacher_BTHWD: Tensor,
    window: int,
    temperature: float,
    normalize: bool,
) -> LocalGram:
    """Computes the same from small matrix products of `TILE` tokens with their surroundings.

    They are multiplied in float32 (float64 from float64) whatever the input dtype. For the backward
    pass the tokens are kept as they came, and numbers for each place of the window.
    """
    dtype = accumulation_dtype(student_BTHWD, teacher_BTHWD)
    student_BTHWK, teacher_BTHWK = (
        _products(x, window, normalize, dtype) for x in (student_BTHWD, teacher_BTHWD)
    )
    return _divergence(student_BTHWK, teacher_BTHWK, window, temperature)


class _Rows(NamedTuple):
    """Rows `first` to `last` of a frame and those `offset` further down in the next frame, both
    within their frame, and how they are cut into tiles.

    A frame lies flat, `reach` zeros first and behind each row, so that what is beside a row is 0
    and a tile need not end where a row does.
    """

    place: int
    offset: int
    first: int
    last: int
    tiles: int


def _rows(height: int, width: int, window: int) -> list[_Rows]:
    """For each row of the window that any token has, from the top."""
    reach, rows = window // 2, []
    for place in range(window):
        offset = place - reach
        first, last = max(0, -offset), height - max(0, offset)
        if first < last:
            tiles = -(-(last - first) * (width + reach) // TILE)
            rows.append(_Rows(place, offset, first, last, tiles))
    return rows


def tile_pairs(height: int, width: int, window: int) -> int:
    """Counts the pairs that `chunked` multiplies for a frame and the next, those outside the window
    included."""
    return sum(rows.tiles for rows in _rows(height, width, window)) * TILE * (TILE + window - 1)


def _flat_frames(tokens_THWD: Tensor, reach: int, dtype: torch.dtype) -> Tensor:
    """Lays out frames flat, (T, L, D), with room for a last tile that is not full."""
    frames, height, width, channels = tokens_THWD.shape
    used = height * (width + reach)
    flat_TLD = tokens_THWD.new_zeros(frames, used + 2 * reach + TILE, channels, dtype=dtype)
    _within(flat_TLD[:, reach : reach + used], height, reach).copy_(tokens_THWD)
    return flat_TLD


def _within(flat: Tensor, height: int, reach: int) -> Tensor:
    """The tokens among places of whole rows, (..., H, W, X) of (..., H * (W + reach), X)."""
    rows: Tensor = flat.unflatten(-2, (height, -1))
    return rows.narrow(-2, 0, rows.shape[-2] - reach)


def _tiles(flat_LD: Tensor, start: int, tiles: int, size: int) -> Tensor:
    """Tiles of `size` places, one every `TILE`, which may overlap: a view, (Z, size, D)."""
    width = flat_LD.shape[1]
    offset = flat_LD.storage_offset() + start * width
    return flat_LD.as_strided((tiles, size, width), (TILE * width, width, 1), offset)


def _band(tiles_ZSC: Tensor, window: int) -> Tensor:
    """The places of the window in a row of it, a view, (Z, S, window)."""
    tiles, size, columns = tiles_ZSC.shape
    return tiles_ZSC.as_strided((tiles, size, window), (size * columns, columns + 1, 1))


@torch.library.custom_op("alignlab::local_gram_chunked", mutates_args=())
def _products(tokens_BTHWD: Tensor, window: int, normalize: bool, dtype: torch.dtype) -> Tensor:
    """Computes what `next_frame_products` does, of unit vectors if `normalize`, in `dtype`."""
    batch, frames, height, width, _ = tokens_BTHWD.shape
    reach, columns = window // 2, TILE + window - 1
    shape = batch, max(0, frames - 1), height, width, window, window
    products = tokens_BTHWD.new_zeros(shape, dtype=dtype)
    if tokens_BTHWD.numel() == 0:
        return products.flatten(-2)
    rows = _rows(height, width, window)
    largest = max(one.tiles for one in rows)
    buffer = products.new_empty(largest, TILE, columns)
    for sample in range(batch):
        tokens_THWD = unit(tokens_BTHWD[sample], dtype) if normalize else tokens_BTHWD[sample]
        flat_TLD = _flat_frames(tokens_THWD, reach, dtype)
        for frame, (place, offset, first, last, tiles) in product(range(frames - 1), rows):
            now_ZSD = _tiles(flat_TLD[frame], reach + first * (width + reach), tiles, TILE)
            start = (first + offset) * (width + reach)
            later_ZCD = _tiles(flat_TLD[frame + 1], start, tiles, columns)
            tiles_ZSC = torch.bmm(now_ZSD, later_ZCD.mT, out=buffer[:tiles])
            band = _band(tiles_ZSC, window).flatten(0, 1)[: (last - first) * (width + reach)]
            products[sample, frame, first:last, :, place] = _within(band, last - first, reach)
    return products.flatten(-2)


@_products.register_fake
def _(tokens_BTHWD: Tensor, window: int, normalize: bool, dtype: torch.dtype) -> Tensor:
    batch, frames, height, width, _ = tokens_BTHWD.shape
    return tokens_BTHWD.new_empty((batch, frames - 1, height, width, window**2), dtype=dtype)


@torch.library.custom_op("alignlab::local_gram_chunked_gradient", mutates_args=())
def _products_gradient(
    upstream_BTHWK: Tensor, tokens_BTHWD: Tensor, window: int, normalize: bool
) -> Tensor:
    """Computes the gradient of `_products`: of each token as the earlier and as the later one."""
    batch, frames, height, width, channels = tokens_BTHWD.shape
    reach, columns, dtype = window // 2, TILE + window - 1, upstream_BTHWK.dtype
    grad_BTHWD = torch.empty_like(tokens_BTHWD, memory_format=torch.contiguous_format)
    if grad_BTHWD.numel() == 0:
        return grad_BTHWD
    rows = _rows(height, width, window)
    largest = max(one.tiles for one in rows)
    upstream = upstream_BTHWK.unflatten(-1, (window, window))
    slopes = upstream.new_zeros(largest, TILE, columns)  # beside the band they stay 0
    flat = upstream.new_zeros(largest * TILE, window)
    buffer = upstream.new_empty(largest, columns, channels)
    for sample in range(batch):
        tokens_THWD = unit(tokens_BTHWD[sample], dtype) if normalize else tokens_BTHWD[sample]
        flat_TLD = _flat_frames(tokens_THWD, reach, dtype)
        grad_TLD = torch.zeros_like(flat_TLD)
        for frame, (place, offset, first, last, tiles) in product(range(frames - 1), rows):
            used = (last - first) * (width + reach)
            flat[used:] = 0.0  # what a frame row of more tokens left there
            places = _within(flat[:used], last - first, reach)
            places.copy_(upstream[sample, frame, first:last, :, place])
            slopes_ZSC = slopes[:tiles]
            _band(slopes_ZSC, window).copy_(flat[: tiles * TILE].unflatten(0, (-1, TILE)))
            start = reach + first * (width + reach)
            later_start = (first + offset) * (width + reach)
            later_ZCD = _tiles(flat_TLD[frame + 1], later_start, tiles, columns)
            _tiles(grad_TLD[frame], start, tiles, TILE).baddbmm_(slopes_ZSC, later_ZCD)
            now_ZSD = _tiles(flat_TLD[frame], start, tiles, TILE)
            both_ZCD = torch.bmm(slopes_ZSC.mT, now_ZSD, out=buffer[:tiles])
            for part in range(0, columns, TILE):  # as many as do not overlap
                part_ZSD = both_ZCD[:, part : part + TILE]
                _tiles(grad_TLD[frame + 1], later_start + part, tiles, part_ZSD.shape[1]).add_(
                    part_ZSD
                )
        used = height * (width + reach)
        grad_THWD = _within(grad_TLD[:, reach : reach + used], height, reach)
        if normalize:
            grad_THWD = unit_backward(grad_THWD.contiguous(), tokens_BTHWD[sample])
        grad_BTHWD[sample] = grad_THWD
    return grad_BTHWD


@_products_gradient.register_fake
def _(upstream_BTHWK: Tensor, tokens_BTHWD: Tensor, window: int, normalize: bool) -> Tensor:
    return torch.empty_like(tokens_BTHWD, memory_format=torch.contiguous_format)


def _setup_chunked(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens_BTHWD, ctx.window, ctx.normalize, _ = inputs
    ctx.save_for_backward(tokens_BTHWD)


def _backward_chunked(ctx: Any, upstream_BTHWK: Tensor) -> tuple[Tensor | None, ...]:
    (tokens_BTHWD,) = ctx.saved_tensors
    grad_BTHWD = _products_gradient(upstream_BTHWK, tokens_BTHWD, ctx.window, ctx.normalize)
    return grad_BTHWD, None, None, None


_products.register_autograd(_backward_chunked, setup_context=_setup_chunked)


OPERATION: Operation[Callable[[Tensor, Tensor, int, float, bool], LocalGram]]
OPERATION = Operation(
    "local_gram",
    {"eager": local_gram_eager, "chunked": local_gram_chunked},
    eager_tokens=EAGER_TOKENS,
    terms=LocalGram._fields,
    token_dims=4,
)


def local_gram(
    student_BTHWD: Tensor,
    teacher_BTHWD: Tensor,
    *,
    window: int = 7,
    temperature: float = 0.1,
    normalize: bool = False,
    impl: Impl = "auto",
) -> LocalGram:
    """Computes KL(teacher || student) of where each token goes in the next frame, per sample.

    The formula is at the top of this file. Computed in float32 (float64 if student or teacher is
    float64), also under autocast. The gradient reaches `student_BTHWD` only: the teacher is a
    constant.

    Args:
        student_BTHWD: student tokens; their width need not be the teacher's.
        teacher_BTHWD: teacher tokens at the same places.
        window: side of the window in the next frame, odd, 7 (SAM2VideoX).
        temperature: of both softmaxes, 0.1 (SAM2VideoX).
        normalize: compare vectors of unit length, and so cosines.
        impl: "auto" picks an implementation for this device, dtype and shape; a name asks for
            exactly that one, which may be of another package (docs/own-kernel.md); a function with
            the signature of `local_gram_eager` is called.

    Returns:
        `LocalGram(divergence)`, (B,); 0 for frames without tokens.

    Raises:
        ValueError: the grids differ, there is one frame, the window is even, the teacher requires a
            gradient, or `impl` cannot run.
    """
    _check(student_BTHWD, teacher_BTHWD, window)
    refuse_teacher_gradient("local_gram", teacher_BTHWD)
    tokens = student_BTHWD.shape[1] * student_BTHWD.shape[2] * student_BTHWD.shape[3]
    compute = OPERATION.choose(impl, student_BTHWD, teacher_BTHWD, tokens)
    with torch.autocast(student_BTHWD.device.type, enabled=False):  # products would be bfloat16
        return LocalGram(*compute(student_BTHWD, teacher_BTHWD, window, temperature, normalize))


def _check(student_BTHWD: Tensor, teacher_BTHWD: Tensor, window: int) -> None:
    student, teacher = tuple(student_BTHWD.shape), tuple(teacher_BTHWD.shape)
    if len(student) != 5 or len(teacher) != 5 or student[:4] != teacher[:4]:
        raise ValueError(f"student {student} and teacher {teacher} differ: (B, T, H, W, D) alike")
    if student[1] < 2:
        raise ValueError("local_gram_flow compares a frame with the next, and there is one")
    if window < 3 or window % 2 == 0:
        raise ValueError(f"window {window} has no middle: give an odd one, 3 or more")
