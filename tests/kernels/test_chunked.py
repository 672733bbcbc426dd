"""The chunked implementations: tiles, memory, and what torch.library asks of an operation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alignlab.kernels import pull_push as pull_push_module
from alignlab.kernels import relation as relation_module
from alignlab.kernels.pull_push import pull_push
from alignlab.kernels.relation import relation_distance
from random_tensors import draw_double as draw
from random_tensors import draw_saliency

ROUTINGS: list[Any] = ["or", "and", "xor", "uniform"]
IDS = torch.tensor([0, 0, 1, 1, 1, 2, 2, -1, -1])
MIXED = torch.tensor([1, -1, 0, 2, 1, 0, -1, 1, 2])


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tile_pairs", [1, 1000, 10**7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunked_equals_eager_whatever_the_tiles(
    routing: Any, tile_pairs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relation_module, "TILE_PAIRS", tile_pairs)
    # not contiguous, as after a resampling
    student = draw(3, 19, 13, 5).to(dtype).movedim(1, 3).requires_grad_()
    teacher = draw(3, 13, 5, 23, seed=1).to(dtype)
    student.data[0, 1, 2] = 0.0
    upstream = draw(3, 3, seed=2).to(dtype)
    outcomes = {}
    for impl in ("eager", "chunked"):
        relation = relation_distance(
            student,
            teacher,
            saliency_BTP=draw_saliency(3, 13, 5),
            routing=routing,
            margin=0.05,
            tau=4.0,
            impl=impl,
        )
        values = torch.stack(relation)
        (grad,) = torch.autograd.grad((values * upstream).sum(), student)
        outcomes[impl] = values.detach(), grad
    tolerance: dict[str, Any] = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(outcomes["chunked"], outcomes["eager"], **tolerance)


@pytest.mark.parametrize("panel_rows", [1, 2, 100])
@pytest.mark.parametrize("ids", [IDS, MIXED, IDS.expand(2, -1), torch.stack([MIXED, IDS])])
def test_pull_push_chunked_equals_eager_whatever_the_panels(
    panel_rows: int, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_push_module, "PANEL_ROWS", panel_rows)
    # not contiguous, as after a transposition; the teacher is shared by three blocks
    student = draw(3, 2, 6, 9).mT.requires_grad_()
    teacher = draw(2, 9, 6, seed=1)
    upstream = draw(2, 3, 2, seed=2)
    outcomes = {}
    for impl in ("eager", "chunked"):
        margins: dict[str, Any] = {"pos_margin": 0.7, "neg_margin": 0.9}
        values = torch.stack(pull_push(student, teacher, ids, impl=impl, **margins))
        (grad,) = torch.autograd.grad((values * upstream).sum(), student)
        outcomes[impl] = values.detach(), grad
    torch.testing.assert_close(outcomes["chunked"], outcomes["eager"])


class _Watch(TorchDispatchMode):
    """Remembers the operations and the most elements that any of them returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0
        self.operations: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        self.operations.append(str(func))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def watched(module: Any, operation: str, compute: Callable[[], object]) -> _Watch:
    """Runs `compute`, looking into the module's operation, which is opaque to torch otherwise."""
    inside = getattr(module, operation)
    watch = _Watch()
    with pytest.MonkeyPatch.context() as patch, watch:
        patch.setattr(module, operation, torch.no_grad()(inside._init_fn))
        compute()
    return watch


@pytest.mark.parametrize("routing", ROUTINGS)
def test_relation_never_holds_a_matrix_of_all_pairs(
    routing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relation_module, "TILE_PAIRS", 2**12)
    student, teacher, saliency = (
        draw(1, 5, 60, 6),
        draw(1, 5, 60, 8, seed=1),
        draw_saliency(1, 5, 60),
    )
    student.requires_grad_()

    def largest(impl: Any) -> int:
        setting: dict[str, Any] = {"routing": routing, "tau": 3.0, "impl": impl}
        return watched(
            relation_module,
            "_pair_sums",
            lambda: relation_distance(student, teacher, saliency_BTP=saliency, **setting),
        ).largest

    assert largest("eager") == 300 * 300
    assert largest("chunked") <= 2**12 + student.numel()


def test_pull_push_never_holds_a_matrix_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull_push_module, "PANEL_ROWS", 4)
    student, teacher = draw(300, 6).requires_grad_(), draw(300, 6, seed=1)
    ids = torch.arange(300) // 100

    def largest(impl: Any) -> int:
        return watched(
            pull_push_module, "_pull_push", lambda: pull_push(student, teacher, ids, impl=impl)
        ).largest

    assert largest("eager") == 300 * 300
    assert largest("chunked") <= 300 * 6


@pytest.mark.parametrize("grad", [True, False])
def test_slopes_are_computed_only_for_somebody_who_asks(grad: bool) -> None:
    student, teacher = draw(9, 6).requires_grad_(), draw(9, 6, seed=1)

    def both() -> None:
        pull_push(student, teacher, IDS, impl="chunked")
        relation_distance(student[None, :, None], teacher[None, :, None], impl="chunked")

    with torch.set_grad_enabled(grad):
        for module, operation in (
            (pull_push_module, "_pull_push"),
            (relation_module, "_pair_sums"),
        ):
            names = watched(module, operation, both).operations
            assert any("sign_" in name for name in names) == grad


@pytest.mark.parametrize("with_slope", [True, False])
def test_torch_library_finds_nothing_wrong(with_slope: bool) -> None:
    student = draw(3, 2, 9, 6).requires_grad_(with_slope)
    ids = torch.stack([IDS, MIXED])
    arguments = (student, draw(2, 9, 6, seed=1), ids, ids.clone(), 0.3, 0.9, with_slope)
    torch.library.opcheck(pull_push_module._pull_push, arguments)
    tokens = draw(2, 3, 4, 6).requires_grad_(with_slope)
    saliency, factors = draw_saliency(2, 3, 4), draw_saliency(3, 3)
    relation = (tokens, draw(2, 3, 4, 5, seed=1), saliency, factors, "or", 0.1, with_slope)
    for is_squared in (False, True):
        torch.library.opcheck(relation_module._pair_sums, (*relation, is_squared))
