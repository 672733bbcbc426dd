"""The pull and push terms against published-code values, a loop over pairs, and edge cases."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignlab.kernels.pull_push import PullPush, pull_push
from random_tensors import draw_double as draw
from random_tensors import golden_pair

SINE, COSINE = golden_pair(6, 4)
PAIRS_OF_TOKENS = torch.tensor([0, 0, 1, 1, 2, 2])


@pytest.fixture(params=["eager", "chunked"])
def compute(request: pytest.FixtureRequest) -> Any:
    """Each implementation in pure torch; Triton's, which takes no float64, has its own tests."""
    return partial(pull_push, impl=request.param)


def by_loops(
    student: Tensor, teacher: Tensor, ids: Tensor, pos_margin: float, neg_margin: float
) -> PullPush:
    """Visits every token and every pair of one sample, one at a time."""

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())

    pulls, pushes = [], []
    for i, j in product(range(len(ids)), repeat=2):
        if ids[i] < 0 or ids[j] < 0:
            continue
        distance = 1 - cosine(student[i], teacher[j])
        if i == j:
            pulls.append(torch.relu(distance - pos_margin))
        if ids[i] != ids[j]:
            pushes.append(torch.relu(neg_margin - distance))
    zero = student.sum() * 0.0
    return PullPush(
        torch.stack(pulls).mean() if pulls else zero,
        torch.stack(pushes).mean() if pushes else zero,
    )


@pytest.mark.parametrize(
    ("ids", "neg_margin", "pull", "push"),
    [
        pytest.param(PAIRS_OF_TOKENS, 1.0, 0.99905198, 0.29167979, id="margin_1"),
        pytest.param(PAIRS_OF_TOKENS, 0.5, 0.99905198, 0.08064308, id="margin_half"),
        pytest.param(torch.zeros(6, dtype=torch.int64), 1.0, 0.99905198, 0.0, id="one_subject"),
    ],
)
def test_reproduces_the_values_of_the_authors_code(
    compute: Any, ids: Tensor, neg_margin: float, pull: float, push: float
) -> None:
    terms = compute(SINE, COSINE, ids, neg_margin=neg_margin)
    assert terms.pull.dtype == torch.float64
    assert terms.pull.item() == pytest.approx(pull, abs=5e-9)
    assert terms.push.item() == pytest.approx(push, abs=5e-9)


@pytest.mark.parametrize(("pos_margin", "neg_margin"), [(0.0, 1.0), (0.6, 0.85), (1.1, 1.4)])
@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2], id="sorted"),
        pytest.param([2, 0, -1, 1, 2, 0, 0, -1, 2, 1, 5], id="shuffled_with_padding"),
        pytest.param([3, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1], id="one_token"),
    ],
)
def test_values_and_gradients_equal_a_loop_over_pairs(
    compute: Any, ids: list[int], pos_margin: float, neg_margin: float
) -> None:
    student, teacher = draw(11, 7).requires_grad_(), draw(11, 7, seed=1)
    subject_ids = torch.tensor(ids)
    expected = by_loops(student, teacher, subject_ids, pos_margin, neg_margin)
    terms = compute(student, teacher, subject_ids, pos_margin=pos_margin, neg_margin=neg_margin)
    for have, want in zip(terms, expected, strict=True):
        torch.testing.assert_close(have, want)
        (grad,) = torch.autograd.grad(have, student, retain_graph=True)
        (expected_grad,) = torch.autograd.grad(want, student, retain_graph=True)
        torch.testing.assert_close(grad, expected_grad)


def test_gradient_passes_gradcheck(compute: Any) -> None:
    student, teacher = draw(2, 7, 5).requires_grad_(), draw(2, 7, 5, seed=1)
    ids = torch.tensor([[0, 0, 1, 1, 2, -1, -1], [1, 0, 1, 0, 1, 0, 1]])
    assert torch.autograd.gradcheck(
        lambda x: compute(x, teacher, ids, pos_margin=0.3, neg_margin=0.9), (student,)
    )


def test_a_gradient_of_the_teacher_is_refused(compute: Any) -> None:
    student, teacher = draw(6, 4).requires_grad_(), draw(6, 4, seed=1).requires_grad_()
    with pytest.raises(ValueError, match="the teacher is a constant: detach it"):
        compute(student, teacher, PAIRS_OF_TOKENS)
    with torch.no_grad():
        compute(student, teacher, PAIRS_OF_TOKENS)


def test_all_padding_gives_zero_with_zero_gradient(compute: Any) -> None:
    student = draw(2, 6, 4).requires_grad_()
    ids = torch.stack([torch.full((6,), -1), PAIRS_OF_TOKENS])
    terms = compute(student, draw(2, 6, 4, seed=1), ids)
    assert terms.pull[0] == 0 and terms.push[0] == 0
    torch.autograd.backward((terms.pull + terms.push).sum())
    assert student.grad is not None and torch.isfinite(student.grad).all()
    assert (student.grad[0] == 0).all() and (student.grad[1] != 0).any()


@pytest.mark.parametrize("garbage", [1e6, float("nan"), float("inf")])
def test_padding_reaches_neither_value_nor_gradient(compute: Any, garbage: float) -> None:
    student, teacher = draw(6, 4), draw(6, 4, seed=1)
    alone = compute(student, teacher, PAIRS_OF_TOKENS)
    filler = torch.full((3, 4), garbage, dtype=torch.float64)
    padded = torch.cat([student, filler]).requires_grad_()
    ids = torch.cat([PAIRS_OF_TOKENS, torch.full((3,), -1)])
    terms = compute(padded, torch.cat([teacher, filler]), ids)
    torch.testing.assert_close(tuple(terms), tuple(alone))
    torch.autograd.backward(terms.pull + terms.push)
    assert padded.grad is not None and torch.isfinite(padded.grad).all()
    assert (padded.grad[6:] == 0).all()


def test_zero_vectors_have_cosine_zero(compute: Any) -> None:
    student = torch.zeros(4, 3, requires_grad=True)
    terms = compute(student, torch.zeros(4, 3), torch.tensor([0, 0, 1, 1]), neg_margin=1.5)
    assert terms.pull == 1 and terms.push == 0.5
    torch.autograd.backward(terms.pull + terms.push)
    assert student.grad is not None and torch.isfinite(student.grad).all()


def test_one_aligned_token_has_nothing_to_pay(compute: Any) -> None:
    terms = compute(SINE[:1], 3 * SINE[:1], torch.tensor([0]))
    assert terms.pull.item() == pytest.approx(0, abs=1e-12) and terms.push == 0


def test_teacher_and_ids_broadcast_over_blocks(compute: Any) -> None:
    student, teacher = draw(3, 2, 6, 4), draw(2, 6, 4, seed=1)
    ids = torch.stack([PAIRS_OF_TOKENS, torch.tensor([0, 1, 1, -1, -1, -1])])
    terms = compute(student, teacher, ids)
    assert terms.pull.shape == terms.push.shape == (3, 2)
    for block, sample in product(range(3), range(2)):
        one = compute(student[block, sample], teacher[sample], ids[sample])
        torch.testing.assert_close(terms.pull[block, sample], one.pull)
        torch.testing.assert_close(terms.push[block, sample], one.push)


@settings(deadline=None, max_examples=60)
@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    num_tokens=st.integers(0, 7),
    width=st.integers(1, 5),
    subjects=st.integers(1, 4),
    seed=st.integers(0, 1000),
    impl=st.sampled_from(["eager", "chunked"]),
)
def test_any_shape_gives_one_finite_value_per_leading_index(
    lead: list[int], num_tokens: int, width: int, subjects: int, seed: int, impl: Any
) -> None:
    student = draw(*lead, num_tokens, width, seed=seed)
    teacher = draw(*lead, num_tokens, width, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, subjects, (*lead, num_tokens), generator=generator)
    terms = pull_push(student, teacher, ids, impl=impl)
    order = torch.randperm(num_tokens, generator=generator)
    moved = [student[..., order, :], teacher[..., order, :], ids[..., order]]
    shuffled = pull_push(*moved, impl=impl)
    for have, same in zip(terms, shuffled, strict=True):
        assert have.shape == tuple(lead)
        assert ((have >= 0) & (have <= 2)).all()
        torch.testing.assert_close(have, same)


@pytest.mark.parametrize(
    ("student", "teacher", "ids", "message"),
    [
        (SINE[0], COSINE[0], PAIRS_OF_TOKENS, "student must be"),
        (SINE, COSINE[:, :3], PAIRS_OF_TOKENS, "teacher .* does not broadcast"),
        (SINE, COSINE.expand(2, 6, 4), PAIRS_OF_TOKENS, "teacher .* does not broadcast"),
        (SINE, COSINE, PAIRS_OF_TOKENS[:1], "subject_ids .* does not match"),
        (SINE, COSINE, PAIRS_OF_TOKENS.float(), "must be integers"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    student: Tensor, teacher: Tensor, ids: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pull_push(student, teacher, ids)
