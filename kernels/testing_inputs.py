"""Inputs on which every implementation is checked: odd sizes, and what one does not meet every day.

They are drawn from fixed seeds, in float64, and rounded to the dtype of the case. A hinge and a
sign jump, so the margins are moved a little, to where no pair of tokens is near: rounding a sum
differently then moves no pair over the margin.

Shape letters: L blocks, B samples, N tokens, C channels, T frames, P tokens per frame, in H x W.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignlab.kernels.cosine import unit

SIZES = (1, 63, 100, 257)
MOVED = 0.005
"""How far a margin may be moved."""

_FRAMES = {63: 7, 100: 4}  # all other sizes are one frame


class Inputs(NamedTuple):
    """One call.

    Args:
        student: (L, B, N, C), (B, N, C), (B, T, P, C) or (B, T, H, W, C).
        teacher: but for `pull_push` maybe of another width.
        marks: subject ids of `pull_push`, saliencies of `relation`, none of `local_gram`.
        settings: the arguments that follow.
    """

    student: Tensor
    teacher: Tensor
    marks: Tensor | None
    settings: tuple[Any, ...]


def pull_push_inputs(width: int) -> dict[str, Callable[[torch.dtype], Inputs]]:
    """How the inputs of `pull_push` are made, by name."""
    plain = _subjects(63, width)
    lone = torch.tensor([0] * 62 + [1]).expand(2, -1)
    made: dict[str, tuple[_Tokens, tuple[float, float]]] = {
        **{_size(n): (_subjects(n, width), (0.0, 0.95)) for n in SIZES},
        "one subject": (plain._replace(ids=torch.zeros(2, 63, dtype=torch.int64)), (0.0, 0.95)),
        "all padding": (plain._replace(ids=torch.full((2, 63), -1)), (0.0, 0.95)),
        "a subject of one token": (plain._replace(ids=lone), (0.0, 0.95)),
        "zero vectors": (_with_zeros(plain), (0.0, 0.95)),
        "huge and tiny norms": (_with_norms(plain), (0.0, 0.95)),
        "both margins": (_subjects(100, width), (0.9, 0.85)),
        "a margin above 1": (_subjects(100, width), (0.0, 1.2)),
        "two blocks, strided": (_blocks(_subjects(63, width)), (0.0, 0.95)),
        "no tokens": (_subjects(63, width).cut(slice(2), slice(0)), (0.0, 0.95)),
        "no samples": (_subjects(63, width).cut(slice(0), slice(None)), (0.0, 0.95)),
    }
    return {name: functools.partial(_pull_push, *one) for name, one in made.items()}


def relation_inputs(width: int) -> dict[str, Callable[[torch.dtype], Inputs]]:
    """How the inputs of `relation` are made, by name."""
    plain, usual = _subjects(63, width), ("or", 0.05, 3.0)
    made: dict[str, tuple[_Tokens, tuple[Any, ...], int]] = {
        **{_size(n): (_subjects(n, width), usual, _FRAMES.get(n, 1)) for n in SIZES},
        "zero vectors": (_with_zeros(plain), usual, 7),
        "huge and tiny norms": (_with_norms(plain), usual, 7),
        "frames of one token": (plain.cut(slice(2), slice(5)), usual, 5),
        "no margin, no decay": (plain, ("or", 0.0, math.inf), 7),
        "routing and": (_subjects(100, width), ("and", 0.05, math.inf), 4),
        "routing xor": (_subjects(100, width), ("xor", 0.1, 3.0), 4),
        "uniform": (_subjects(100, width), ("uniform", 0.05, 0.7), 4),
        "two widths, strided": (_two_widths(plain), usual, 7),
        "no tokens": (plain.cut(slice(2), slice(0)), usual, 1),
        "no samples": (plain.cut(slice(0), slice(None)), usual, 7),
    }
    return {name: functools.partial(_relation, *one) for name, one in made.items()}


def local_gram_inputs(width: int) -> dict[str, Callable[[torch.dtype], Inputs]]:
    """How the inputs of `local_gram` are made, by name."""
    plain, usual = _subjects(63, width), (3, 0.1, True)
    many = _subjects(100, width)
    made: dict[str, tuple[_Tokens, tuple[Any, ...], tuple[int, ...]]] = {
        "2 tokens": (_subjects(2, width), usual, (2, 1, 1)),
        "63 tokens": (plain, usual, (7, 3, 3)),
        "100 tokens": (many, (7, 0.1, True), (2, 2, 25)),
        "frames of one row": (many, (5, 0.1, True), (4, 1, 25)),
        "frames of one column": (many, (5, 0.1, True), (4, 25, 1)),
        "a window larger than the frame": (many, (9, 0.1, True), (25, 2, 2)),
        "products of the tokens as they are": (many, (3, 5.0, False), (4, 5, 5)),
        # as they are: the gradient of a zero vector of unit length is beyond float16
        "zero vectors": (_with_zeros(plain), (3, 5.0, False), (7, 3, 3)),
        "huge and tiny norms": (_with_norms(plain), usual, (7, 3, 3)),
        "two widths, strided": (_two_widths(plain), usual, (7, 3, 3)),
        "no tokens": (plain.cut(slice(2), slice(0)), usual, (2, 0, 3)),
        "no samples": (plain.cut(slice(0), slice(None)), usual, (7, 3, 3)),
    }
    return {name: functools.partial(_local_gram, *one) for name, one in made.items()}


class _Tokens(NamedTuple):
    """Student and teacher (..., B, N, C) in float64, and the subject of each token."""

    student: Tensor
    teacher: Tensor
    ids: Tensor

    def cut(self, samples: slice, tokens: slice) -> "_Tokens":
        return _Tokens(*(x[samples, tokens] for x in self))


def draw(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _size(tokens: int) -> str:
    return f"{tokens} token{'s' if tokens > 1 else ''}"


def _subjects(tokens: int, width: int) -> _Tokens:
    """Two samples: three subjects of unequal sizes; shuffled subjects with padding."""
    thirds = torch.arange(tokens) * 3 // tokens
    thirds[: tokens // 5] = 0
    shuffled = torch.randint(-1, 4, (tokens,), generator=torch.Generator().manual_seed(tokens))
    ids = torch.stack([thirds, shuffled])
    return _Tokens(draw(2, tokens, width, seed=0), draw(2, tokens, width, seed=1), ids)


def _with_zeros(tokens: _Tokens) -> _Tokens:
    student = tokens.student.clone()
    student[:, ::5] = 0
    return tokens._replace(student=student, teacher=tokens.teacher * (student[:, :, :1] != 0))


def _with_norms(tokens: _Tokens) -> _Tokens:
    scale = 10.0 ** torch.linspace(-4, 2, tokens.student.shape[1], dtype=torch.float64)[:, None]
    return tokens._replace(student=tokens.student * scale, teacher=tokens.teacher / scale)


def _blocks(tokens: _Tokens) -> _Tokens:
    """Two blocks that share a teacher, and samples that share ids; not contiguous, as after a
    transposition."""
    _, count, width = tokens.student.shape
    return _Tokens(draw(2, 2, width, count, seed=2).mT, tokens.teacher, tokens.ids[1])


def _two_widths(tokens: _Tokens) -> _Tokens:
    _, count, width = tokens.student.shape
    return tokens._replace(
        student=draw(2, width, count, seed=2).mT, teacher=draw(2, count, 2 * width, seed=3)
    )


def _pull_push(tokens: _Tokens, margins: tuple[float, float], dtype: torch.dtype) -> Inputs:
    student, teacher = tokens.student.to(dtype), tokens.teacher.to(dtype)
    cosines = unit(student, torch.float64) @ unit(teacher, torch.float64).mT
    pos_margin, neg_margin = margins
    own = 1.0 - cosines.diagonal(dim1=-2, dim2=-1)
    pos_margin = _clear_of(own, pos_margin) if pos_margin else 0.0
    neg_margin = _clear_of(1.0 - cosines, neg_margin)
    # with blocks, ids are known on the CPU too, as in a run
    host_ids = tokens.ids if student.ndim == 4 else None
    return Inputs(student, teacher, tokens.ids, (pos_margin, neg_margin, host_ids))


def _relation(
    tokens: _Tokens, settings: tuple[Any, ...], frames: int, dtype: torch.dtype
) -> Inputs:
    """Tokens as `frames` frames; of the ids are made saliencies 0, 0.5 and 1."""
    per_frame = tokens.student.shape[1] // frames

    def in_frames(x: Tensor) -> Tensor:
        framed: Tensor = x.unflatten(1, (frames, per_frame))
        return framed

    student, teacher = tokens.student.to(dtype), tokens.teacher.to(dtype)
    routing, margin, tau = settings
    if margin:
        mine, theirs = (unit(x, torch.float64) for x in (student, teacher))
        margin = _clear_of((mine @ mine.mT - theirs @ theirs.mT).abs(), margin)
    saliency = in_frames(tokens.ids % 3 / 2).to(dtype)
    return Inputs(in_frames(student), in_frames(teacher), saliency, (routing, margin, tau))


def _local_gram(
    tokens: _Tokens, settings: tuple[Any, ...], grid: tuple[int, ...], dtype: torch.dtype
) -> Inputs:
    student, teacher = (x.to(dtype).unflatten(1, grid) for x in (tokens.student, tokens.teacher))
    return Inputs(student, teacher, None, settings)


def _clear_of(values: Tensor, margin: float) -> float:
    """A number near `margin`, in the middle of the widest gap between values."""
    low, high = margin - MOVED, margin + MOVED
    near = values[(values > low) & (values < high)].flatten()
    ends = torch.cat([near.new_tensor([low]), near.sort().values, near.new_tensor([high])])
    widest = int(ends.diff().argmax())
    return float(ends[widest] + ends[widest + 1]) / 2
