"""The one table of cases that the benchmark measures, and their inputs.

Shape letters: L blocks, N tokens, C and D width, B batch, T frames, P tokens per frame.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Op = Literal["pull_push", "relation", "local_gram"]
OPS: tuple[Op, ...] = get_args(Op)

# Subjects x tokens of each, as RefAlign has them at 480p; frames x tokens of each, of VideoREPA
# and of 81 frames at 480p, pooled by 2 and in full.
SIZES: dict[Op, tuple[tuple[int, int], ...]] = {
    "pull_push": ((2, 1560), (3, 1560), (4, 1560)),
    "relation": ((13, 150), (24, 150), (21, 390), (21, 1560)),
    "local_gram": ((13, 390), (21, 1560)),
}
WIDTHS = (768, 1024)
BLOCKS = (1, 9)
# Tokens of the sizes on which an implementation is checked before it is timed.
CHECKED_TOKENS = 301


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Args:
        op: the operation.
        groups: subjects of `pull_push`, frames of the others.
        tokens: tokens of each subject or frame.
        width: channels of student and teacher.
        blocks: blocks of the student that share a teacher; 1 but for `pull_push`.
        dtype: of student and teacher.
    """

    op: Op
    groups: int
    tokens: int
    width: int
    blocks: int
    dtype: torch.dtype

    @property
    def num_tokens(self) -> int:
        """All tokens of a sample."""
        return self.groups * self.tokens

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a frame of `local_gram`: as square as its tokens allow."""
        rows = next(n for n in range(math.isqrt(self.tokens), 0, -1) if self.tokens % n == 0)
        return rows, self.tokens // rows

    @property
    def size(self) -> str:
        """Such as `3x1560`."""
        return f"{self.groups}x{self.tokens}"

    @property
    def dtype_name(self) -> str:
        """Such as `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        blocks = f" L={self.blocks}" if self.op == "pull_push" else ""
        return f"{self.op} {self.size} C={self.width}{blocks} {self.dtype_name}"

    def reduced(self) -> "Case":
        """The case of the same kind that correctness is checked on."""
        tokens = min(self.tokens, max(2, CHECKED_TOKENS // self.groups))
        return replace(self, tokens=tokens, blocks=min(self.blocks, 2))


class Inputs(NamedTuple):
    """Student (L, N, C), teacher (N, C) and ids (N,); or both (B, T, P, D) or (B, T, H, W, D) and
    no ids."""

    student: Tensor
    teacher: Tensor
    subject_ids: Tensor | None

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in self if x is not None)

    def double(self) -> "Inputs":
        """The same values in float64."""
        return Inputs(self.student.double(), self.teacher.double(), self.subject_ids)


def select_cases(
    ops: Sequence[Op],
    dtype: torch.dtype,
    *,
    sizes: Sequence[tuple[int, int]] = (),
    widths: Sequence[int] = WIDTHS,
    blocks: Sequence[int] = BLOCKS,
) -> list[Case]:
    """Gives the table, cheapest first per operation.

    Args:
        ops: operations.
        dtype: of all cases.
        sizes: replace the table's sizes for every operation, unless empty.
        widths: channels.
        blocks: blocks of `pull_push`; the others have one.
    """
    cases = []
    for op in ops:
        grid = itertools.product(blocks if op == "pull_push" else (1,), widths, sizes or SIZES[op])
        cases += [
            Case(op, groups, tokens, width, count, dtype) for count, width, (groups, tokens) in grid
        ]
    return cases


def draw_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Draws Gaussian tokens: half of all pairs then push, all tokens pull."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, case.dtype)

    if case.op != "pull_push":
        frame = case.grid if case.op == "local_gram" else (case.tokens,)
        shape = (1, case.groups, *frame, case.width)
        return Inputs(draw(*shape), draw(*shape), None)
    ids = torch.arange(case.groups, device=device).repeat_interleave(case.tokens)
    return Inputs(
        draw(case.blocks, case.num_tokens, case.width), draw(case.num_tokens, case.width), ids
    )
