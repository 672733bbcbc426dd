"""Kernels in the GPU report: every implementation is checked, then timed at real sizes."""

from typing import Any

import torch

from alignlab.experiments.bench.gpu_phases import Findings
from alignlab.experiments.bench.kernels import facts_of
from alignlab.kernels import speed_table
from alignlab.kernels.bench import check as checks
from alignlab.kernels.bench.cases import OPS, Case, Op, select_cases
from alignlab.kernels.bench.csv_file import Row, to_csv, to_row
from alignlab.kernels.bench.run import Measurement, Provider, measure, missing
from alignlab.kernels.plugins import errors_of_kernels

PROVIDERS: tuple[Provider, ...] = ("floor", "eager", "chunked", "triton")
Errors = tuple[type[Exception], ...]


def measure_kernels(found: Findings) -> None:
    """Writes `kernels.csv`, which grows with every case, and `kernels.png`.

    A wrong implementation, and one that does not run, is a failure and has no speed.
    """
    facts, rows, errors = facts_of(found.device), list[Row](), errors_of_kernels()
    right: dict[tuple[Any, ...], list[Provider]] = {}
    cases, not_begun = _cases(found), 0
    for case in cases:
        if found.left() < (15 if found.is_full else 2):
            not_begun += 1
            continue
        kind = (case.op, case.width, case.dtype)
        if kind not in right:
            right[kind] = _right(found, case, errors)
        rows += [to_row(one, facts) for one in _measured(found, case, right[kind], errors)]
        (found.out / "kernels.csv").write_text(to_csv(rows), encoding="utf-8")
    for size, name in speed_table.decide(rows).items():
        found.say(
            f"fastest of {size.operation}, {size.dtype}, N={size.tokens}, C={size.width}, "
            f"{size.matrices} at once: {name}"
        )
    if not_begun:
        found.say(f"not begun for want of time: {not_begun} of {len(cases)} cases")
    if rows:
        from alignlab.experiments.bench.kernel_plots import draw_overview

        draw_overview(rows, found.out / "kernels.png")


def _right(found: Findings, case: Case, errors: Errors) -> list[Provider]:
    """The providers that compute the right thing in the kind of this case."""
    right: list[Provider] = []
    for provider in PROVIDERS:
        reason = missing(case.op, provider, found.device)
        if reason is not None:
            found.say(f"{provider} of {case.op} was left out: {reason}")
            continue
        try:
            checks.check(case, provider, found.device)
        except checks.WrongResult as error:
            found.fail(str(error))
        except errors as error:
            found.fail(f"{provider} on {case}: {_first_line(error)}")
        else:
            right.append(provider)
    return right


def _measured(
    found: Findings, case: Case, providers: list[Provider], errors: Errors
) -> list[Measurement]:
    """The figures of a case; without Triton's kernel if that fails at this size."""
    seconds = 0.2 if found.is_full else 0.0
    without_triton = [name for name in providers if name != "triton"]
    for names in (providers, without_triton):
        try:
            figures, left_out = measure(case, names, found.device, seconds, lambda note: None)
        except errors as error:
            found.fail(f"{case}, {', '.join(names)}: {_first_line(error)}")
            continue
        for what, reason in left_out:
            found.say(f"left out: {what}: {reason}")
        return figures
    return []


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _cases(found: Findings) -> list[Case]:
    """In order of what they are worth: RefAlign's and VideoREPA's sizes in bf16 first."""
    if not found.is_full:
        small: dict[str, Any] = {"sizes": ((3, 20),), "widths": (16,), "blocks": (2,)}
        return select_cases(OPS, torch.float32, **small)
    first = [
        Case("pull_push", 3, 1560, 1024, 9, torch.bfloat16),
        Case("relation", 24, 150, 768, 1, torch.bfloat16),
        Case("relation", 21, 1560, 768, 1, torch.bfloat16),
    ]
    operations: tuple[tuple[Op, tuple[int, int], int, int], ...] = (
        ("pull_push", (3, 1560), 1024, 9),
        ("relation", (24, 150), 768, 1),
    )
    others = [
        Case(op, *size, width, blocks, dtype)
        for dtype in (torch.float32, torch.float16)
        for op, size, width, blocks in operations
    ]
    cases: list[Case] = [*first, *others, *select_cases(OPS, torch.bfloat16)]
    return list(dict.fromkeys(cases))
