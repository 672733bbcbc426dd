"""Kernels where an offset in elements passes 2**31, which 32 bits do not hold.

Each case runs one program, the one of the last tokens, on tensors of gigabytes that are only
touched where that program reads and writes: memory that nobody touches costs none.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from alignlab.kernels import pull_push_triton_kernels as pull_push
from alignlab.kernels import relation_triton_kernels as relation
from alignlab.kernels.dispatch import interpreted
from alignlab.kernels.triton_common import words_per_row

# On a GPU every program of the grid would run, on memory that is really there.
pytestmark = pytest.mark.skipif(not interpreted(), reason="runs in Triton's interpreter")

PRODUCT = dict(PRECISION="ieee", BITS=2)
OneProgram = Callable[..., None]


def untouched(*shape: int, dtype: type[np.generic] = np.float32) -> Tensor:
    """Zeros whose pages the kernel makes real only where it writes."""
    return torch.from_numpy(np.zeros(shape, dtype))


@pytest.fixture
def one_program(monkeypatch: pytest.MonkeyPatch) -> OneProgram:
    """Runs a kernel's program of the given indices, and no other."""

    def run(kernel: Any, place: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        index = (*place, 0, 0)[:3]

        def set_index(builder: Any, x: int, y: int, z: int) -> None:
            builder.grid_idx = index

        monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", set_index)
        kernel[(1,)](*arguments, **constants)

    return run


def subjects_of_ends(tokens: int) -> Tensor:
    """Token 0 and the last one are subjects of their own; the rest is padding."""
    subject_BN = torch.full((1, tokens), -1, dtype=torch.int32)
    subject_BN[0, 0], subject_BN[0, -1] = 0, tokens - 1
    return subject_BN


@pytest.mark.parametrize(
    ("tokens", "width", "partner"),
    [
        # the mask of the active pairs
        pytest.param(92_800, 64, 0, id="mask"),
        # tokens x channels: of the other token, and of the token itself
        pytest.param(4_100, 2**19, 4_098, id="channels"),
    ],
)
def test_gradient_of_the_last_token(
    one_program: OneProgram, tokens: int, width: int, partner: int
) -> None:
    """The last token repels one other token and is pulled to its own place in the teacher."""
    rows, q = 16, 16
    subject_BN = subjects_of_ends(tokens)
    student, unit = untouched(1, tokens, width), untouched(1, tokens, width)
    gradient = untouched(1, tokens, width)
    student[0, -1, -1] = 1.0
    unit[0, partner, -2] = unit[0, -1, -3] = 1.0
    words = untouched(1, tokens, words_per_row(tokens, 2, q), dtype=np.uint8)
    group, within = divmod(partner, 4 * q)
    plane, word = divmod(within, q)
    words[0, -1, group * q + word] = 1 << 2 * plane
    tiles = -(-tokens // rows)
    hole = torch.zeros(1, tiles, 3, dtype=torch.int32)
    hole[0, -1] = torch.tensor([0, partner // q, 1])
    zero, one = torch.zeros(1, tokens), torch.ones(1, tokens)
    pull, push = 2.0 * one, 3.0 * one
    channel_tiles = width // 64
    place = (tiles * channel_tiles - 1, 0)
    one_program(
        *(pull_push.gradient_kernel, place, pull, push, student, unit, subject_BN),
        *(zero, zero, one, words, hole, gradient, tokens, 1),
        **(PRODUCT | dict(C=width, ROWS=rows, CHANNELS=64, Q=q, EPS=1e-12)),
    )
    assert gradient[0, -1, -3:].tolist() == [2.0, 3.0, 0.0]


def test_similarity_of_the_last_two_tokens(one_program: OneProgram) -> None:
    tokens, width, rows, q = 4_100, 2**19, 16, 4
    subject_BN = torch.full((1, tokens), -1, dtype=torch.int32)
    subject_BN[0, -2], subject_BN[0, -1] = tokens - 2, tokens - 1
    student, unit = (untouched(1, tokens, width) for _ in range(2))
    student[0, -1, -1], unit[0, -2, -1] = 3.0, 0.5
    norm, words = torch.full((1, tokens), 3.0), torch.zeros(0, dtype=torch.uint8)
    column_tiles, row_tiles = -(-tokens // (4 * q)), -(-tokens // rows)
    sums = torch.zeros(1, 1, column_tiles, tokens)
    one_program(
        *(pull_push.overlap_kernel, (row_tiles * column_tiles - 1, 0)),
        *(student, unit, subject_BN, norm, sums, words, tokens, 1, 1, 0.25),
        **(PRODUCT | dict(C=width, KEEP=False, ROWS=rows, DEPTH=8192, Q=q, EPS=1e-12)),
    )
    assert sums[0, 0, -1, -1] == 0.25  # 0.5 - 0.25


@pytest.mark.parametrize(
    ("squares", "width", "q"),
    [
        pytest.param(258, 2**19, 4, id="channels"),
        pytest.param(11_586, 16, 1, id="pairs of blocks"),
    ],
)
def test_distance_of_the_last_tokens(
    one_program: OneProgram, squares: int, width: int, q: int
) -> None:
    """The last two squares of pairs, above the diagonal, and mirrored below it."""
    side, blocks = 4 * q, 4 * squares
    tokens = squares * side
    student, teacher = untouched(1, tokens, width), untouched(1, tokens, width)
    student[0, -1 - side, -1] = student[0, -1, -1] = 1.0
    sums = untouched(1, blocks, blocks)
    empty = torch.zeros(0)
    program = (squares - 2) * squares + squares - 1
    one_program(
        *(relation.distance_kernel, (program, 0), student, teacher, empty, sums, empty),
        *(0.25, squares, squares),
        **dict(STUDENT_WIDTH=width, TEACHER_WIDTH=width, ROUTING="uniform", KEEP=False),
        **dict(Q=q, SQUARES=1, DEPTH=min(width, 8192), PRECISION="ieee"),
    )
    assert sums[0, -5, -1] == sums[0, -1, -5] == 0.75
    assert sums[0, -8:].sum() == 2 * 0.75


def test_slope_of_the_last_token(one_program: OneProgram) -> None:
    squares, width, q = 17, 2**19, 64
    side, blocks = 4 * q, 4 * squares
    tokens = squares * side
    student, slope = untouched(1, tokens, width), untouched(1, tokens, width)
    student[0, -2, -1] = 1.0
    codes = untouched(1, tokens, tokens // 4, dtype=np.uint8)
    factor = untouched(1, blocks, blocks)
    group_end = tokens // 4 - q
    other = (tokens - 2) % side
    codes[0, -1, group_end + other % q] = 1 << 2 * (other // q)
    factor[0, -1, (tokens - 2) // q] = 0.5
    empty = torch.zeros(0)
    one_program(
        *(relation.slope_kernel, (width // 16 - 1, squares - 1, 0)),
        *(student, codes, empty, factor, slope, squares),
        **dict(WIDTH=width, ROUTING="uniform", Q=q, CHANNELS=16, PLANES=4, PRECISION="ieee"),
    )
    assert slope[0, -1, -1] == 0.5
    assert slope[0, -side:].sum() == 0.5
