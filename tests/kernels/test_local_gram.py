"""The local Gram divergence: tiles against views, rounding, memory; loops: see the loss's test."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.kernels import local_gram as module
from alignlab.kernels.local_gram import local_gram
from random_tensors import draw_double as draw

every_impl = pytest.mark.parametrize("impl", ["eager", "chunked"])


def both(impl: Any, student: Tensor, teacher: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """The divergence and the gradient of its samples with weights of either sign."""
    student = student.detach().requires_grad_()
    divergence = local_gram(student, teacher, impl=impl, **settings).divergence
    upstream = draw(len(divergence), seed=5).to(divergence)
    (gradient,) = torch.autograd.grad((divergence * upstream).sum(), student)
    return divergence.detach(), gradient


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("frames", "height", "width", "window", "tile"),
    [
        pytest.param(2, 1, 1, 3, 16, id="two_tokens"),
        pytest.param(3, 1, 37, 7, 16, id="one_row"),
        pytest.param(2, 37, 1, 7, 16, id="one_column"),
        pytest.param(4, 3, 5, 11, 16, id="window_larger_than_the_frame"),
        pytest.param(3, 5, 19, 3, 2, id="small_tiles"),
        pytest.param(2, 6, 7, 9, 3, id="window_wider_than_three_tiles"),
    ],
)
def test_tiles_give_what_views_give(
    frames: int,
    height: int,
    width: int,
    window: int,
    tile: int,
    normalize: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "TILE", tile)
    # not contiguous, as after a projection of another layout; another width for the teacher
    student = draw(2, 6, frames, height, width).movedim(1, 4)
    teacher = draw(2, frames, height, width, 9, seed=1)
    student[0, 0, 0] = 0.0
    settings: dict[str, Any] = {"window": window, "temperature": 0.7, "normalize": normalize}
    torch.testing.assert_close(
        both("chunked", student, teacher, **settings), both("eager", student, teacher, **settings)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalize", [False, True])
def test_chunked_rounds_no_more_than_eager(dtype: torch.dtype, normalize: bool) -> None:
    student, teacher = (draw(2, 3, 5, 6, 24, seed=seed).to(dtype) for seed in (0, 1))
    settings: dict[str, Any] = {"temperature": 0.1 if normalize else 3.0, "normalize": normalize}
    truth = both("eager", student.double(), teacher.double(), **settings)
    eager, chunked = (both(impl, student, teacher, **settings) for impl in ("eager", "chunked"))
    assert chunked[0].dtype == torch.float32 and chunked[1].dtype == dtype
    for want, usual, have in zip(truth, eager, chunked, strict=True):
        allowed = (usual.double() - want).abs().max() + 2e-6 * want.abs().max()
        assert (have.double() - want).abs().max() <= allowed


@every_impl
def test_local_gram_gradient_passes_gradcheck(impl: Any) -> None:
    student, teacher = draw(2, 3, 2, 3, 3).requires_grad_(), draw(2, 3, 2, 3, 4, seed=1)

    def divergence(x: Tensor) -> Tensor:
        return local_gram(
            x, teacher, window=3, temperature=0.5, normalize=True, impl=impl
        ).divergence

    assert torch.autograd.gradcheck(divergence, (student,))


@every_impl
def test_a_broken_sample_of_local_gram_spoils_no_other(impl: Any) -> None:
    student, teacher = draw(3, 2, 3, 5, 4), draw(3, 2, 3, 5, 4, seed=1)
    clean = local_gram(student, teacher, impl=impl).divergence
    student[1, 0, 1, 3, 2] = math.nan
    student.requires_grad_()
    divergence = local_gram(student, teacher, impl=impl).divergence
    (gradient,) = torch.autograd.grad(divergence.sum(), student)
    assert torch.isnan(divergence[1]) and torch.equal(divergence[[0, 2]], clean[[0, 2]])
    assert torch.isfinite(gradient[[0, 2]]).all()


@every_impl
def test_the_teacher_of_local_gram_is_a_constant(impl: Any) -> None:
    student, teacher = draw(1, 2, 3, 3, 4), draw(1, 2, 3, 3, 4, seed=1).requires_grad_()
    with pytest.raises(ValueError, match="the teacher is a constant: detach it"):
        local_gram(student, teacher, impl=impl)


def test_chunked_multiplies_in_float32_under_autocast_in_both_passes() -> None:
    student, teacher = draw(1, 2, 3, 4, 8).float(), draw(1, 2, 3, 4, 8, seed=1).float()
    plain = both("chunked", student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = both("chunked", student, teacher)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_chunked_keeps_tokens_as_they_came_and_a_few_numbers_for_each_place() -> None:
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    student = draw(1, 3, 8, 8, 512).bfloat16().requires_grad_()
    teacher = draw(1, 3, 8, 8, 512, seed=1).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        divergence = local_gram(student, teacher, normalize=True, impl="chunked").divergence
    places = 2 * 64 * 49
    assert divergence.requires_grad
    assert sum(kept.values()) <= student.nbytes + 4 * (4 * places)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 5), (2, 3, 0, 4, 5), (2, 3, 4, 0, 5)])
@every_impl
def test_local_gram_of_nothing_is_zero(impl: Any, shape: tuple[int, ...]) -> None:
    divergence, gradient = both(impl, torch.zeros(shape), torch.zeros(shape))
    assert divergence.shape == shape[:1] and (divergence == 0).all() and gradient.shape == shape


def test_torch_library_finds_nothing_wrong_with_local_gram() -> None:
    tokens = draw(2, 3, 4, 5, 6)
    arguments = (tokens.requires_grad_(), 3, True, torch.float64)
    torch.library.opcheck(module._products, arguments)
    gradient = (draw(2, 2, 4, 5, 9), tokens.detach(), 3, True)
    torch.library.opcheck(module._products_gradient, gradient)


def test_few_tokens_take_eager_and_more_take_chunked() -> None:
    for height, impl in ((8, "eager"), (9, "chunked")):
        student, teacher = (draw(1, 2, height, 16, 4, seed=s).float() for s in (0, 1))
        auto, named = (both(i, student, teacher) for i in ("auto", impl))
        assert all(torch.equal(a, b) for a, b in zip(auto, named, strict=True))
