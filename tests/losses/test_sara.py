"""SARA's formulas, Stage 2 and InfoNCE: golden values, loops, properties; and its settings."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from alignlab.losses.sara import SaraConfig, info_nce, routed_relation_loss
from random_tensors import draw, golden_pair, golden_saliency

SINE, COSINE = golden_pair(1, 3, 2, 4)
SALIENCY = golden_saliency()


def draw_saliency(*shape: int, seed: int = 5) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def by_loops(
    student_TPD: Tensor,
    teacher_TPD: Tensor,
    saliency_TP: Tensor,
    routing: str,
    tau: float,
    temporal_weight: float,
) -> Tensor:
    """Visits every ordered pair of tokens of one sample, one at a time."""
    tops: list[Any] = [0.0, 0.0]
    bottoms = [1e-6, 1e-6]
    places = list(itertools.product(range(student_TPD.shape[0]), range(student_TPD.shape[1])))
    for one, other in itertools.product(places, places):
        a, b = float(saliency_TP[one]), float(saliency_TP[other])
        weight = {"or": 1 - (1 - a) * (1 - b), "and": a * b, "xor": abs(a - b), "uniform": 1.0}
        apart = abs(one[0] - other[0])
        share = weight[routing] * math.exp(-apart / tau)
        gap = F.cosine_similarity(student_TPD[one], student_TPD[other], dim=0) - (
            F.cosine_similarity(teacher_TPD[one], teacher_TPD[other], dim=0)
        )
        tops[apart > 0] = tops[apart > 0] + share * (gap.abs() if one != other else gap * 0.0)
        bottoms[apart > 0] += share
    total: Tensor = tops[0] / bottoms[0] + temporal_weight * tops[1] / bottoms[1]
    return total


@pytest.mark.parametrize("impl", ["auto", "eager", "chunked"])
@pytest.mark.parametrize(
    ("setting", "golden"),
    [
        pytest.param({}, 0.17661906 + 0.39903824, id="or"),
        pytest.param({"tau": 10.0}, 0.17661906 + 0.39032765, id="or_tau_10"),
        pytest.param({"routing": "and"}, 0.11226164 + 0.40853719, id="and"),
        pytest.param({"routing": "xor"}, 0.43517856 + 0.41090840, id="xor"),
        pytest.param({"routing": "uniform"}, 0.17730709 + 0.36529237, id="uniform"),
        pytest.param({"temporal_weight": 0.0}, 0.17661906, id="spatial_only"),
    ],
)
def test_reproduces_the_golden_values(impl: Any, setting: dict[str, Any], golden: float) -> None:
    loss_B = routed_relation_loss(SINE, COSINE, SALIENCY, impl=impl, **setting)
    assert loss_B.shape == (1,) and loss_B.dtype == torch.float64
    assert loss_B.item() == pytest.approx(golden, abs=1.5e-8)


@pytest.mark.parametrize("impl", ["eager", "chunked"])
@pytest.mark.parametrize(
    ("routing", "tau", "temporal_weight"),
    [("or", math.inf, 1.0), ("or", 2.0, 0.3), ("and", 2.0, 1.0), ("xor", 1.0, 2.0)],
)
def test_values_and_gradients_equal_a_loop_over_pairs(
    impl: Any, routing: Any, tau: float, temporal_weight: float
) -> None:
    student, teacher = draw(2, 3, 5, 7).double().requires_grad_(), draw(2, 3, 5, 3, seed=1).double()
    saliency = draw_saliency(2, 3, 5).double()
    loss_B = routed_relation_loss(
        student,
        teacher,
        saliency,
        routing=routing,
        tau=tau,
        temporal_weight=temporal_weight,
        impl=impl,
    )
    for sample in range(2):
        expected = by_loops(
            student[sample], teacher[sample], saliency[sample], routing, tau, temporal_weight
        )
        torch.testing.assert_close(loss_B[sample], expected)
        have, want = (
            torch.autograd.grad(value, student, retain_graph=True)
            for value in (loss_B[sample], expected)
        )
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("routing", ["or", "and"])
def test_constant_saliency_is_no_saliency(routing: Any) -> None:
    student, teacher = draw(2, 3, 5, 7).double(), draw(2, 3, 5, 7, seed=1).double()
    ones = torch.ones(2, 3, 5, dtype=torch.float64)
    uniform = routed_relation_loss(student, teacher, ones, routing="uniform")
    for constant in (0.2, 1.0):
        routed = routed_relation_loss(student, teacher, constant * ones, routing=routing)
        torch.testing.assert_close(routed, uniform, atol=0, rtol=1e-5)


def test_and_sees_only_pairs_inside_the_salient_tokens() -> None:
    student, teacher = draw(1, 3, 5, 7), draw(1, 3, 5, 7, seed=1)
    saliency = torch.zeros(1, 3, 5)
    saliency[:, :, :2] = 1.0
    elsewhere = torch.cat([student[:, :, :2], draw(1, 3, 3, 7, seed=2)], dim=2)
    for routing, blind in (("and", True), ("or", False), ("xor", False)):
        one, other = (
            routed_relation_loss(x, teacher, saliency, routing=routing)  # type: ignore[arg-type]
            for x in (student, elsewhere)
        )
        assert torch.allclose(one, other) == blind


def test_info_nce_reproduces_its_golden_value() -> None:
    loss_B = info_nce(SINE.reshape(6, 4), COSINE.reshape(6, 4))
    assert loss_B.shape == (6,) and loss_B.dtype == torch.float64
    assert loss_B.mean().item() == pytest.approx(11.88819613, abs=5e-9)


def test_info_nce_equals_a_loop_and_reaches_both_sides() -> None:
    visual, text = (
        draw(5, 7).double().requires_grad_(),
        draw(5, 7, seed=1).double().requires_grad_(),
    )
    expected = []
    for row in range(5):
        scores = [F.cosine_similarity(visual[row], text[j], dim=0) / 0.2 for j in range(5)]
        expected.append(torch.log(sum(torch.exp(s - scores[row]) for s in scores)))  # type: ignore[arg-type]
    loss_B = info_nce(visual, text, temperature=0.2)
    torch.testing.assert_close(loss_B, torch.stack(expected))
    assert torch.autograd.gradcheck(lambda v, t: info_nce(v, t, 0.2), (visual, text))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = info_nce(visual.float(), text.float(), temperature=0.2)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), loss_B, atol=1e-5, rtol=0)
    assert info_nce(visual[:1], text[:1]).item() == 0
    with pytest.raises(ValueError, match=r"are not \(B, D\) alike"):
        info_nce(visual, text[:4])


def test_config_defaults_are_the_papers() -> None:
    config = SaraConfig(teacher="clip", aligner="folder")
    assert (config.blocks, config.weight, config.routing) == ((17,), 0.5, "or")
    assert (config.tau, config.temporal_weight, config.projector_dim) == (None, 1.0, 2048)
    assert (config.saliency, config.grid) == ("aligner", "teacher")


@pytest.mark.parametrize("tau", [None, math.inf, "inf", 10.0])
def test_config_survives_json_also_without_decay(tau: Any) -> None:
    config = SaraConfig(teacher="clip", saliency="masks", tau=tau)
    assert config.tau == (10.0 if tau == 10.0 else None)
    assert SaraConfig.model_validate_json(config.model_dump_json()) == config
    assert SaraConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "name the Stage 1 folder in `aligner`"),
        ({"aligner": ""}, "name the Stage 1 folder in `aligner`"),
        ({"saliency": "masks", "aligner": "folder"}, "`aligner` is never read"),
        ({"saliency": "masks", "routing": "nand"}, "routing"),
        ({"saliency": "masks", "tau": 0.0}, "tau"),
        ({"saliency": "masks", "tau": math.nan}, "tau"),
        ({"saliency": "masks", "temporal_weight": -1.0}, "temporal_weight"),
    ],
)
def test_config_refuses_what_has_no_meaning(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SaraConfig(teacher="clip", **settings)
