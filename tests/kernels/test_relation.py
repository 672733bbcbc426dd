"""The relation distance against golden values, a loop over pairs, and edge cases."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignlab.kernels import relation as relation_module
from alignlab.kernels.relation import (
    Relation,
    mean_relation,
    plain_means,
    plain_relation,
    relation_distance,
)
from random_tensors import draw_double as draw
from random_tensors import draw_saliency, golden_pair, golden_saliency

SINE, COSINE = golden_pair(1, 3, 2, 4)
SALIENCY = golden_saliency()

ROUTINGS: list[Any] = ["or", "and", "xor", "uniform"]
every_impl = pytest.mark.parametrize("impl", ["eager", "chunked"])
every_routing = pytest.mark.parametrize("routing", ROUTINGS)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few pairs, so that every frame takes several and the last one is smaller."""
    monkeypatch.setattr(relation_module, "TILE_PAIRS", 64)  # two rows of 2 x 15 pairs


def by_loops(
    student_TPD: Tensor,
    teacher_TPD: Tensor,
    saliency_TP: Tensor,
    routing: str,
    margin: float,
    tau: float,
    distance: str = "l1",
) -> Relation:
    """Visits every ordered pair of tokens of one sample, one at a time."""

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())

    tops = [student_TPD.sum() * 0.0] * 3
    bottoms = [1e-6] * 3
    places = list(itertools.product(range(student_TPD.shape[0]), range(student_TPD.shape[1])))
    for one, other in itertools.product(places, places):
        a, b = float(saliency_TP[one]), float(saliency_TP[other])
        weight = {"or": a + b - a * b, "and": a * b, "xor": abs(a - b), "uniform": 1.0}[routing]
        cost = torch.zeros(())
        if one != other:
            gap = cosine(student_TPD[one], student_TPD[other]) - cosine(
                teacher_TPD[one], teacher_TPD[other]
            )
            cost = torch.relu(gap.abs() - margin) ** (2 if distance == "l2" else 1)
        same = one[0] == other[0]
        decayed = weight if same else weight * math.exp(-abs(one[0] - other[0]) / tau)
        for which, share in ((0 if same else 1, decayed), (2, weight)):
            tops[which] = tops[which] + share * cost
            bottoms[which] += share
    return Relation(*(top / bottom for top, bottom in zip(tops, bottoms, strict=True)))


@every_impl
@pytest.mark.parametrize(
    ("setting", "spatial", "temporal"),
    [
        pytest.param({"routing": "or"}, 0.17661906, 0.39903824, id="or"),
        pytest.param({"routing": "or", "tau": 10.0}, 0.17661906, 0.39032765, id="or_tau_10"),
        pytest.param({"routing": "and"}, 0.11226164, 0.40853719, id="and"),
        pytest.param({"routing": "xor"}, 0.43517856, 0.41090840, id="xor"),
        pytest.param({"routing": "uniform"}, 0.17730709, 0.36529237, id="uniform"),
    ],
)
def test_reproduces_the_golden_values(
    impl: Any, setting: dict[str, Any], spatial: float, temporal: float
) -> None:
    relation = relation_distance(SINE, COSINE, saliency_BTP=SALIENCY, impl=impl, **setting)
    assert all(term.shape == (1,) and term.dtype == torch.float64 for term in relation)
    assert relation.spatial.item() == pytest.approx(spatial, abs=8e-9)
    assert relation.temporal.item() == pytest.approx(temporal, abs=8e-9)


@every_impl
def test_plain_means_reproduce_the_golden_values(impl: Any) -> None:
    plain = plain_means(relation_distance(SINE, COSINE, impl=impl), 3, 2)
    assert plain.spatial.item() == pytest.approx(0.17730710, abs=5e-9)
    assert plain.temporal.item() == pytest.approx(0.36529239, abs=5e-9)
    decayed = plain_means(relation_distance(SINE, COSINE, tau=10.0, impl=impl), 3, 2, 10.0)
    assert decayed.temporal.item() == pytest.approx(0.31272914, abs=5e-9)
    margin = plain_means(relation_distance(SINE, COSINE, margin=0.1, impl=impl), 3, 2)
    assert margin.joint.item() == pytest.approx(0.22902455, abs=5e-9)


@every_impl
def test_squares_without_pairs_of_a_token_with_itself_are_drepas_golden_value(impl: Any) -> None:
    plain = plain_relation(SINE, COSINE, distance="l2", impl=impl)
    assert plain.joint.item() * 36 / 30 == pytest.approx(0.22216618, abs=5e-9)


def test_squares_are_computed_by_no_other_implementation() -> None:
    message = "distance: l2 is computed by eager and chunked alone, not by triton; set impl: auto"
    with pytest.raises(ValueError, match=f"^{message}$"):
        relation_distance(SINE, COSINE, distance="l2", impl="triton")
    with pytest.raises(ValueError, match="unknown distance 'l3': choose l1, l2"):
        relation_distance(SINE, COSINE, distance="l3")  # type: ignore[arg-type]
    torch.testing.assert_close(
        relation_distance(SINE, COSINE, distance="l2"),
        relation_distance(SINE, COSINE, distance="l2", impl="chunked"),
    )


@every_routing
@pytest.mark.parametrize("distance", ["l1", "l2"])
@pytest.mark.parametrize(("margin", "tau"), [(0.0, math.inf), (0.3, 2.0)])
def test_values_and_gradients_equal_a_loop_over_pairs(
    routing: Any, distance: Any, margin: float, tau: float, small_tiles: None
) -> None:
    student, teacher = draw(2, 3, 5, 7).requires_grad_(), draw(2, 3, 5, 4, seed=1)
    saliency = draw_saliency(2, 3, 5)
    setting: dict[str, Any] = {"routing": routing, "margin": margin, "tau": tau}
    setting["distance"] = distance

    def with_gradients(terms: Relation, sample: int) -> list[Tensor]:
        values = [term.reshape(-1)[sample] for term in terms]
        grads = [torch.autograd.grad(-3.0 * v, student, retain_graph=True)[0] for v in values]
        return [*values, *grads]

    for sample in range(2):
        loops = by_loops(student[sample], teacher[sample], saliency[sample], **setting)
        expected = with_gradients(loops, 0)
        for impl in ("eager", "chunked"):
            relation = relation_distance(
                student,
                teacher,
                saliency_BTP=saliency,
                impl=impl,
                **setting,
            )
            torch.testing.assert_close(with_gradients(relation, sample), expected)


@every_impl
@pytest.mark.parametrize(("tau", "distance"), [(1.5, "l1"), (math.inf, "l1"), (1.5, "l2")])
def test_gradient_passes_gradcheck(impl: Any, tau: float, distance: Any, small_tiles: None) -> None:
    student, teacher = draw(2, 3, 3, 3).requires_grad_(), draw(2, 3, 3, 5, seed=1)
    saliency = draw_saliency(2, 3, 3)
    setting: dict[str, Any] = {"routing": "or", "margin": 0.1, "tau": tau, "distance": distance}

    def terms(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(relation_distance(x, teacher, saliency_BTP=saliency, impl=impl, **setting))

    assert torch.autograd.gradcheck(terms, (student,))


@every_impl
def test_teacher_and_saliency_are_constants(impl: Any) -> None:
    student, teacher = SINE.clone().requires_grad_(), COSINE.clone().requires_grad_()
    saliency = SALIENCY.clone().requires_grad_()
    setting: dict[str, Any] = {"saliency_BTP": saliency, "routing": "or", "impl": impl}
    with pytest.raises(ValueError, match="the teacher is a constant: detach it"):
        relation_distance(student, teacher, **setting)
    relation = relation_distance(student, teacher.detach(), **setting)
    torch.autograd.backward([term.sum() for term in relation])
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert saliency.grad is None


@every_impl
def test_is_zero_for_rescaled_or_rotated_tokens_of_the_teacher(impl: Any) -> None:
    teacher = draw(2, 3, 5, 7)
    rotation, _ = torch.linalg.qr(draw(7, 7, seed=3))
    lengths = draw_saliency(2, 3, 5, 1) + 0.1
    for student in (teacher * lengths, teacher @ rotation, (teacher @ rotation) * lengths):
        for term in relation_distance(student, teacher, impl=impl):
            assert (term < 1e-14).all()
    mirrored = relation_distance(teacher.flip(2), teacher, impl=impl)
    assert all((term > 0.05).all() for term in mirrored)


@every_impl
@pytest.mark.parametrize("routing", ["or", "and"])
@pytest.mark.parametrize("tau", [2.0, math.inf])
def test_constant_saliency_changes_nothing(impl: Any, routing: Any, tau: float) -> None:
    student, teacher = draw(2, 3, 5, 7), draw(2, 3, 5, 7, seed=1)
    uniform = relation_distance(student, teacher, tau=tau, impl=impl)
    for constant in (0.2, 0.7, 1.0):
        saliency = torch.full((2, 3, 5), constant, dtype=torch.float64)
        routed = relation_distance(
            student, teacher, saliency_BTP=saliency, routing=routing, tau=tau, impl=impl
        )
        # up to the 1e-6 in the denominators
        torch.testing.assert_close(routed, uniform, atol=0, rtol=1e-5)


@every_impl
def test_xor_of_constant_saliency_weighs_nothing(impl: Any) -> None:
    saliency = torch.full((1, 3, 2), 0.3, dtype=torch.float64)
    relation = relation_distance(SINE, COSINE, saliency_BTP=saliency, routing="xor", impl=impl)
    assert all(term.item() == 0 for term in relation)


@every_impl
def test_a_margin_of_two_forgives_everything(impl: Any) -> None:
    student = (-COSINE).clone().requires_grad_()
    relation = relation_distance(student, draw(1, 3, 2, 4), margin=2.0, impl=impl)
    assert all(term.item() == 0 for term in relation)
    torch.autograd.backward([term.sum() for term in relation])
    assert student.grad is not None and (student.grad == 0).all()


@every_impl
def test_temporal_part_fades_with_distance_in_time(impl: Any) -> None:
    """Only frames 0 and 2 differ in what they say of each other; neighbours agree."""
    teacher = torch.eye(3, dtype=torch.float64).reshape(1, 3, 1, 3)
    student = teacher.clone()
    student[0, 2, 0] = torch.tensor([1.0, 0.0, 1.0])
    for tau in (0.5, 3.0, math.inf):
        near, far = math.exp(-1 / tau), math.exp(-2 / tau)
        expected = far * 2**-0.5 / (2 * near + far + 5e-7)
        relation = relation_distance(student, teacher, tau=tau, impl=impl)
        assert relation.temporal.item() == pytest.approx(expected, rel=1e-9)
        assert relation.joint.item() == pytest.approx(2 * 2**-0.5 / 9, rel=1e-6)


@every_impl
def test_zero_vectors_have_cosine_zero_and_no_distance_to_themselves(impl: Any) -> None:
    student = torch.zeros(1, 2, 3, 4, requires_grad=True)
    teacher = torch.ones(1, 2, 3, 4)
    relation = relation_distance(student, teacher, impl=impl)
    assert relation.spatial.item() == pytest.approx(2 / 3)
    assert relation.temporal.item() == pytest.approx(1)
    torch.autograd.backward([term.sum() for term in relation])
    assert student.grad is not None and torch.isfinite(student.grad).all()


@every_impl
@pytest.mark.parametrize("frames_tokens", [(1, 1), (3, 1), (1, 4)])
def test_a_mean_over_no_pairs_is_zero(impl: Any, frames_tokens: tuple[int, int]) -> None:
    student, teacher = draw(2, *frames_tokens, 5), draw(2, *frames_tokens, 5, seed=1)
    relation = relation_distance(student.requires_grad_(), teacher, impl=impl)
    frames, tokens = frames_tokens
    assert bool((relation.spatial == 0).all()) == (tokens == 1)
    assert bool((relation.temporal == 0).all()) == (frames == 1)
    plain = plain_means(relation, frames, tokens)
    assert all(torch.isfinite(term).all() for term in plain)
    (grad,) = torch.autograd.grad(torch.stack(plain).sum(), student)
    assert torch.isfinite(grad).all()


@every_impl
def test_a_broken_sample_is_not_hidden_and_spoils_no_other(impl: Any, small_tiles: None) -> None:
    student, teacher = draw(3, 2, 5, 7), draw(3, 2, 5, 7, seed=1)
    clean = relation_distance(student, teacher, impl=impl)
    student[1, 0, 3, 2] = math.nan
    student.requires_grad_()
    relation = relation_distance(student, teacher, impl=impl)
    torch.autograd.backward([term[[0, 2]].sum() for term in relation])
    for term, want in zip(relation, clean, strict=True):
        assert torch.isnan(term[1])
        torch.testing.assert_close(term[[0, 2]], want[[0, 2]])
    assert student.grad is not None and torch.isfinite(student.grad[[0, 2]]).all()


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    frames=st.integers(0, 4),
    tokens=st.integers(0, 5),
    width=st.integers(1, 5),
    routing=st.sampled_from(ROUTINGS),
    margin=st.sampled_from([0.0, 0.2]),
    tau=st.sampled_from([0.7, math.inf]),
    seed=st.integers(0, 1000),
)
def test_any_shape_gives_the_same_finite_values_in_both(
    batch: int,
    frames: int,
    tokens: int,
    width: int,
    routing: Any,
    margin: float,
    tau: float,
    seed: int,
) -> None:
    student = draw(batch, frames, tokens, width, seed=seed).requires_grad_()
    teacher = draw(batch, frames, tokens, width + 1, seed=seed + 1)
    setting: dict[str, Any] = {
        "saliency_BTP": draw_saliency(batch, frames, tokens, seed=seed),
        "routing": routing,
        "margin": margin,
        "tau": tau,
    }
    eager = torch.stack(relation_distance(student, teacher, impl="eager", **setting))
    chunked = torch.stack(relation_distance(student, teacher, impl="chunked", **setting))
    assert chunked.shape == (3, batch) and ((chunked >= 0) & (chunked <= 2)).all()
    torch.testing.assert_close(chunked, eager)
    grads = [torch.autograd.grad(terms.sum(), student)[0] for terms in (chunked, eager)]
    torch.testing.assert_close(*grads)


def test_mean_relation_averages_each_term() -> None:
    one, other = (
        relation_distance(draw(2, 3, 4, 5, seed=seed), draw(2, 3, 4, 5, seed=9)) for seed in (0, 1)
    )
    mean = mean_relation([one, other])
    for term, first, second in zip(mean, one, other, strict=True):
        torch.testing.assert_close(term, (first + second) / 2)


@pytest.mark.parametrize(
    ("student", "teacher", "settings", "message"),
    [
        (SINE[0], COSINE[0], {}, "not .B, T, P, D. alike"),
        (SINE, COSINE[:, :2], {}, "not .B, T, P, D. alike"),
        (SINE, COSINE.expand(2, 3, 2, 4), {}, "not .B, T, P, D. alike"),
        (SINE, COSINE, {"routing": "or"}, "'or' needs a saliency"),
        (SINE, COSINE, {"saliency_BTP": SALIENCY[:, :2]}, "saliency .* does not match"),
        (SINE, COSINE, {"routing": "nor"}, "'nor': choose or, and, xor, uniform"),
        (SINE, COSINE, {"margin": -0.1}, "margin must be"),
        (SINE, COSINE, {"margin": math.nan}, "margin must be"),
        (SINE, COSINE, {"tau": 0.0}, "tau must be above 0"),
        (SINE, COSINE, {"tau": math.nan}, "tau must be above 0"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    student: Tensor, teacher: Tensor, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        relation_distance(student, teacher, **settings)
