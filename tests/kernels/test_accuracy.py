"""One set of checks for every implementation of both operations, in every dtype it takes.

The truth is the plain formula in float64 on the same, already rounded, inputs. An implementation
may err as much as the plain formula does when it is computed in the dtype of the inputs.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.kernels.dispatch import interpreted
from alignlab.kernels.pull_push import pull_push
from alignlab.kernels.relation import relation_distance
from random_tensors import draw_double as draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}
SIZES = [1, 63, 100, 257]


@dataclass(frozen=True)
class Case:
    """Tokens (B, N, C) of both sides and the subject of each token."""

    student: Tensor
    teacher: Tensor
    ids: Tensor


def subjects(tokens: int) -> Case:
    """Two samples: three subjects of unequal sizes; shuffled subjects with padding."""
    thirds = torch.arange(tokens) * 3 // tokens
    thirds[: tokens // 5] = 0
    shuffled = torch.randint(-1, 4, (tokens,), generator=torch.Generator().manual_seed(tokens))
    ids = torch.stack([thirds, shuffled])
    return Case(draw(2, tokens, 40, seed=0), draw(2, tokens, 40, seed=1), ids)


def edges() -> dict[str, Case]:
    """What one does not meet every day."""
    plain = subjects(63)
    zeros, scale = plain.student.clone(), 10.0 ** torch.linspace(-4, 2, 63)[:, None].double()
    zeros[:, ::5] = 0
    lone = torch.tensor([0] * 62 + [1]).expand(2, -1)
    return {
        "one subject": Case(plain.student, plain.teacher, torch.zeros(2, 63, dtype=torch.int64)),
        "all padding": Case(plain.student, plain.teacher, torch.full((2, 63), -1)),
        "a subject with one token": Case(plain.student, plain.teacher, lone),
        "zero vectors": Case(zeros, plain.teacher * (zeros[:, :, :1] != 0), plain.ids),
        "huge and tiny norms": Case(plain.student * scale, plain.teacher / scale, plain.ids),
    }


CASES = {str(size): subjects(size) for size in SIZES} | edges()

Terms = Callable[..., Tensor]


def pull_and_push(student: Tensor, teacher: Tensor, ids: Tensor, impl: Any = "eager") -> Tensor:
    return torch.stack(pull_push(student, teacher, ids, neg_margin=0.95, impl=impl))


def relations(student: Tensor, teacher: Tensor, ids: Tensor, impl: Any = "eager") -> Tensor:
    """Tokens as frames of nine where that divides, else as one frame."""
    per_frame = 9 if student.shape[1] % 9 == 0 else student.shape[1]
    saliency = (ids % 3 / 2).to(student.dtype)
    student, teacher, saliency = (
        x.unflatten(1, (-1, per_frame)) for x in (student, teacher, saliency)
    )
    terms = relation_distance(
        student, teacher, saliency_BTP=saliency, routing="or", margin=0.05, tau=3.0, impl=impl
    )
    return torch.stack(terms)


def value_and_gradient(
    terms: Terms, case: Case, dtype: torch.dtype, **options: Any
) -> list[Tensor]:
    """Terms and the gradient of their sum with different signs and sizes, in float64."""
    student = case.student.to(DEVICE, dtype).requires_grad_()
    value = terms(student, case.teacher.to(DEVICE, dtype), case.ids.to(DEVICE), **options)
    upstream = draw(*value.shape, seed=5).to(value)
    (gradient,) = torch.autograd.grad((value * upstream).sum(), student)
    # relative to the length of its vector: a tiny vector has a huge gradient
    length = student.detach().double().norm(dim=-1, keepdim=True)
    return [value.detach().double(), gradient.double() * length]


def rounded(name: str, dtype: torch.dtype) -> Case:
    case = CASES[name]
    return Case(case.student.to(dtype), case.teacher.to(dtype), case.ids)


@functools.cache
def computed_once(terms: Terms, name: str, dtype: torch.dtype, impl: str) -> list[Tensor]:
    """What an implementation gives for a case, kept for the tests that compare with it."""
    return value_and_gradient(terms, rounded(name, dtype), dtype, impl=impl)


@functools.cache
def truth_of(terms: Terms, name: str, dtype: torch.dtype) -> list[Tensor]:
    return value_and_gradient(terms, rounded(name, dtype), torch.float64)


def plainly(terms: Terms, monkeypatch: pytest.MonkeyPatch) -> Terms:
    """The plain formula with every product, norm and sum in the dtype of the inputs."""
    module = pull_push if terms is pull_and_push else relation_distance
    names = module.__globals__
    monkeypatch.setitem(names, "accumulation_dtype", lambda x, *_: x.dtype)
    return terms


@pytest.mark.parametrize("terms", [pull_and_push, relations])
@pytest.mark.parametrize("impl", ["eager", "chunked", "triton"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", list(CASES))
def test_is_no_less_accurate_than_the_plain_formula(
    terms: Terms, impl: str, dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if impl == "triton" and dtype == torch.bfloat16 and interpreted():
        pytest.skip("Triton's interpreter computes bfloat16 products wrongly")
    truth = truth_of(terms, name, dtype)
    computed = computed_once(terms, name, dtype, impl)
    careless = value_and_gradient(plainly(terms, monkeypatch), rounded(name, dtype), dtype)
    for what, want, have, plain in zip(
        ("value", "gradient"), truth, computed, careless, strict=True
    ):
        assert torch.isfinite(want).all()
        error, allowed = (have - want).abs().max(), (plain - want).abs().max()
        allowed = allowed.nan_to_num(0.0)  # float16 alone overflows in places: no excuse then
        assert error <= allowed + TOLERANCE[dtype], f"{what}: {error:.2e}, plain {allowed:.2e}"


@pytest.mark.parametrize("terms", [pull_and_push, relations])
@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_two_runs_are_equal_bit_for_bit(terms: Terms, impl: str) -> None:
    first = computed_once(terms, "257", torch.float32, impl)
    second = value_and_gradient(terms, rounded("257", torch.float32), torch.float32, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("terms", [pull_and_push, relations])
@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_fresh_memory_may_hold_anything(
    terms: Terms, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every buffer starts as NaN (integers as their largest value) and is written before use."""
    clean = computed_once(terms, "100", torch.float32, impl)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        dirty = value_and_gradient(terms, CASES["100"], torch.float32, impl=impl)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
