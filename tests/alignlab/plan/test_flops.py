"""FLOPs of a step, counted from formulas: also of operations that torch knows none for."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from alignlab.kernels import local_gram, pull_push, relation
from alignlab.plan.flops import FORMULAS, FlopCount, count_flops


def added(out: list[int], left: list[int], right: list[int], **_: object) -> int:
    return 2 * math.prod(left) * right[-1]


def inside(work: Callable[[], object]) -> int:
    """FLOPs of the products inside a custom operation, which torch does not look into."""
    aten = torch.ops.aten
    in_place = dict.fromkeys((aten.addmm_, aten.baddbmm_), added)
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with counter:
        work()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("slopes", [False, True])
def test_the_formulas_of_the_kernels_are_what_they_multiply(slopes: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 30, 8, generator=draw).unbind()
    factors = torch.ones(3, 3)
    relation_inputs = (
        student,
        teacher[..., :5],
        torch.ones(2, 3, 30),
        factors,
        "uniform",
        0.1,
        slopes,
        False,
    )
    ids = torch.tensor([0] * 40 + [1] * 30 + [-1] * 5 + [2] * 15).expand(2, -1)
    pull_push_inputs = (student.flatten(1, 2), teacher.flatten(1, 2), ids, ids, 0.0, 1.0, slopes)
    for operation, args in (
        (relation._pair_sums, relation_inputs),
        (pull_push._pull_push, pull_push_inputs),
    ):
        body = operation._init_fn
        counted = count_flops(lambda operation=operation, args=args: operation(*args))  # type: ignore[misc]
        assert counted.total == inside(lambda body=body, args=args: body(*args)) > 0  # type: ignore[misc]
        assert counted.unknown == frozenset()


def test_the_formulas_of_local_gram_are_what_its_tiles_multiply() -> None:
    tokens = torch.randn(2, 3, 5, 19, 8)
    upstream = torch.randn(2, 2, 5, 19, 49)
    for operation, args in (
        (local_gram._products, (tokens, 7, True, torch.float32)),
        (local_gram._products_gradient, (upstream, tokens, 7, True)),
    ):
        body = operation._init_fn
        counted = count_flops(lambda operation=operation, args=args: operation(*args))  # type: ignore[misc]
        assert counted.total == inside(lambda body=body, args=args: body(*args)) > 0  # type: ignore[misc]


def test_every_operation_of_the_kernels_has_a_formula() -> None:
    folder = Path(__file__).parents[3] / "kernels"
    text = "".join(path.read_text() for path in folder.glob("*.py"))
    assert set(re.findall(r'custom_op\(\s*"alignlab::(\w+)"', text)) == FORMULAS["alignlab"].keys()


def test_attention_on_a_cpu_is_counted() -> None:
    query, key, value = torch.randn(3, 2, 4, 16, 8).requires_grad_().unbind()

    def work() -> None:
        F.scaled_dot_product_attention(query, key, value).sum().backward()

    forward = 2 * (2 * 2 * 4 * 16 * 16 * 8)
    assert count_flops(work).total == forward + forward * 5 // 2


def test_all_else_is_what_torch_counts() -> None:
    network = nn.Sequential(nn.Conv3d(3, 5, 2), nn.Flatten(2), nn.Linear(8, 6), nn.GELU())
    optimizer = torch.optim.AdamW(network.parameters())
    video = torch.randn(2, 3, 3, 3, 3)

    def work() -> None:
        network(video).square().mean().backward()
        optimizer.step()
        with torch.inference_mode():  # where matmul and einsum are seen whole
            torch.einsum("bij,bjk->bik", network(video), torch.ones(2, 6, 4)) @ torch.ones(4, 2)

    counter = FlopCounterMode(display=False)
    with counter:
        work()
    assert count_flops(work) == FlopCount(counter.get_total_flops(), frozenset())


def test_what_has_no_formula_is_named() -> None:
    @torch.library.custom_op("alignlab_test::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return x * 2

    found = count_flops(lambda: double(torch.ones(2)) @ torch.ones(2, 3))
    assert found.unknown == {"alignlab_test.double.default"}
    assert found.total == 2 * 2 * 3
