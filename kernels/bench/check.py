"""Whether a provider computes the right thing, checked before its speed is reported."""

import torch
from torch import Tensor

from alignlab.kernels.bench.cases import Case, Inputs, draw_inputs
from alignlab.kernels.bench.run import (
    PROVIDERS,
    Provider,
    is_function,
    loss_function,
    with_gradient,
)
from alignlab.kernels.cosine import unit
from alignlab.kernels.dispatch import Impl
from alignlab.kernels.plugins import load_function
from alignlab.kernels.testing import Check, cases, check_implementation, largest_error

# Relative. A gradient jumps where a hinge or a sign does, so that rounding alone moves it: one pair
# of the checked sizes by up to 0.7 %.
VALUE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 0.02


CHECKS: tuple[Check, ...] = ("accuracy", "inputs stay")
"""What an implementation of another package must pass before it is timed."""


class WrongResult(Exception):
    """A provider differs from the reference by more than rounding explains."""


def check(case: Case, provider: Provider, device: torch.device) -> None:
    """Compares value and gradient with `eager` in float64, on a reduced size of the same kind.

    An implementation that is not alignlab's must first pass the cases of `alignlab.kernels.testing`
    in the dtype and width of the case: terms one by one, odd sizes, padding, zero vectors.

    Allowed is twice the error that comes from rounding the unit vectors to the dtype of the case,
    which no product of half-precision matrices avoids, and the tolerances above. `floor` is no
    result, so there is nothing to check.

    Raises:
        WrongResult: value or gradient is too far off.
        ValueError: the provider cannot compute this case; the message says why.
    """
    if provider == "floor":
        return
    if provider not in PROVIDERS:
        _check_foreign(case, provider, device)
    reduced = case.reduced()
    inputs = draw_inputs(reduced, device, seed=0)
    reference = loss_function(case.op, "eager")
    truth = with_gradient(reference, inputs.double())
    computed = with_gradient(loss_function(case.op, provider), inputs)
    rounded = with_gradient(lambda x: reference(_rounded(x)), inputs)
    tolerances = (VALUE_TOLERANCE, GRADIENT_TOLERANCE)
    for what, want, have, rough, tolerance in zip(
        ("value", "gradient"), truth, computed, rounded, tolerances, strict=True
    ):
        error, allowed = _error(have, want), 2 * _error(rough, want) + tolerance
        if not error <= allowed:  # NaN too
            where = f", most at {_where(have, want, case)}" if have.ndim else ""
            raise WrongResult(
                f"{provider} is wrong on {reduced}: its {what} is off by {error:.2g} "
                f"of the reference, {allowed:.2g} is allowed{where}"
            )


def _check_foreign(case: Case, provider: Provider, device: torch.device) -> None:
    impl: Impl = load_function(provider) if is_function(provider) else provider
    dtypes = (case.dtype_name,)
    for one in cases(case.op, dtypes=dtypes, width=case.width, checks=CHECKS):
        try:
            check_implementation(impl, one, device)
        except AssertionError as error:
            raise WrongResult(f"{provider} is wrong, C={case.width}: {error}") from error


def _where(have: Tensor, want: Tensor, case: Case) -> str:
    first = "block" if case.op == "pull_push" else "sample"
    tokens = ("row", "column") if case.op == "local_gram" else ("token",)
    names = (first, *(("frame",) if have.ndim > 3 else ()), *tokens, "channel")
    return largest_error(have.double(), want, names)[1]


def _rounded(inputs: Inputs) -> Inputs:
    dtype = inputs.student.dtype
    return Inputs(
        unit(inputs.student).to(dtype), unit(inputs.teacher).to(dtype), inputs.subject_ids
    )


def _error(have: Tensor, want: Tensor) -> float:
    return float((have.double() - want).norm() / want.norm())
