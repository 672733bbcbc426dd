"""VideoREPA: golden values, a loop over pairs, first frame, grids and the learned pooling."""

import itertools
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from alignlab.losses.objective import Features, Grid, Terms, Tokens
from alignlab.losses.videorepa import VideoRepa, VideoRepaConfig, token_relation_loss
from random_tensors import draw, golden_pair

SINE, COSINE = golden_pair(1, 3, 2, 4)
GRID = (3, 2, 4)


def build(**settings: Any) -> VideoRepa:
    config = {"teacher": "clip", "blocks": (0,), "projector_dim": 8, **settings}
    return VideoRepa(VideoRepaConfig(**config), student_dim=6, teacher_dims={"clip": 5})


def loss(objective: VideoRepa, student: Tensor, teacher: Tensor, teacher_grid: Grid) -> Tensor:
    tapped = {block: Tokens(student, GRID) for block in objective.config.blocks}
    terms: Terms = objective(tapped, {"clip": Features(teacher, teacher_grid)})
    return terms.loss_B


def by_loops(student_TPD: Tensor, teacher_TPD: Tensor, margin: float, reduction: str) -> Tensor:
    """Visits every ordered pair of tokens, one at a time, and takes plain means."""
    within: list[Tensor] = []
    across: list[Tensor] = []
    places = list(itertools.product(range(student_TPD.shape[0]), range(student_TPD.shape[1])))
    for one, other in itertools.product(places, places):
        gap = F.cosine_similarity(student_TPD[one], student_TPD[other], dim=0) - (
            F.cosine_similarity(teacher_TPD[one], teacher_TPD[other], dim=0)
        )
        pair = torch.relu(gap.abs() - margin) if one != other else gap * 0.0
        (within if one[0] == other[0] else across).append(pair)
    if reduction == "joint":
        return torch.stack(within + across).mean()
    return torch.stack(within).mean() + torch.stack(across).mean()


def test_squared_without_a_margin_it_is_drepa_but_for_the_number_of_pairs() -> None:
    loss_B = token_relation_loss(SINE, COSINE, margin=0.0, distance="l2")
    assert loss_B.item() * 6 / 5 == pytest.approx(0.22216618, abs=5e-9)
    with pytest.raises(ValidationError, match="l2 is computed by eager and chunked alone, not by"):
        VideoRepaConfig(teacher="clip", distance="l2", impl="triton")


@pytest.mark.parametrize("impl", ["auto", "eager", "chunked"])
@pytest.mark.parametrize(
    ("margin", "reduction", "golden"),
    [
        pytest.param(0.1, "joint", 0.22902455, id="released_code"),
        pytest.param(0.1, "sum", 0.12730710 + 0.27988327, id="paper"),
        pytest.param(0.0, "sum", 0.17730710 + 0.36529239, id="no_margin"),
    ],
)
def test_reproduces_the_golden_values(
    impl: Any, margin: float, reduction: Any, golden: float
) -> None:
    loss_B = token_relation_loss(SINE, COSINE, margin=margin, reduction=reduction, impl=impl)
    assert loss_B.shape == (1,) and loss_B.dtype == torch.float64
    assert loss_B.item() == pytest.approx(golden, abs=1e-8)


def test_defaults_are_the_released_ones() -> None:
    assert token_relation_loss(SINE, COSINE).item() == pytest.approx(0.22902455, abs=5e-9)


@pytest.mark.parametrize("impl", ["eager", "chunked"])
@pytest.mark.parametrize("reduction", ["joint", "sum"])
def test_values_and_gradients_equal_a_loop_over_pairs(impl: Any, reduction: Any) -> None:
    student, teacher = draw(2, 3, 5, 7).double().requires_grad_(), draw(2, 3, 5, 3, seed=1).double()
    loss_B = token_relation_loss(student, teacher, margin=0.15, reduction=reduction, impl=impl)
    for sample in range(2):
        expected = by_loops(student[sample], teacher[sample], 0.15, reduction)
        torch.testing.assert_close(loss_B[sample], expected)
        have, want = (
            torch.autograd.grad(value, student, retain_graph=True)
            for value in (loss_B[sample], expected)
        )
        torch.testing.assert_close(have, want)


def test_only_relations_count() -> None:
    """REPA sees a rotation of the teacher, this loss does not."""
    teacher = draw(2, 3, 5, 7).double()
    rotation, _ = torch.linalg.qr(draw(7, 7, seed=2).double())
    lengths = draw(2, 3, 5, 1, seed=3).double().abs() + 0.1
    for student in (teacher * lengths, teacher @ rotation):
        for reduction in ("joint", "sum"):
            loss_B = token_relation_loss(student, teacher, margin=0.0, reduction=reduction)
            assert (loss_B < 1e-14).all()
    assert (token_relation_loss(teacher.flip(1), teacher, margin=0.0) > 0.05).all()


def test_gradient_reaches_the_student_only() -> None:
    student, teacher = SINE.clone().requires_grad_(), COSINE.clone().requires_grad_()
    torch.autograd.backward(token_relation_loss(student, teacher).sum())
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="'mean': choose joint, sum"):
        token_relation_loss(SINE, COSINE, reduction="mean")  # type: ignore[arg-type]


def test_first_frame_is_dropped_unless_kept() -> None:
    student, teacher = draw(2, 24, 6), draw(2, 3, 8, 5, seed=1)
    other_first = torch.cat([draw(2, 1, 8, 5, seed=2), teacher[:, 1:]], dim=1)
    for first_frame, matters in (("drop", False), ("keep", True)):
        objective = build(first_frame=first_frame)
        one, other = (loss(objective, student, x, GRID) for x in (teacher, other_first))
        assert torch.allclose(one, other) != matters


def test_a_video_teacher_has_left_the_first_frame_out_already() -> None:
    student, teacher = draw(2, 24, 6), draw(2, 4, 8, 5, seed=1)
    objective = build()
    projected = objective.projectors["block_0"](student).unflatten(1, (3, 8))[:, 1:]
    # trilinear to twice the frames, as in the released code
    volume = projected.movedim(3, 1).unflatten(3, (2, 4))
    volume = F.interpolate(volume, scale_factor=(2, 1, 1), mode="trilinear")
    doubled = volume.flatten(3).movedim(1, 3)
    expected = token_relation_loss(doubled, teacher)
    torch.testing.assert_close(loss(objective, student, teacher, (4, 2, 4)), expected)
    with pytest.raises(ValueError, match=r"first_frame=keep, but the teacher .* set first"):
        loss(build(first_frame="keep"), student, teacher, (4, 2, 4))


def test_a_clip_of_one_frame_is_refused_rather_than_free() -> None:
    tapped = {0: Tokens(draw(1, 8, 6), (1, 2, 4))}
    features = {"clip": Features(draw(1, 1, 8, 5, seed=1), (1, 2, 4))}
    with pytest.raises(ValueError, match="leaves nothing of a clip of one frame"):
        build()(tapped, features)
    assert build(first_frame="keep")(tapped, features).loss_B.shape == (1,)


def test_grid_says_whose_tokens_are_compared() -> None:
    student, teacher = draw(2, 24, 6), draw(2, 9, 8, 5, seed=1)
    averaged = torch.stack([teacher[:, 1:5].mean(1), teacher[:, 5:].mean(1)], 1)
    objective = build(grid="student")
    projected = objective.projectors["block_0"](student).unflatten(1, (3, 8))
    expected = token_relation_loss(projected[:, 1:], averaged)
    torch.testing.assert_close(loss(objective, student, teacher, (9, 2, 4)), expected)
    assert not torch.allclose(loss(build(grid="teacher"), student, teacher, (9, 2, 4)), expected)


@pytest.mark.parametrize("initial_weights", ["torch", "xavier"])
def test_projectors_start_as_the_released_code_or_repas(initial_weights: str) -> None:
    """Uniform within 1 / sqrt(inputs), biases too; Xavier is twice as wide here, without biases."""
    objective = VideoRepa(
        VideoRepaConfig.model_validate({"teacher": "clip", "initial_weights": initial_weights}),
        student_dim=512,
        teacher_dims={"clip": 256},
    )
    projector = objective.projectors["block_17"]
    layers = [layer for layer in projector.modules() if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in layers] == [512, 2048, 2048]
    for layer in layers:
        inputs, outputs = layer.in_features, layer.out_features
        default, xavier = inputs**-0.5, (6 / (inputs + outputs)) ** 0.5
        bound = default if initial_weights == "torch" else xavier
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=1e-2)
        widest = default if initial_weights == "torch" else 0.0
        assert layer.bias.abs().max().item() == pytest.approx(widest, rel=0.05)


def test_pooling_is_a_learned_convolution_after_the_projector() -> None:
    objective = build(pool=2)
    student, teacher = draw(2, 24, 6), draw(2, 4, 2, 5, seed=1)
    pooled_loss_B = loss(objective, student, teacher, (4, 1, 2))
    # The released order: projector, first frame away, twice the frames, convolution per frame.
    projected = objective.projectors["block_0"](student).unflatten(1, (3, 8))[:, 1:]
    volume = projected.movedim(3, 1).unflatten(3, (2, 4))
    volume = F.interpolate(volume, scale_factor=(2, 1, 1), mode="trilinear")
    images = volume.movedim(2, 1).flatten(0, 1)
    pooled = objective.pools["block_0"](images).unflatten(0, (2, 4)).flatten(3).mT
    torch.testing.assert_close(pooled_loss_B, token_relation_loss(pooled, teacher))
    torch.autograd.backward(pooled_loss_B.sum())
    weight = objective.pools["block_0"].weight
    assert isinstance(weight, nn.Parameter)
    assert weight.shape == (5, 5, 2, 2) and weight.grad is not None and (weight.grad != 0).any()


def test_pooling_starts_like_torchs_own_convolution_and_depends_on_the_seed() -> None:
    config = VideoRepaConfig(teacher="clip", blocks=(0,), pool=3)

    def drawn(seed: int) -> Tensor:
        objective = VideoRepa(config, student_dim=6, teacher_dims={"clip": 96}, seed=seed)
        weight, bias = objective.pools["block_0"].parameters()
        return torch.cat([weight.flatten(), bias])

    first = drawn(0)
    assert first.abs().max().item() == pytest.approx(1 / math.sqrt(96 * 9), rel=1e-2)
    assert first[-96:].abs().max().item() == pytest.approx(1 / math.sqrt(96 * 9), rel=0.1)
    assert torch.equal(drawn(0), first) and not torch.equal(drawn(1), first)


def test_pooling_that_does_not_divide_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pool=3 does not divide the grid \(3, 2, 4\)"):
        loss(build(pool=3), draw(2, 24, 6), draw(2, 3, 8, 5), GRID)


def test_blocks_are_averaged_and_parts_are_the_two_means() -> None:
    objective = build(blocks=(1, 4), first_frame="keep", reduction="sum")
    student = {block: Tokens(draw(2, 24, 6, seed=block), GRID) for block in (1, 4)}
    teacher = draw(2, 3, 8, 5, seed=7)
    terms = objective(student, {"clip": Features(teacher, GRID)})
    per_block = [
        token_relation_loss(
            objective.projectors[f"block_{block}"](student[block].tokens_BND).unflatten(1, (3, 8)),
            teacher,
            reduction="sum",
        )
        for block in (1, 4)
    ]
    torch.testing.assert_close(terms.loss_B, torch.stack(per_block).mean(0))
    torch.testing.assert_close(terms.parts["spatial"] + terms.parts["temporal"], terms.loss_B)
    assert terms.similarity_B is None


@pytest.mark.parametrize(
    "changed",
    [
        {"margin": 0.0},
        {"reduction": "sum"},
        {"first_frame": "keep"},
        {"grid": "student"},
        {"pool": 2},
        {"projector_dim": 9},
        {"initial_weights": "xavier"},
        {"blocks": (2,)},
        {"teacher": "dino"},
    ],
    ids=str,
)
def test_every_setting_changes_the_loss(changed: dict[str, Any]) -> None:
    tapped = {block: Tokens(draw(2, 24, 6, seed=block), GRID) for block in (0, 2)}
    features = {
        "clip": Features(draw(2, 9, 8, 5, seed=7), (9, 2, 4)),
        "dino": Features(draw(2, 9, 8, 4, seed=8), (9, 2, 4)),
    }
    config = {"teacher": "clip", "blocks": (0,), "projector_dim": 8}

    def value(settings: dict[str, Any]) -> Tensor:
        objective = VideoRepa(
            VideoRepaConfig(**settings), student_dim=6, teacher_dims={"clip": 5, "dino": 4}
        )
        terms: Terms = objective(tapped, features)
        return terms.loss_B

    assert not torch.allclose(value({**config, **changed}), value(config))


def test_config_defaults_are_the_papers() -> None:
    config = VideoRepaConfig(teacher="clip")
    assert (config.blocks, config.weight, config.margin) == ((17,), 0.5, 0.1)
    assert (config.reduction, config.first_frame, config.grid) == ("joint", "drop", "teacher")
    assert (config.pool, config.projector_dim) == (1, 2048)
    assert config.initial_weights == "torch"
    assert VideoRepaConfig.model_validate_json(config.model_dump_json()) == config
    for wrong in ({"margin": -0.1}, {"pool": 0}, {"grid": "both"}, {"first_frame": "skip"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            VideoRepaConfig.model_validate({"teacher": "clip", **wrong})
