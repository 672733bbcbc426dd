"""Kernels of another package, as alignlab's tests install it: right ones and wrong ones."""

import torch
from torch import Tensor

from alignlab.kernels.plugins import Kernel
from alignlab.kernels.pull_push import pull_push_eager
from alignlab.kernels.relation import relation_eager


def pull_push_by_product(
    student: Tensor,
    teacher: Tensor,
    subject_ids: Tensor,
    pos_margin: float,
    neg_margin: float,
    host_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both terms from one matrix of cosines."""
    wide = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    valid = (subject_ids >= 0).expand(student.shape[:-1])
    student = torch.nn.functional.normalize(
        student.to(wide).masked_fill(~valid[..., None], 0.0), dim=-1
    )
    teacher = torch.nn.functional.normalize(
        teacher.to(wide).expand_as(student).masked_fill(~valid[..., None], 0.0), dim=-1
    )
    cosines = student @ teacher.mT
    miss = (1.0 - cosines.diagonal(dim1=-2, dim2=-1) - pos_margin).relu() * valid
    subject_ids = subject_ids.expand(student.shape[:-1])
    cross = subject_ids[..., None] != subject_ids[..., None, :]
    cross = cross & valid[..., None] & valid[..., None, :]
    overlap = (cosines - (1.0 - neg_margin)).relu() * cross
    pull = miss.sum(-1) / valid.sum(-1).clamp_min(1)
    push = overlap.sum((-2, -1)) / cross.sum((-2, -1)).clamp_min(1)
    return pull, push


def too_much_push(*arguments: object) -> tuple[Tensor, Tensor]:
    """Wrong by a tenth of a percent in one of two terms."""
    pull, push = pull_push_eager(*arguments)  # type: ignore[arg-type]
    return pull, push * 1.001


def one_wrong_sample(*arguments: object) -> tuple[Tensor, ...]:
    """Right in all values, wrong in the gradient of the last token of the last sample."""
    student, *rest = arguments
    assert isinstance(student, Tensor)
    kept = torch.ones_like(student)
    kept[-1, -1, -1] = 0.0
    terms = relation_eager(student * kept + student.detach() * (1 - kept), *rest)  # type: ignore
    return tuple(terms)


def overwrites_the_teacher(student: Tensor, teacher: Tensor, *rest: object) -> tuple[Tensor, ...]:
    """Right, and what it is given is wrong afterwards."""
    terms = pull_push_eager(student, teacher.clone(), *rest)  # type: ignore[arg-type]
    teacher.zero_()
    return tuple(terms)


def two_arguments(student: Tensor, teacher: Tensor) -> None: ...


def three_terms(*arguments: object) -> tuple[Tensor, ...]:
    pull, push = pull_push_eager(*arguments)  # type: ignore[arg-type]
    return pull, push, push


def no_gradient(*arguments: object) -> tuple[Tensor, ...]:
    return tuple(term.detach() for term in pull_push_eager(*arguments))  # type: ignore[arg-type]


def half_terms(*arguments: object) -> tuple[Tensor, ...]:
    return tuple(term.half() for term in pull_push_eager(*arguments))  # type: ignore[arg-type]


def raises(*arguments: object) -> None:
    raise RuntimeError("no\nkernel image")


def needs_a_card() -> str:
    return "needs a card\nthat nobody has"


def broken_missing() -> str:
    raise OSError("no driver")


def ends_the_program() -> str:
    raise SystemExit(3)


BY_PRODUCT = Kernel("pull_push", pull_push_by_product)
RELATION = Kernel("relation", relation_eager)
BOTH = (BY_PRODUCT, RELATION)
NEEDY = Kernel("pull_push", pull_push_by_product, missing=needs_a_card)
ENDING = Kernel("pull_push", pull_push_by_product, missing=ends_the_program)
FALSE = Kernel("pull_push", pull_push_by_product, missing=lambda: False)  # type: ignore
SILENT = Kernel("pull_push", pull_push_by_product, missing=lambda: "")
UNSURE = Kernel("pull_push", pull_push_by_product, missing=broken_missing)
WRONG = Kernel("pull_push", too_much_push)
SHORT = Kernel("pull_push", two_arguments)
LIST_OP = Kernel(["pull_push"], pull_push_by_product)  # type: ignore[arg-type]
OTHER_OP = Kernel("attention", pull_push_by_product)
