"""Every implementation passes the checks that packages run on theirs; and the checks catch."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.kernels.dispatch import interpreted
from alignlab.kernels.plugins import load_function
from alignlab.kernels.pull_push import PullPush, pull_push_eager
from alignlab.kernels.registry import OPERATIONS
from alignlab.kernels.relation import Relation, relation_eager
from alignlab.kernels.testing import Check, KernelCase, cases, check_implementation, largest_error
from made_packages import kernel_package

ALL = cases("pull_push") + cases("relation") + cases("local_gram")


@pytest.mark.parametrize("impl", ["eager", "chunked", "triton"])
@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.op}, {case}")
def test_implementation(impl: str, case: KernelCase) -> None:
    if impl not in OPERATIONS[case.op].table:
        pytest.skip(f"{case.op} has no {impl}")
    if impl == "triton" and case.dtype == torch.bfloat16 and interpreted():
        pytest.skip("Triton's interpreter computes bfloat16 products wrongly")
    check_implementation(impl, case)


@pytest.fixture
def tiny_kernel(tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """A function of the package in `external`, by its name."""
    with kernel_package(tmp_path):
        yield lambda name: load_function(f"tiny_kernel:{name}")


def failures(function: Any, op: str, *checks: Check) -> list[str]:
    """What the checks say of a function in float32, by line."""
    said = []
    for case in cases(op, dtypes=("float32",), checks=checks):
        try:
            check_implementation(function, case)
        except AssertionError as error:
            said.append(str(error))
    return said


def test_the_function_of_a_package_passes_in_every_dtype(tiny_kernel: Callable[[str], Any]) -> None:
    function = tiny_kernel("pull_push_by_product")
    for case in cases("pull_push"):
        check_implementation(function, case)


def test_a_wrong_term_is_told_with_its_place(tiny_kernel: Callable[[str], Any]) -> None:
    said = failures(tiny_kernel("too_much_push"), "pull_push", "accuracy")
    assert len(said) > 5
    line = next(line for line in said if "63 tokens" in line)
    assert line.startswith("pull_push, accuracy, 63 tokens, float32: a term is off by ")
    assert "most at push, sample " in line and " instead of " in line and "\n" not in line


def test_a_wrong_gradient_is_told_with_its_place(tiny_kernel: Callable[[str], Any]) -> None:
    said = failures(tiny_kernel("one_wrong_sample"), "relation", "accuracy")
    line = next(line for line in said if "63 tokens" in line)
    assert "the gradient is off by " in line
    assert "most at sample 1, frame 6, token 8, channel " in line and ": 0 instead of " in line


class _OwnGradient(torch.autograd.Function):
    """Values and gradient of `pull_push_eager` with something added, computed elsewhere."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, add: Callable[[Tensor], Tensor], *rest: Any) -> Any:
        with torch.enable_grad():
            held = student.detach().requires_grad_()
            terms = pull_push_eager(held, *rest)
        ctx.held, ctx.terms = held, terms
        return tuple(add(term.detach()) for term in terms)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (gradient,) = torch.autograd.grad(ctx.terms, ctx.held, upstream)
        return gradient, *[None] * 7


def added(add: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def function(student: Tensor, *rest: Any) -> Any:
        return _OwnGradient.apply(student, add, *rest)  # type: ignore[no-untyped-call]

    return function


def test_noise_new_memory_and_another_value_without_gradient_are_seen() -> None:
    assert failures(added(lambda x: x), "pull_push") == []
    noise = added(lambda x: x + 1e-7 * torch.rand_like(x))
    (said,) = failures(noise, "pull_push", "repeat")
    assert "a second run differs from the first: the terms by " in said
    unwritten = added(lambda x: x + _filled(x))
    (said,) = failures(unwritten, "pull_push", "fresh memory")
    assert "what new memory holds (here NaN) reaches the result" in said

    def only_trained(student: Tensor, *rest: Any) -> PullPush:
        pull, push = pull_push_eager(student, *rest)
        return PullPush(pull, push if torch.is_grad_enabled() else 2 * push)

    (said,) = failures(only_trained, "pull_push", "no gradient")
    assert "where no gradient is wanted; most at push, sample " in said


def _filled(x: Tensor) -> Tensor:
    """1 where new memory is filled with NaN, else 0: what a kernel adds that forgot to write."""
    return torch.empty(1, dtype=x.dtype).isnan().to(x)


@pytest.mark.parametrize("spoilt", ["student", "teacher", "subject_ids"])
def test_a_kernel_that_writes_into_its_inputs_is_seen_and_spoils_no_other_case(spoilt: str) -> None:
    def overwrites(student: Tensor, teacher: Tensor, ids: Tensor, *rest: Any) -> PullPush:
        terms = pull_push_eager(student.clone(), teacher.clone(), ids.clone(), *rest)
        written = {"student": student, "teacher": teacher, "subject_ids": ids}[spoilt]
        if 0 not in written.stride():  # torch writes into no expanded tensor
            written.detach().add_(1)
        return terms

    said = failures(overwrites, "pull_push")
    assert len(said) == 2 and all("pull_push, inputs stay, " in line for line in said)
    assert f"it writes into its argument {spoilt}: " in said[0]
    assert failures(pull_push_eager, "pull_push") == []
    assert failures(relation_eager, "relation") == []


def test_an_error_is_measured_without_a_warning_where_a_gradient_is_wanted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        have = torch.ones(2, requires_grad=True)
        assert largest_error(have, torch.zeros(2), ("sample",)) == (1.0, "sample 0: 1 instead of 0")


def test_padding_and_empty_inputs_are_seen() -> None:
    def masked_late(student: Tensor, teacher: Tensor, *rest: Any) -> PullPush:
        terms = pull_push_eager(student, teacher, *rest)
        return PullPush(*(term + 0.0 * student.sum((-2, -1)) for term in terms))

    (said,) = failures(masked_late, "pull_push", "padding")
    assert "padding" in said

    def no_pairs(student: Tensor, *rest: Any) -> Relation:
        nothing = float(student.numel() == 0)
        return Relation(*(term + nothing for term in relation_eager(student, *rest)))

    (said,) = failures(no_pairs, "relation", "nothing")
    assert "the terms are not 0" in said


def test_cases_can_be_chosen_and_unknown_ones_are_refused() -> None:
    some = cases("relation", dtypes=("float16",), width=64, checks=("accuracy", "repeat"))
    assert {case.check for case in some} == {"accuracy", "repeat"}
    assert {(case.dtype, case.width) for case in some} == {(torch.float16, 64)}
    names = [str(case) for case in ALL]
    assert len(set(names[: len(cases("pull_push"))])) == len(cases("pull_push"))
    with pytest.raises(ValueError, match="'softmax': choose pull_push, relation, local_gram"):
        cases("softmax")
    with pytest.raises(ValueError, match="unknown dtype 'fp8': choose float32"):
        cases("relation", dtypes=("fp8",))
