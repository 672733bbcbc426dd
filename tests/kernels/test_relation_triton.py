"""The relation distance in Triton: against float64, in any memory, under torch.compile."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.kernels import relation_triton
from alignlab.kernels.dispatch import interpreted
from alignlab.kernels.relation import (
    Relation,
    pair_weight,
    relation_distance,
    relation_eager,
    relation_plain,
)
from alignlab.kernels.relation_triton_kernels import TILES, Tiles
from random_tensors import draw_double

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
if not interpreted():
    DTYPES.append(torch.bfloat16)
# Of means and gradients, relative to their length. Rounding the vectors moves a few pairs over the
# margin, each of which is a jump of the gradient: in half precision they are several percent.
TOLERANCES = {torch.float32: (1e-6, 2e-6), torch.float16: (2e-4, 0.1), torch.bfloat16: (2e-3, 0.3)}
# Small, so that few tokens make several tiles. Nothing of it depends on the device.
ONE_SQUARE = Tiles(block=16, squares=1, depth=32, channels=64, planes=2, stages=(2, 2))
TWO_SQUARES = Tiles(block=16, squares=2, depth=32, channels=32, planes=4, stages=(2, 2))
BIG = Tiles(block=32, squares=1, depth=64, channels=64, planes=1, stages=(2, 2))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, ONE_SQUARE)


def use(monkeypatch: pytest.MonkeyPatch, tiles: Tiles) -> None:
    for key in TILES:
        monkeypatch.setitem(TILES, key, tiles)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return draw_double(*shape, seed=seed).to(DEVICE)


def draw_saliency(*shape: int) -> Tensor:
    saliency = draw(*shape, seed=9).sigmoid()
    saliency[:, :, ::4] = 0.0
    return saliency


def both(function: Any, student: Tensor, dtype: torch.dtype, *arguments: Any) -> list[Tensor]:
    """The three means (3, B), and the gradient of their sum with weights of either sign, each
    vector times its length: that of a tiny one is huge."""
    student = student.to(dtype).requires_grad_()
    teacher, *rest = arguments
    relation: Relation = function(student, teacher.to(dtype), *rest)
    means = torch.stack(relation)
    upstream = draw(*means.shape, seed=5).abs()
    upstream[1] *= -1.0
    (gradient,) = torch.autograd.grad((means * upstream.to(means)).sum(), student)
    length = student.detach().double().norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return [means.detach().double(), gradient.double() * length]


def assert_no_worse_than_plain(dtype: torch.dtype, student: Tensor, *arguments: Any) -> None:
    """Errors against float64 on the same rounded inputs, beside those of the plain formula with
    every product, norm and sum in the dtype of the inputs."""
    rounded = student.to(dtype), arguments[0].to(dtype), *arguments[1:]
    truth = both(relation_eager, rounded[0], torch.float64, *rounded[1:])
    computed = both(relation_triton.relation_triton, rounded[0], dtype, *rounded[1:])
    plain = both(partial(relation_plain, dtype=dtype), rounded[0], dtype, *rounded[1:])
    for want, have, careless, tolerance in zip(
        truth, computed, plain, TOLERANCES[dtype], strict=True
    ):
        assert torch.isfinite(want).all()
        # float16 alone overflows in places: no excuse then
        allowed = (careless - want).norm().nan_to_num(0.0, posinf=0.0)
        assert (have - want).norm() <= allowed + tolerance * want.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("frames", "tokens", "routing", "margin", "tau", "tiles"),
    [
        pytest.param(1, 1, "or", 0.0, math.inf, ONE_SQUARE, id="one_token"),
        pytest.param(7, 9, "or", 0.05, 2.0, ONE_SQUARE, id="or"),
        pytest.param(3, 21, "and", 0.0, math.inf, ONE_SQUARE, id="and"),
        pytest.param(4, 25, "xor", 0.1, math.inf, TWO_SQUARES, id="xor"),
        pytest.param(2, 50, "uniform", 0.0, 0.7, ONE_SQUARE, id="uniform"),
        pytest.param(1, 257, "uniform", 0.1, 3.0, BIG, id="one_frame"),
        pytest.param(5, 1, "and", 0.2, 3.0, TWO_SQUARES, id="one_token_each"),
    ],
)
def test_is_no_less_accurate_than_the_plain_formula(
    frames: int,
    tokens: int,
    routing: str,
    margin: float,
    tau: float,
    tiles: Tiles,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, tiles)
    # tokens are not contiguous, as after a resampling
    student = draw(2, 40, frames, tokens).movedim(1, 3)
    teacher, saliency = draw(2, frames, tokens, 70, seed=1), draw_saliency(2, frames, tokens)
    assert_no_worse_than_plain(dtype, student, teacher, saliency, routing, margin, tau)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_vectors_and_extreme_norms(dtype: torch.dtype) -> None:
    """The gradient of a vector shorter than 1e-12 is that of a division by a constant."""
    student, teacher = draw(1, 3, 12, 16), draw(1, 3, 12, 16, seed=1)
    shortest = -4 if dtype == torch.float16 else -14
    student *= 10.0 ** torch.linspace(shortest, 2, 36, device=DEVICE).reshape(1, 3, 12, 1)
    teacher /= 10.0 ** torch.linspace(-4, 2, 36, device=DEVICE).reshape(1, 3, 12, 1)
    student[:, 1, ::3] = 0.0
    # the gradient of a zero vector is beyond float16, unless no pair of it costs anything
    teacher[:, 1, :: 3 if dtype == torch.float16 else 5] = 0.0
    saliency = draw_saliency(1, 3, 12)
    assert_no_worse_than_plain(dtype, student, teacher, saliency, "or", 0.05, 2.0)


@pytest.mark.parametrize("tiles", [ONE_SQUARE, TWO_SQUARES], ids=["one_square", "two_squares"])
def test_order_of_tiles_and_fresh_memory_change_no_bit(
    tiles: Tiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every buffer starts as NaN (bytes as 255) and is written before it is read."""
    use(monkeypatch, tiles)
    student, teacher, saliency = (
        draw(1, 5, 50, 8),
        draw(1, 5, 50, 8, seed=1),
        draw_saliency(1, 5, 50),
    )
    arguments = student, torch.float32, teacher, saliency, "or", 0.05, 2.0
    clean = both(relation_triton.relation_triton, *arguments)
    monkeypatch.setattr(relation_triton, "CACHED_SQUARES", 0)
    monkeypatch.setattr(relation_triton, "SUPER", 2)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        dirty = both(relation_triton.relation_triton, *arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.parametrize("routing", ["or", "and", "xor", "uniform"])
def test_weights_in_closed_form_equal_their_sum(routing: Any) -> None:
    saliency = draw_saliency(2, 3, 50).float()
    pairs = pair_weight(saliency[:, :, None, :, None], saliency[:, None, :, None], routing)
    sums = relation_triton.weight_sums(saliency, routing)
    torch.testing.assert_close(sums, pairs.double().sum((3, 4)))


def test_pairs_that_weigh_or_cost_nothing() -> None:
    student, teacher = draw(1, 2, 9, 8), draw(1, 2, 9, 8, seed=1)
    constant = torch.full((1, 2, 9), 0.3, device=DEVICE)
    for setting in (("xor", 0.0, 2.0), ("uniform", 2.5, math.inf)):
        means, gradient = both(
            relation_triton.relation_triton, student, torch.float32, teacher, constant, *setting
        )
        assert (means == 0).all() and (gradient == 0).all()


def test_a_broken_sample_is_not_hidden_and_spoils_no_other() -> None:
    student, teacher = draw(2, 2, 9, 8).float(), draw(2, 2, 9, 8, seed=1).float()
    arguments: Any = teacher, draw_saliency(2, 2, 9), "or", 0.05, 2.0
    clean = torch.stack(relation_triton.relation_triton(student, *arguments))
    student[1, 0, 3, 2] = math.nan
    student.requires_grad_()
    means = torch.stack(relation_triton.relation_triton(student, *arguments))
    (gradient,) = torch.autograd.grad(means[:, 0].sum(), student)
    assert torch.equal(means[:, 0], clean[:, 0]) and torch.isnan(means[:, 1]).all()
    assert torch.isfinite(gradient[0]).all() and gradient[0].abs().sum() > 0


def test_a_sample_that_counts_nothing_has_no_gradient() -> None:
    student, teacher = draw(2, 2, 9, 8).float(), draw(2, 2, 9, 8, seed=1).float()
    arguments: Any = teacher, draw_saliency(2, 2, 9), "or", 0.0, 2.0
    means = torch.stack(relation_triton.relation_triton(student.requires_grad_(), *arguments))
    (gradient,) = torch.autograd.grad(means[:, 0].sum(), student)
    assert gradient[0].abs().sum() > 0 and (gradient[1] == 0).all()


def test_the_dtypes_may_differ() -> None:
    student, teacher = draw(1, 2, 9, 8), draw(1, 2, 9, 8, seed=1)
    saliency = draw_saliency(1, 2, 9)
    student = student.half().requires_grad_()
    means = relation_triton.relation_triton(student, teacher.float(), saliency, "or", 0.0, 2.0)
    want = relation_eager(student.double(), teacher.float().double(), saliency, "or", 0.0, 2.0)
    torch.testing.assert_close(torch.stack(means).double(), torch.stack(want), atol=1e-6, rtol=0.0)
    (gradient,) = torch.autograd.grad(torch.stack(means).sum(), student)
    assert gradient.dtype == torch.float16


def test_codes_are_kept_only_for_a_gradient() -> None:
    tokens, saliency = draw(1, 2, 9, 8).float(), draw_saliency(1, 2, 9).float()
    for keep, size in ((True, 64 * 16), (False, 0)):
        _, codes = relation_triton.relation_triton_sums(
            tokens, tokens, saliency, "or", 0.0, torch.float32, keep
        )
        assert codes.numel() == size


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4)])
def test_without_tokens_every_mean_is_zero(shape: tuple[int, ...]) -> None:
    student = torch.zeros(shape, device=DEVICE, requires_grad=True)
    means = torch.stack(
        relation_triton.relation_triton(student, student, student[..., 0], "xor", 0.0, 2.0)
    )
    (gradient,) = torch.autograd.grad(means.sum(), student)
    assert means.shape == (3, shape[0]) and (means == 0).all() and gradient.shape == shape


def test_operators_pass_opcheck() -> None:
    student, teacher = draw(1, 2, 9, 8).float(), draw(1, 2, 9, 12, seed=1).float()
    saliency = draw_saliency(1, 2, 9).float()
    arguments: tuple[Any, ...] = student, teacher, saliency, "or", 0.0, torch.float32
    _, codes = relation_triton.relation_triton_sums(*arguments, True)
    torch.library.opcheck(
        relation_triton.relation_triton_sums, (student.requires_grad_(), *arguments[1:], True)
    )
    torch.library.opcheck(
        relation_triton.relation_triton_gradient,
        (draw(1, 2, 2).float(), student.detach(), saliency, codes, "or", torch.float32),
    )


def test_compiles_into_one_graph() -> None:
    student, teacher = draw(1, 2, 9, 8), draw(1, 2, 9, 8, seed=1)
    arguments = student, torch.float32, teacher, draw_saliency(1, 2, 9), "or", 0.05, 2.0
    compiled = torch.compile(relation_triton.relation_triton, fullgraph=True, backend="aot_eager")
    plain = both(relation_triton.relation_triton, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(both(compiled, *arguments), plain, strict=True))


@pytest.mark.parametrize(
    ("dtype", "width", "message"),
    [
        (torch.float64, 4, "float32, float16 and bfloat16, got torch.float64"),
        (torch.float32, 0, "at least one channel"),
        pytest.param(
            torch.bfloat16,
            4,
            "computes bfloat16 products wrongly",
            marks=pytest.mark.skipif(not interpreted(), reason="not interpreted"),
        ),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(
    dtype: torch.dtype, width: int, message: str
) -> None:
    fine, wrong = torch.ones(1, 2, 3, 4, device=DEVICE), torch.ones(1, 2, 3, width, device=DEVICE)
    wrong = wrong.to(dtype)
    for pair in ((fine, wrong), (wrong, fine)):
        with pytest.raises(ValueError, match=message):
            relation_distance(*pair, impl="triton")
