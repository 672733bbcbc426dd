"""What every implementation of an operation must compute, as cases that any test suite can run.

For an implementation of your own, also outside this repository:

    @pytest.mark.parametrize("case", cases("pull_push"), ids=str)
    def test_mine(case: KernelCase) -> None:
        check_implementation(my_function, case)

The truth is the plain formula in float64 on the same, already rounded, inputs. An implementation
may err as much as the plain formula does when all of it is computed in the dtype of the inputs, or
when its unit vectors are rounded to that dtype (then some pairs of tokens cross a margin, which no
product of half-precision matrices avoids), plus a tolerance. A check that fails raises
AssertionError: one line with the error, what is allowed, and where the error is largest.

Shape letters: B samples, L blocks, N tokens, C and D channels, T frames, P tokens per frame, H x W
of them.
"""

import copy
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from alignlab.kernels.cosine import unit
from alignlab.kernels.dispatch import Impl
from alignlab.kernels.local_gram import local_gram_plain
from alignlab.kernels.pull_push import pull_push_plain
from alignlab.kernels.registry import OPERATIONS
from alignlab.kernels.relation import relation_plain
from alignlab.kernels.testing_inputs import (
    Inputs,
    draw,
    local_gram_inputs,
    pull_push_inputs,
    relation_inputs,
)

Check = Literal[
    "accuracy", "repeat", "inputs stay", "fresh memory", "no gradient", "padding", "nothing"
]
"""What a case looks at:

accuracy: terms and gradient against float64.
repeat: two runs are equal bit for bit; leave it out for a kernel that adds up with atomics.
inputs stay: the call and its gradient write into no argument.
fresh memory: every buffer is written before it is read (new ones hold NaN).
no gradient: the terms are the same where no gradient is wanted.
padding: whatever stands there, NaN too, reaches neither term nor gradient (pull_push).
nothing: no tokens, or no samples.
"""

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}
DTYPES = ("float32", "float16", "bfloat16")
WIDTH = 40

Compute = Callable[..., Sequence[Tensor]]
Axis = str | tuple[str, ...]

_MAKERS = {
    "pull_push": pull_push_inputs,
    "relation": relation_inputs,
    "local_gram": local_gram_inputs,
}
# Of a gradient of (..., N, C), (B, T, P, D) or (B, T, H, W, D).
_DIMENSIONS: dict[str, list[Axis]] = {
    "pull_push": ["block", "sample", "token", "channel"],
    "relation": ["sample", "frame", "token", "channel"],
    "local_gram": ["sample", "frame", "row", "column", "channel"],
}
_EMPTY = ("no tokens", "no samples")


@dataclass(frozen=True)
class KernelCase:
    """One thing that an implementation is checked for; `str` gives its name.

    Args:
        op: the operation.
        check: what is looked at.
        inputs: on which inputs, a name.
        dtype: of student and teacher.
        width: their channels.
    """

    op: str
    check: Check
    inputs: str
    dtype: torch.dtype
    width: int = WIDTH

    def __str__(self) -> str:
        return f"{self.check}, {self.inputs}, {_name(self.dtype)}"


class Outcome(NamedTuple):
    """Terms, stacked, and the gradient of a sum that weighs each of their values differently, each
    vector times its length: that of a tiny one is huge. Both in float64."""

    terms: Tensor
    gradient: Tensor


def cases(
    op: str, *, dtypes: Sequence[str] = DTYPES, width: int = WIDTH, checks: Sequence[Check] = ()
) -> list[KernelCase]:
    """Gives all cases of an operation.

    Args:
        op: `pull_push`, `relation` or `local_gram`.
        dtypes: which the implementation takes. Triton's interpreter computes bfloat16 wrongly.
        width: channels of student and teacher, for a kernel that takes only some.
        checks: keep only these; empty: all.

    Raises:
        ValueError: there is no such operation or dtype.
    """
    if op not in OPERATIONS:
        raise ValueError(f"unknown operation {op!r}: choose {', '.join(OPERATIONS)}")
    unknown = [name for name in dtypes if name not in DTYPES]
    if unknown:
        raise ValueError(f"unknown dtype {unknown[0]!r}: choose {', '.join(DTYPES)}")
    every = [
        KernelCase(op, "accuracy", name, getattr(torch, dtype), width)
        for dtype in dtypes
        for name in _MAKERS[op](width)
        if name not in _EMPTY
    ]
    once: list[tuple[Check, str]] = [
        ("repeat", "257 tokens" if op == "pull_push" else "100 tokens"),  # several tiles
        ("inputs stay", "100 tokens"),
        ("fresh memory", "100 tokens"),
        ("no gradient", "100 tokens"),
        *(("nothing", name) for name in _EMPTY),
    ]
    if op == "pull_push":
        once.append(("inputs stay", "two blocks, strided"))  # which come with host_ids
        once.append(("padding", "100 tokens"))
    first = getattr(torch, dtypes[0])
    every += [KernelCase(op, check, name, first, width) for check, name in once]
    return [case for case in every if not checks or case.check in checks]


def check_implementation(
    implementation: Impl, case: KernelCase, device: torch.device | str | None = None
) -> None:
    """Checks an implementation for one thing.

    Args:
        implementation: the function, or the name of an installed one.
        case: one of `cases`.
        device: where (default: cuda if there is one, else cpu).

    Raises:
        AssertionError: it computes something wrong; one line.
        ImplementationError: it cannot run here, or gives what is no result of the operation.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    problem = _CHECKS[case.check](implementation, case, place)
    if problem is not None:
        raise AssertionError(f"{case.op}, {case}: {problem}")


def largest_error(have: Tensor, want: Tensor, axes: Sequence[Axis]) -> tuple[float, str]:
    """The largest difference, infinite where one is not finite, and where it is, in words.

    Args:
        have: what was computed.
        want: the truth, of the same shape.
        axes: name of each dimension, or of each index in it.
    """
    if have.numel() == 0:
        return 0.0, "nowhere"
    have, want = have.detach(), want.detach()
    error = (have - want).abs().nan_to_num(math.inf, posinf=math.inf)
    place = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    there = ", ".join(
        f"{axis} {i}" if isinstance(axis, str) else axis[i]
        for axis, i in zip(axes, place, strict=True)
    )
    values = " instead of ".join(f"{float(x[tuple(place)]) + 0.0:.6g}" for x in (have, want))
    return float(error.max()), f"{there}: {values}"


def _check_accuracy(implementation: Impl, case: KernelCase, device: torch.device) -> str | None:
    inputs = _inputs(case)
    have = _outcome(case, _compute(implementation, case, inputs), inputs, device)
    want, excuses = _truth(case, device), _excuses(case, device)
    for what, axes, mine, truth, excuse in zip(
        ("a term", "the gradient"), _axes(case, inputs), have, want, excuses, strict=True
    ):
        allowed = excuse + TOLERANCE[case.dtype]
        error, where = largest_error(mine, truth, axes)
        if error > allowed:
            return (
                f"{what} is off by {error:.2g}, {allowed:.2g} is allowed (what the plain formula "
                f"in {_name(case.dtype)} is off by, and a tolerance); most at {where}"
            )
    return None


def _check_repeat(implementation: Impl, case: KernelCase, device: torch.device) -> str | None:
    inputs = _inputs(case)
    compute = _compute(implementation, case, inputs)
    first, second = (_outcome(case, compute, inputs, device) for _ in range(2))
    return _difference(case, inputs, first, second, "a second run differs from the first")


def _check_inputs_stay(implementation: Impl, case: KernelCase, device: torch.device) -> str | None:
    inputs = _inputs(case)
    compute = _compute(implementation, case, inputs)
    arguments = _placed(inputs, device, case.dtype)
    before = copy.deepcopy(arguments)
    student = arguments[0].requires_grad_()
    torch.autograd.grad(torch.stack(list(compute(*arguments))).sum(), student)
    names = inspect.signature(OPERATIONS[case.op].table["eager"]).parameters
    # not strict: the reference has a further argument, which is left at its default
    for name, was, now in zip(names, before, arguments, strict=False):
        if isinstance(was, Tensor) and not torch.equal(was, now.detach()):
            changed = int((was != now).sum())
            return f"it writes into its argument {name}: {changed} of {was.numel()} values changed"
    return None


def _check_fresh_memory(implementation: Impl, case: KernelCase, device: torch.device) -> str | None:
    inputs = _inputs(case)
    compute = _compute(implementation, case, inputs)
    with _deterministic(filled=False):
        clean = _outcome(case, compute, inputs, device)
    with _deterministic(filled=True):
        dirty = _outcome(case, compute, inputs, device)
    what = "what new memory holds (here NaN) reaches the result"
    return _difference(case, inputs, clean, dirty, what)


def _check_no_gradient(implementation: Impl, case: KernelCase, device: torch.device) -> str | None:
    inputs = _inputs(case)
    compute = _compute(implementation, case, inputs)
    student, *rest = _placed(inputs, device, case.dtype)
    with torch.no_grad():
        have = torch.stack(list(compute(student, *rest))).double()
    want = _outcome(case, compute, inputs, device).terms
    error, where = largest_error(have, want, _axes(case, inputs)[0])
    if error > TOLERANCE[case.dtype]:
        return f"terms differ by {error:.2g} where no gradient is wanted; most at {where}"
    return None


def _check_padding(implementation: Impl, case: KernelCase, device: torch.device) -> str | None:
    inputs = _inputs(case)
    assert inputs.marks is not None
    padding = (inputs.marks < 0)[..., None]
    dirty = inputs._replace(
        student=inputs.student.masked_fill(padding, math.nan),
        teacher=inputs.teacher.masked_fill(padding, math.inf),
    )
    compute = _compute(implementation, case, inputs)
    clean = _outcome(case, compute, inputs, device)
    spoilt = _outcome(case, compute, dirty, device, scaled=False)
    if not bool((spoilt.gradient.masked_select(padding.to(device)) == 0).all()):
        return "the gradient of padding is not 0"
    spoilt = _outcome(case, compute, dirty, device, lengths=inputs.student)
    return _difference(case, inputs, clean, spoilt, "NaN in the padding reaches the result")


def _check_nothing(implementation: Impl, case: KernelCase, device: torch.device) -> str | None:
    inputs = _inputs(case)
    compute = _compute(implementation, case, inputs)
    terms, gradient = _outcome(case, compute, inputs, device)
    if not bool((terms == 0).all()):
        return "the terms are not 0"
    if gradient.shape != inputs.student.shape:
        return f"the gradient is {tuple(gradient.shape)}, not {tuple(inputs.student.shape)}"
    return None


_CHECKS: dict[Check, Callable[[Impl, KernelCase, torch.device], str | None]] = {
    "accuracy": _check_accuracy,
    "repeat": _check_repeat,
    "inputs stay": _check_inputs_stay,
    "fresh memory": _check_fresh_memory,
    "no gradient": _check_no_gradient,
    "padding": _check_padding,
    "nothing": _check_nothing,
}


def _difference(
    case: KernelCase, inputs: Inputs, one: Outcome, other: Outcome, what: str
) -> str | None:
    """`what`, and where, if two outcomes are not equal bit for bit."""
    for part, axes, have, want in zip(
        ("terms", "gradient"), _axes(case, inputs), other, one, strict=True
    ):
        if not torch.equal(have, want):
            error, where = largest_error(have, want, axes)
            return f"{what}: the {part} by {error:.2g}, most at {where}"
    return None


@contextmanager
def _deterministic(filled: bool) -> Iterator[None]:
    """Deterministic algorithms where torch has them; new memory is filled with NaN if `filled`."""
    settings: Any = torch.utils.deterministic
    before = settings.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    settings.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what has no deterministic algorithm
            yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = before


def _outcome(
    case: KernelCase,
    compute: Compute,
    inputs: Inputs,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    scaled: bool = True,
    lengths: Tensor | None = None,
) -> Outcome:
    """Terms and gradient in `dtype`, that of the case unless given."""
    student, *rest = _placed(inputs, device, dtype or case.dtype)
    student.requires_grad_()
    terms = torch.stack(list(compute(student, *rest)))
    upstream = draw(*terms.shape, seed=5).to(terms)
    (gradient,) = torch.autograd.grad((terms * upstream).sum(), student)
    gradient = gradient.double()
    if scaled:
        measured = (inputs.student if lengths is None else lengths).to(device)
        gradient = gradient * measured.double().norm(dim=-1, keepdim=True)
    return Outcome(terms.detach().double(), gradient)


def _placed(inputs: Inputs, device: torch.device, dtype: torch.dtype) -> list[Any]:
    """The arguments of a call: copies with the same strides, for inputs are kept between cases, and
    `to` copies nothing that is in its place already."""
    student, teacher, marks, settings = copy.deepcopy(inputs)
    marked = [] if marks is None else [marks.to(device)]
    return [student.to(device, dtype), teacher.to(device, dtype), *marked, *settings]


def _compute(implementation: Impl, case: KernelCase, inputs: Inputs) -> Compute:
    """The implementation as the operation calls it, without what the operation checks before."""
    chosen: Compute = OPERATIONS[case.op].choose(
        implementation, inputs.student, inputs.teacher, inputs.student.shape[-2]
    )
    return chosen


@functools.cache
def _truth(case: KernelCase, device: torch.device) -> Outcome:
    reference = OPERATIONS[case.op].table["eager"]
    return _outcome(case, reference, _inputs(case), device, torch.float64)


@functools.cache
def _excuses(case: KernelCase, device: torch.device) -> tuple[float, float]:
    """How far off terms and gradient are of the formula in the dtype of the inputs: with every
    norm, product and sum in it, or with its unit vectors rounded to it, whichever is more."""
    truth = _truth(case, device)

    def plain(student: Tensor, teacher: Tensor, *rest: Any) -> Any:
        return _plain(case, student, teacher, rest, student.dtype)

    def rounded(student: Tensor, teacher: Tensor, *rest: Any) -> Any:
        return _plain(case, _rounded(student), _rounded(teacher), rest, torch.float32)

    # products of the tokens as they are have no unit vectors
    as_they_are = case.op == "local_gram" and not _inputs(case).settings[-1]
    computed = (plain,) if as_they_are else (plain, rounded)
    outcomes = [_outcome(case, compute, _inputs(case), device) for compute in computed]

    def most(part: Literal["terms", "gradient"]) -> float:
        errors = [(getattr(one, part) - getattr(truth, part)).abs() for one in outcomes]
        # float16 alone overflows in places: no excuse then
        return max(float(error.nan_to_num(0.0, posinf=0.0).max()) for error in errors)

    return most("terms"), most("gradient")


def _rounded(x: Tensor) -> Tensor:
    """Unit vectors rounded to the dtype of `x`, in float32."""
    rounded: Tensor = _Rounded.apply(unit(x), x.dtype)  # type: ignore[no-untyped-call]
    return rounded


def _plain(
    case: KernelCase, student: Tensor, teacher: Tensor, rest: Sequence[Any], dtype: torch.dtype
) -> Any:
    if case.op == "relation":
        saliency, routing, margin, tau = rest
        return relation_plain(student, teacher, saliency, routing, margin, tau, dtype)
    if case.op == "local_gram":
        window, temperature, normalize = rest
        return local_gram_plain(student, teacher, window, temperature, normalize, dtype)
    ids, pos_margin, neg_margin, _ = rest
    return pull_push_plain(student, teacher, ids, pos_margin, neg_margin, dtype)


class _Rounded(torch.autograd.Function):
    """Rounds to a dtype; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@functools.cache
def _inputs(case: KernelCase) -> Inputs:
    return _MAKERS[case.op](case.width)[case.inputs](case.dtype)


def _axes(case: KernelCase, inputs: Inputs) -> tuple[list[Axis], list[Axis]]:
    """Names of the dimensions of terms and of the gradient."""
    gradient = _DIMENSIONS[case.op][-inputs.student.ndim :]
    operation = OPERATIONS[case.op]
    return [operation.terms, *gradient[: -operation.token_dims]], gradient


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
