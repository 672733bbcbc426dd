"""Floating-point operations of a training step, counted while it runs.

Counted are matrix products, convolutions and attention, a multiplication and an addition as two
operations; elementwise work and the optimizer are not. torch has formulas for most of it; those it
lacks are here: attention on a CPU, and the operations of `alignlab.kernels`, whose formulas give
what the implementation that runs multiplies, not what the plain formula would.

Shape letters: as in `alignlab.kernels`; Z blocks of all samples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from alignlab.kernels.local_gram import tile_pairs

_PLAIN = frozenset({"aten", "prim", "prims", "profiler"})


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


def _pull_push_chunked(
    student: Tensor, _teacher: Tensor, subject_ids: Tensor, *rest: Any, **__: Any
) -> int:
    *_, with_slope = rest
    pairs = _pairs_of_others(subject_ids.expand(student.shape[:-1]))
    return 2 * student.shape[-1] * pairs * (2 if with_slope else 1)


def _pull_push_rows(
    student_ZNC: Tensor, teacher_BNC: Tensor, subject_BN: Tensor, *_: Any, **__: Any
) -> int:
    repeats = len(student_ZNC) // max(1, len(teacher_BNC))
    return 2 * student_ZNC.shape[-1] * _pairs_of_others(subject_BN) * repeats


def _pull_push_backward(
    _cosine: Tensor,
    _overlap: Tensor,
    student: Tensor,
    unit: Tensor,
    subject: Tensor,
    *_: Any,
    **__: Any,
) -> int:
    return _pull_push_rows(student, unit, subject)


def _relation_chunked(student: Tensor, teacher: Tensor, *rest: Any, **__: Any) -> int:
    _, factor_ST, _, _, with_slopes, _ = rest
    batch, frames, tokens, width = student.shape
    within = batch * frames * tokens**2
    across = within * (frames - 1) // 2
    flops = 2 * (width + teacher.shape[-1]) * (within + across)
    if with_slopes:
        flops += 2 * width * (within + 2 * across * (len(factor_ST) - 1))
    return flops


def _relation_sums(student: Tensor, teacher: Tensor, *_: Any, **__: Any) -> int:
    batch, frames, tokens, width = student.shape
    # both matrices are symmetric: one half is computed
    return batch * (frames * tokens) ** 2 * (width + teacher.shape[-1])


def _relation_gradient(_upstream: Tensor, student: Tensor, *_: Any, **__: Any) -> int:
    batch, frames, tokens, width = student.shape
    return 2 * batch * (frames * tokens) ** 2 * width


def _local_gram_chunked(tokens: Tensor, window: int, *_: Any, **__: Any) -> int:
    batch, frames, height, width, channels = tokens.shape
    pairs = tile_pairs(height, width, window) if tokens.numel() else 0
    return 2 * batch * (frames - 1) * pairs * channels


def _local_gram_gradient(_upstream: Tensor, tokens: Tensor, window: int, *_: Any, **__: Any) -> int:
    # each pair for the earlier and for the later token
    return 2 * _local_gram_chunked(tokens, window)


def _nothing(*_: Any, **__: Any) -> int:
    return 0


FORMULAS: dict[str, dict[str, Callable[..., int]]] = {
    "aten": {
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    },
    "alignlab": {
        "pull_push_chunked": _pull_push_chunked,
        "pull_push_triton_subjects": _nothing,
        "pull_push_triton_rows": _pull_push_rows,
        "pull_push_triton_backward": _pull_push_backward,
        "relation_chunked": _relation_chunked,
        "relation_triton_sums": _relation_sums,
        "relation_triton_gradient": _relation_gradient,
        "local_gram_chunked": _local_gram_chunked,
        "local_gram_chunked_gradient": _local_gram_gradient,
    },
}
"""By namespace and name of an operation; formulas get its arguments as they are."""


@dataclass
class FlopCount:
    """What was counted, and the operations outside torch that there is no formula for."""

    total: int = 0
    unknown: frozenset[str] = frozenset()


def count_flops(work: Callable[[], object]) -> FlopCount:
    """Runs `work` and counts its operations.

    Operations are looked up by what is registered when it begins: run `work` once before, so that
    modules which it imports when first used are there.
    """
    counter = FlopCounter()
    with counter:
        work()
    return FlopCount(counter.total, frozenset(counter.unknown))


@dataclass(frozen=True)
class _Formula:
    """A formula as torch's own are called: with the result as well."""

    formula: Callable[..., int]

    def __call__(self, *args: Any, out_val: Any, **kwargs: Any) -> int:
        return self.formula(*args, **kwargs)


class FlopCounter(TorchDispatchMode):
    """Counts every operation by its formula, and notes those of other libraries that have none.

    It gives what torch's FlopCounterMode gives, which also counts by module, and so takes five
    times as long as the step itself: most operations of a step are the optimizer's.

    Args:
        part: names what an operation is part of, asked for each one that has a formula.

    Attributes:
        parts: what was counted, by part.
        unknown: operations outside torch without a formula.
    """

    def __init__(self, part: Callable[[], str] = lambda: "all") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts: dict[str, int] = {}
        self.unknown: set[str] = set()
        self._part = part
        self._formulas = flop_registry | _own_formulas()
        self._seen: dict[Any, tuple[bool, Callable[..., int] | None]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self._seen:
            self._seen[func] = self._look_up(func)
        is_composite, formula = self._seen[func]
        if is_composite:
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if formula is not None:
            part = self._part()
            found = formula(*args, **kwargs, out_val=out)
            self.parts[part] = self.parts.get(part, 0) + found
        return out

    @property
    def total(self) -> int:
        """What was counted in all."""
        return sum(self.parts.values())

    def _look_up(self, func: Any) -> tuple[bool, Callable[..., int] | None]:
        """Whether an operation is made of others, which are counted in its place; its formula."""
        if func is not torch.ops.prim.device.default and func._can_decompose():
            return True, None
        formula = self._formulas.get(func.overloadpacket)
        if formula is None and func.namespace not in _PLAIN:
            self.unknown.add(str(func))
        return False, formula


def _own_formulas() -> dict[Any, Callable[..., int]]:
    mapping: dict[Any, Callable[..., int]] = {}
    for namespace, formulas in FORMULAS.items():
        operations = getattr(torch.ops, namespace)
        for name, formula in formulas.items():
            if hasattr(operations, name):  # those of Triton come with their module
                mapping[getattr(operations, name)] = _Formula(formula)
    return mapping


def _pairs_of_others(ids: Tensor) -> int:
    """Ordered pairs of tokens of different subjects, summed over all rows of `ids` (..., N)."""
    pairs = 0
    for ids_N in ids.reshape(-1, ids.shape[-1]):
        counts = ids_N[ids_N >= 0].unique(return_counts=True)[1].tolist()
        pairs += sum(counts) ** 2 - sum(count**2 for count in counts)
    return pairs
