"""The Triton kernels of pull_push, against the eager reference in float64.

Without a CUDA device they run in Triton's interpreter, where bfloat16 does not work.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import random_tensors
from alignlab.kernels import pull_push_triton as module
from alignlab.kernels import pull_push_triton_kernels as kernels
from alignlab.kernels.pull_push import PullPush, pull_push, pull_push_eager
from alignlab.kernels.pull_push_triton import pull_push_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ROUNDING = {F32: 2e-6, F16: 2e-3, BF16: 2e-2}


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in small inputs, unless the test is marked to use the real ones."""
    if request.node.get_closest_marker("usefixtures") is None:
        small = kernels.Tile(32, 64, 16, 4, 2)
        monkeypatch.setattr(kernels, "OVERLAP_TILES", dict.fromkeys(kernels.OVERLAP_TILES, small))
        monkeypatch.setattr(kernels, "GRADIENT_TILES", dict.fromkeys(kernels.GRADIENT_TILES, small))
        monkeypatch.setattr(kernels, "HOLE_COLUMNS", 64)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return random_tensors.draw(*shape, seed=seed).to(DEVICE, dtype)


def subjects(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Sorted in the first sample, shuffled with padding in the others."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, 3, (batch, tokens), generator=generator)
    ids[0] = torch.arange(tokens) * 3 // tokens
    return ids.to(DEVICE)


def naive(
    student: Tensor, teacher: Tensor, ids: Tensor, pos_margin: float, neg_margin: float
) -> PullPush:
    """The formula, wholly in the dtype of its inputs."""
    valid = ids >= 0
    student, teacher = (x / x.norm(dim=-1, keepdim=True) for x in (student, teacher))
    cosines = student @ teacher.mT
    miss = (1 - cosines.diagonal(dim1=-2, dim2=-1) - pos_margin).relu() * valid
    cross = (ids[..., None] != ids[..., None, :]) & valid[..., None] & valid[..., None, :]
    overlap = (cosines - (1 - neg_margin)).relu() * cross
    count = cross.sum((-2, -1)).clamp_min(1)
    return PullPush(
        miss.sum(-1) / valid.sum(-1).clamp_min(1), overlap.sum(-1).float().sum(-1) / count
    )


def outcome(compute: Any, student: Tensor, teacher: Tensor, *args: Any) -> list[Tensor]:
    """Values, and the gradient of a sum that weighs every value differently, some negatively."""
    student = student.detach().requires_grad_()
    terms = compute(student, teacher, *args)
    upstream = [draw(*x.shape, seed=7 + i, dtype=x.dtype) for i, x in enumerate(terms)]
    (grad,) = torch.autograd.grad(list(terms), student, upstream)
    return [*(x.detach().double() for x in terms), grad.double()]


def assert_no_less_exact(student: Tensor, teacher: Tensor, *args: Any) -> None:
    truth = outcome(pull_push_eager, student.double(), teacher.double(), *args)
    plain = outcome(naive, student, teacher, *args)
    have = outcome(pull_push_triton, student, teacher, *args)
    for x, by_naive, exact in zip(have, plain, truth, strict=True):
        allowed = (by_naive - exact).abs().max() + ROUNDING[student.dtype] * exact.abs().max()
        assert (x - exact).abs().max() <= allowed + 1e-7


@pytest.mark.parametrize("dtype", [F32, F16, pytest.param(BF16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("tokens", "width", "margins"),
    [(1, 16, (0.0, 1.0)), (63, 24, (0.6, 0.85)), (100, 33, (1.1, 1.3))],
)
def test_no_less_exact_than_the_plain_formula_in_the_same_dtype(
    dtype: torch.dtype, tokens: int, width: int, margins: tuple[float, float]
) -> None:
    student, teacher = draw(2, 2, tokens, width, dtype=dtype), draw(2, tokens, width, seed=1)
    ids = subjects(2, tokens)
    assert_no_less_exact(student, teacher.to(dtype), ids, *margins)


@pytest.mark.usefixtures("real_tiles")
@pytest.mark.parametrize("dtype", [F32, F16])
def test_the_real_tiles_on_a_size_that_fills_none(dtype: torch.dtype, real_tiles: None) -> None:
    student, teacher = draw(1, 257, 72, dtype=dtype), draw(1, 257, 72, seed=1, dtype=dtype)
    assert_no_less_exact(student, teacher, subjects(1, 257), 0.0, 1.0)


@pytest.fixture
def real_tiles() -> None:
    """Marks a test that runs on the tiles as they are shipped."""


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("garbage", [1e30, math.nan, math.inf])
def test_padding_reaches_neither_value_nor_gradient(garbage: float) -> None:
    ids = subjects(2, 40)
    student, teacher = draw(2, 40, 24), draw(2, 40, 24, seed=1)
    padding = (ids < 0).unsqueeze(-1)
    clean = outcome(pull_push_triton, student, teacher, ids, 0.0, 1.2)
    dirty = outcome(
        pull_push_triton,
        student.masked_fill(padding, garbage),
        teacher.masked_fill(padding, garbage),
        *(ids, 0.0, 1.2),
    )
    assert padding.any() and all(map(torch.equal, clean, dirty))
    assert (dirty[2].masked_select(padding) == 0).all()


@pytest.mark.parametrize("ids", [[4] * 40, [-1] * 40, [3] + [-1] * 39, [0] + [1] * 39])
def test_few_subjects(ids: list[int]) -> None:
    args = (draw(40, 16), draw(40, 16, seed=1), torch.tensor(ids, device=DEVICE), 0.0, 1.0)
    truth = outcome(pull_push_eager, *(x.double() for x in args[:2]), *args[2:])
    for have, want in zip(outcome(pull_push_triton, *args), truth, strict=True):
        torch.testing.assert_close(have, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 1e-14, 1e-8, 1e8, 1e16])
def test_norms_of_any_size(scale: float) -> None:
    scales = torch.where(torch.arange(40) % 3 == 0, scale, 1.0)[:, None].to(DEVICE)
    student, teacher = draw(40, 16) * scales, draw(40, 16, seed=1) * scales.flip(0)
    args = (subjects(1, 40)[0], 0.0, 1.2)
    truth = outcome(pull_push_eager, student.double(), teacher.double(), *args)
    have = outcome(pull_push_triton, student, teacher, *args)
    torch.testing.assert_close(have[:2], truth[:2], atol=1e-6, rtol=0)
    size = truth[2].abs().amax(-1, keepdim=True).clamp_min(1e-30)
    torch.testing.assert_close(have[2] / size, truth[2] / size, atol=1e-5, rtol=0)


def test_a_nan_among_the_valid_tokens_shows() -> None:
    student, teacher = draw(40, 16), draw(40, 16, seed=1)
    teacher[3] = math.nan
    terms = pull_push_triton(student, teacher, subjects(1, 40)[0], 0.0, 1.0)
    assert terms.pull.isnan() and terms.push.isnan()


@pytest.mark.parametrize("shared", ["both", "teacher", "neither"])
def test_what_is_repeated_over_blocks_is_not_copied(
    shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, seen = module.pull_push_triton_rows, []

    def spy(*args: Any) -> Any:
        seen.append(len(args[1]))
        return rows(*args)

    monkeypatch.setattr(module, "pull_push_triton_rows", spy)
    student, ids = draw(3, 2, 40, 16), subjects(6, 40).view(3, 2, 40)
    teacher = draw(3, 2, 40, 16, seed=1)
    teacher = teacher if shared == "neither" else teacher[:1]
    ids = ids[0] if shared == "both" else ids
    terms = pull_push_triton(student, teacher, ids, 0.0, 1.0)
    assert seen == [2 if shared == "both" else 6]
    truth = pull_push_eager(student, teacher.expand_as(student), ids.expand(3, 2, 40), 0.0, 1.0)
    torch.testing.assert_close(tuple(terms), tuple(truth), atol=1e-6, rtol=0)


def test_no_tokens_or_samples() -> None:
    for shape in [(2, 0, 4), (0, 5, 4)]:
        student = torch.zeros(shape, device=DEVICE, requires_grad=True)
        ids = torch.zeros(shape[:-1], device=DEVICE, dtype=torch.int64)
        terms = pull_push_triton(student, student.detach(), ids, 0.0, 1.0)
        assert terms.push.shape == shape[:1] and (terms.pull == 0).all()
        (terms.pull + terms.push).sum().backward()
        assert student.grad is not None


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """New memory holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_writes_all_it_reads_and_repeats_itself_bit_for_bit(filled_memory: None) -> None:
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    args = (draw(2, 100, 24), draw(2, 100, 24, seed=1), subjects(2, 100), 0.6, 0.9)
    first = outcome(pull_push_triton, *args)
    assert all(x.isfinite().all() for x in first)
    assert all(map(torch.equal, first, outcome(pull_push_triton, *args)))
    torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, outcome(pull_push_triton, *args)))


def test_each_term_has_its_own_gradient() -> None:
    args = (draw(2, 40, 16, seed=1), subjects(2, 40), 0.3, 1.2)
    for term in range(2):
        grads: list[Tensor] = []
        for compute in (pull_push_eager, pull_push_triton):
            student = draw(2, 40, 16).requires_grad_()
            loss = compute(student, *args)[term][1].neg()
            grads += torch.autograd.grad(loss, student)
        assert (grads[1][0] == 0).all() and (grads[1][1] != 0).any()
        torch.testing.assert_close(*grads, atol=1e-6, rtol=0)


def test_ops_pass_opcheck() -> None:
    student, teacher, ids = draw(2, 20, 16).requires_grad_(), draw(1, 20, 16), subjects(1, 20)
    torch.library.opcheck(module.pull_push_triton_subjects, (ids,))
    subject_BN, _ = module.pull_push_triton_subjects(ids)
    for keep in (True, False):
        # Without what `keep` keeps there is no gradient to check.
        x = student if keep else student.detach()
        torch.library.opcheck(module.pull_push_triton_rows, (x, teacher, subject_BN, 0.1, keep))
    cosine, _, *kept = module.pull_push_triton_rows(
        student.detach(), teacher, subject_BN, 0.1, True
    )
    reach, norm, unit, words = kept
    saved = (student.detach(), unit, subject_BN, cosine, reach, norm, words)
    torch.library.opcheck(module.pull_push_triton_backward, (norm, cosine, *saved))


def test_compiles_as_one_graph() -> None:
    args = (draw(2, 3, 40, 16), draw(3, 40, 16, seed=1), subjects(3, 40), 0.1, 0.9)
    compiled = torch.compile(pull_push_triton, fullgraph=True, backend="aot_eager")
    for have, want in zip(outcome(compiled, *args), outcome(pull_push_triton, *args), strict=True):
        torch.testing.assert_close(have, want, atol=1e-7, rtol=0)


def test_keeps_no_mask_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, kept = module.pull_push_triton_rows, []

    def spy(*args: Any) -> Any:
        outputs = rows(*args)
        kept.append(outputs[-1].numel())
        return outputs

    monkeypatch.setattr(module, "pull_push_triton_rows", spy)
    args = (draw(40, 16, seed=1), subjects(1, 40)[0], 0.0, 1.0)
    student = draw(40, 16).requires_grad_()
    wanted = pull_push_triton(student, *args)
    with torch.no_grad():
        unwanted = [pull_push_triton(student, *args), pull_push_triton(student.detach(), *args)]
    assert kept == [40 * 16, 0, 0]
    for terms in unwanted:
        assert torch.equal(terms.pull, wanted.pull) and torch.equal(terms.push, wanted.push)


def test_tiles_of_one_subject_are_not_computed() -> None:
    # NaN would show in any sum that is computed from it.
    student = torch.full((1, 128, 16), math.nan, device=DEVICE)
    subject_BN, _ = module.pull_push_triton_subjects(torch.full((1, 128), 5, device=DEVICE))
    outputs = module.pull_push_triton_rows(student, draw(1, 128, 16), subject_BN, 0.0, True)
    assert (outputs[1] == 0).all() and (outputs[-1] == 0).all()


@pytest.mark.parametrize(
    ("ids", "visited"),
    [
        pytest.param([0] * 64 + [1] * 64, [[4, 5, 6, 7]] * 2 + [[0, 1, 2, 3]] * 2, id="sorted"),
        pytest.param([0] * 64 + [1] * 20 + [-1] * 44, [[4, 5], [4, 5], [0, 1, 2, 3], []], id="end"),
        pytest.param([0, 1] * 64, [list(range(8))] * 4, id="shuffled"),
        pytest.param(
            [0] * 40 + [1] * 24 + [0] * 64,
            [[2, 3], list(range(8)), [0, 1, 2, 3], [0, 1, 2, 3]],
            id="mixed",
        ),
    ],
)
def test_the_backward_pass_skips_what_it_can(ids: list[int], visited: list[list[int]]) -> None:
    subject_BN, _ = module.pull_push_triton_subjects(torch.tensor([ids], device=DEVICE))
    hole_BT3 = subject_BN.new_empty(1, 4, 3)
    kernels.hole_kernel[(4, 1)](subject_BN, hole_BT3, 128, ROWS=32, COLUMNS=64, Q=16)
    for (first, skipped, steps), planes in zip(hole_BT3[0].tolist(), visited, strict=True):
        assert [x if x < first else x + skipped for x in range(steps)] == planes


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.float64), "float64"),
        pytest.param(torch.zeros(3, 4, dtype=BF16), "bfloat16 products wrongly", id="bfloat16"),
        (torch.zeros(3, 0), "at least one channel"),
    ],
)
@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")
def test_what_it_cannot_do_is_refused(student: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pull_push(student, student, torch.zeros(3, dtype=torch.int64), impl="triton")
