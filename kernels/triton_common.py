"""What the Triton files of both operations share: bit planes, norms, what a GPU is good at.

Imported only where Triton is. What no kernel can compute is refused in dispatch.py, which needs no
Triton.

Bit planes are matrices of small integer codes, packed into bytes so that unpacking needs no
reshape. Columns are cut into groups of P*Q, with P = 8 // BITS planes of Q columns. Byte q of a
group holds columns q, Q + q, 2Q + q, ...: column g*P*Q + p*Q + q goes to bits [p*BITS, (p+1)*BITS)
of byte g*Q + q. So the Q codes of one plane, which are neighbours in the matrix, are read with one
load of Q neighbouring bytes and one bit test, and are the K-block of a matrix product as they
stand.

Shape letters: M rows, N columns, W = N / P words (bytes), Q columns of a plane.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROW_ELEMENTS = 4096


def rows_per_program(channels: int) -> int:
    """Counts the vectors of `channels` (a power of two) that one program of a row kernel takes."""
    return max(1, _ROW_ELEMENTS // channels)


def has_wgmma(x: Tensor) -> bool:
    """Whether `x` is on a GPU whose tensor cores read shared memory themselves: sm_90 or later."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)


def product_precision(element_size: int) -> str:
    """Names how `tl.dot` multiplies numbers of so many bytes.

    Products of 16-bit floats are exact anyway; float32 is split into three products of tensor
    floats, which are as good as one in float32.
    """
    return "tf32x3" if element_size == 4 else "ieee"


@triton.jit
def clamped(norm, eps):
    """Bounds a norm from below by `eps`, as `alignlab.kernels.cosine.unit` does."""
    # where, since a maximum would turn NaN into eps
    return tl.where(norm < eps, eps, norm)


def words_per_row(num_columns: int, bits: int, q: int) -> int:
    """Counts the bytes of a row, which is filled up to a whole number of groups."""
    return -(-num_columns // (8 // bits * q)) * q


@triton.jit
def pack_planes(codes_MN, BITS: tl.constexpr, Q: tl.constexpr):
    """Packs a tile of codes (integers in [0, 2**BITS)) into (M, N / P) uint8 words.

    N must be a multiple of P*Q, and the tile must begin at the first column of a group.
    """
    P: tl.constexpr = 8 // BITS
    M: tl.constexpr = codes_MN.shape[0]
    GROUPS: tl.constexpr = codes_MN.shape[1] // (P * Q)
    codes_MGPQ = tl.reshape(codes_MN.to(tl.int32), (M, GROUPS, P, Q))
    shift_P = tl.arange(0, P) * BITS
    words_MGQ = tl.sum(codes_MGPQ << shift_P[None, None, :, None], axis=2)
    return tl.reshape(words_MGQ, (M, GROUPS * Q)).to(tl.uint8)


@triton.jit
def first_word(block, BITS: tl.constexpr, Q: tl.constexpr):
    """Gives the first of the Q words that hold columns [block*Q, (block+1)*Q)."""
    P: tl.constexpr = 8 // BITS
    return block // P * Q


@triton.jit
def plane_bit(words_MQ, block, BIT: tl.constexpr, BITS: tl.constexpr):
    """Tests bit BIT (0 is the lowest) of the codes in columns [block*Q, (block+1)*Q).

    Turn the outcome into numbers with `tl.where`: a cast of shifted words costs a conversion
    instruction per element.
    """
    P: tl.constexpr = 8 // BITS
    mask = tl.cast(1 << (block % P * BITS + BIT), tl.uint8)
    return (words_MQ & mask) != 0
